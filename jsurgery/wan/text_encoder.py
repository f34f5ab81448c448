"""The UMT5 encoder, which turns Wan's prompts into the embeddings that cross-attention reads.

T5 v1.1 (Raffel et al. 2020) with a relative position bias in every layer (UniMax, Chung et al. 2023).
Attribute names are the tensor names of transformers' UMT5EncoderModel (see `torch_layout`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jsurgery.wan.model_config import TextEncoderConfig


def position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every (query, key) pair, int32 [length, length] (Raffel et al. 2020, section 2.1).

    Keys after the query use the upper half of the buckets. In each half, the first half of the buckets hold one
    distance each. The others widen logarithmically up to `max_distance`, and the last one holds all larger distances.
    """
    half = num_buckets // 2
    exact = half // 2
    offset_LxL = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance_LxL = np.abs(offset_LxL)
    # In float32, as in every T5, because the rounding decides on which side of a bucket's edge a distance falls.
    ratio_LxL = np.log(np.maximum(distance_LxL, 1).astype(np.float32) / np.float32(exact))
    steps_LxL = ratio_LxL / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    wide_LxL = np.minimum(exact + steps_LxL.astype(np.int32), half - 1)
    bucket_LxL = np.where(distance_LxL < exact, distance_LxL, wide_LxL) + half * (offset_LxL > 0)
    return bucket_LxL.astype(np.int32)


class RMSNorm(nnx.Module):
    """`weight * x / rms(x)` over the last axis, the mean square in float32."""

    def __init__(self, dim: int, epsilon: float):
        self.weight = nnx.Param(jnp.ones(dim))
        self.epsilon = epsilon

    def __call__(self, x_BxLxE: jax.Array) -> jax.Array:
        mean_square_BxLx1 = jnp.mean(jnp.square(x_BxLxE.astype(jnp.float32)), axis=-1, keepdims=True)
        weight_E = self.weight[...]
        return (x_BxLxE * jax.lax.rsqrt(mean_square_BxLx1 + self.epsilon)).astype(weight_E.dtype) * weight_E[None, None]


def _linear(in_dim: int, out_dim: int, stddev: float, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(in_dim, out_dim, use_bias=False, kernel_init=nnx.initializers.normal(stddev), rngs=rngs)


class SelfAttention(nnx.Module):
    """Unscaled multi-head attention with a learned bias per bucket of relative position."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        inner_dim = config.num_heads * config.d_kv
        # The logits are not divided by sqrt(d_kv). The query's initial scale contains that factor instead.
        self.q = _linear(config.d_model, inner_dim, (config.d_model * config.d_kv) ** -0.5, rngs)
        self.k = _linear(config.d_model, inner_dim, config.d_model**-0.5, rngs)
        self.v = _linear(config.d_model, inner_dim, config.d_model**-0.5, rngs)
        self.o = _linear(inner_dim, config.d_model, inner_dim**-0.5, rngs)
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            embedding_init=nnx.initializers.normal(config.d_model**-0.5),
            rngs=rngs,
        )
        self.head_dim = config.d_kv
        self.max_distance = config.relative_attention_max_distance

    def __call__(self, x_BxLxE: jax.Array, mask_bias_Bx1x1xL: jax.Array) -> jax.Array:
        batch, length, _ = x_BxLxE.shape
        q_BxLxHxD, k_BxLxHxD, v_BxLxHxD = (
            project(x_BxLxE).reshape(batch, length, -1, self.head_dim) for project in (self.q, self.k, self.v)
        )
        buckets_LxL = position_buckets(length, self.relative_attention_bias.num_embeddings, self.max_distance)
        bias_HxLxL = self.relative_attention_bias(jnp.asarray(buckets_LxL)).transpose(2, 0, 1)
        logits_BxHxLxL = jnp.einsum("bqhd,bkhd->bhqk", q_BxLxHxD, k_BxLxHxD) + bias_HxLxL[None] + mask_bias_Bx1x1xL
        weights_BxHxLxL = jax.nn.softmax(logits_BxHxLxL.astype(jnp.float32)).astype(v_BxLxHxD.dtype)
        y_BxLxHxD = jnp.einsum("bhqk,bkhd->bqhd", weights_BxHxLxL, v_BxLxHxD)
        return self.o(y_BxLxHxD.reshape(batch, length, -1))


class SelfAttentionLayer(nnx.Module):
    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.SelfAttention = SelfAttention(config, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x_BxLxE: jax.Array, mask_bias_Bx1x1xL: jax.Array) -> jax.Array:
        return x_BxLxE + self.SelfAttention(self.layer_norm(x_BxLxE), mask_bias_Bx1x1xL)


class GatedFeedForward(nnx.Module):
    """`wo(gelu(wi_0(x)) * wi_1(x))`, the GELU in its tanh form."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.wi_0 = _linear(config.d_model, config.d_ff, config.d_model**-0.5, rngs)
        self.wi_1 = _linear(config.d_model, config.d_ff, config.d_model**-0.5, rngs)
        self.wo = _linear(config.d_ff, config.d_model, config.d_ff**-0.5, rngs)

    def __call__(self, x_BxLxE: jax.Array) -> jax.Array:
        return self.wo(jax.nn.gelu(self.wi_0(x_BxLxE), approximate=True) * self.wi_1(x_BxLxE))


class FeedForwardLayer(nnx.Module):
    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.DenseReluDense = GatedFeedForward(config, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x_BxLxE: jax.Array) -> jax.Array:
        return x_BxLxE + self.DenseReluDense(self.layer_norm(x_BxLxE))


class Block(nnx.Module):
    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.layer: nnx.List[Any] = nnx.List(
            [SelfAttentionLayer(config, rngs=rngs), FeedForwardLayer(config, rngs=rngs)]
        )

    def __call__(self, x_BxLxE: jax.Array, mask_bias_Bx1x1xL: jax.Array) -> jax.Array:
        attention, feed_forward = self.layer
        return feed_forward(attention(x_BxLxE, mask_bias_Bx1x1xL))


class Encoder(nnx.Module):
    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.block = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x_BxLxE: jax.Array, mask_bias_Bx1x1xL: jax.Array) -> jax.Array:
        for block in self.block:
            x_BxLxE = block(x_BxLxE, mask_bias_Bx1x1xL)
        return self.final_layer_norm(x_BxLxE)


class TextEncoder(nnx.Module):
    """UMT5's encoder: (token ids [B, L] int, mask [B, L], 1 on tokens and 0 on padding) -> embeddings [B, L, d_model].

    Padding is not attended to. The rows of padding in the result mean nothing; `encode_prompts` sets them to zero.
    """

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.shared = nnx.Embed(
            config.vocab_size, config.d_model, embedding_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        self.encoder = Encoder(config, rngs=rngs)

    def __call__(self, token_ids_BxL: jax.Array, mask_BxL: jax.Array) -> jax.Array:
        return self.encoder(self.shared(token_ids_BxL), mask_bias(mask_BxL))


def mask_bias(mask_BxL: jax.Array) -> jax.Array:
    """What attention adds to its logits [B, H, L, L], so that no query attends to padding: float32 [B, 1, 1, L]."""
    return jnp.where(mask_BxL > 0, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]


def encode_prompts(encoder: TextEncoder, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Embeddings [B, L, d_model] as Wan's cross-attention takes them: zero wherever `mask` [B, L] is zero."""
    embeddings = encoder(token_ids, mask)
    return jnp.where(mask[:, :, None] > 0, embeddings, 0.0)
