"""The Wan diffusion transformer, with full softmax or hybrid self-attention in each block.

Attribute names follow the diffusers checkpoint where possible; `checkpoint_layouts` maps them to tensor names.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding

from jsurgery.attention.feature_maps import (
    FeatureMapParams,
    ProjectionParams,
    init_feature_maps,
    init_projections,
)
from jsurgery.attention.hybrid import token_order
from jsurgery.attention.kinds.base import TokenPlace
from jsurgery.attention.kinds.candidates import of_every_block
from jsurgery.attention.kinds.registry import kind_of
from jsurgery.attention.rope import apply_rope, rope_tables
from jsurgery.attention.token_order import TokenOrder
from jsurgery.rates import Rate
from jsurgery.runtime.mesh import LOGICAL, batch_shards, check_heads, shard_module, sharding
from jsurgery.wan.given_tokens import GivenTokens
from jsurgery.wan.linear import Linear
from jsurgery.wan.model_config import WanConfig
from pallas_kernels.api import hybrid_attention
from pallas_kernels.sharded import sharded_cross_attention

# `config.model.remat`: what the backward pass recomputes of a block.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda block: block,
    "blocks": jax.checkpoint,
    "matmuls": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def rms_norm(x_BxNxD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32."""
    x = x_BxNxD.astype(jnp.float32)
    normed = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (normed * weight_D[None, None]).astype(x_BxNxD.dtype)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """Layer norm over the last axis without gain and bias; the result is float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


def timestep_embedding(timesteps_B: jax.Array, width: int) -> jax.Array:
    """Sinusoids of timesteps in [0, 1000], cosines first: [B, width]."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps_B.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Attention(nnx.Module):
    """Projections and norms of an attention layer. Queries and keys are normalised over the width of all heads."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        dim = config.dim
        self.heads, self.eps = config.num_attention_heads, config.eps
        self.to_q, self.to_k, self.to_v, self.to_out = (Linear(dim, dim, dtype=dtype, rngs=rngs) for _ in range(4))
        self.norm_q = nnx.Param(jnp.ones(dim))
        self.norm_k = nnx.Param(jnp.ones(dim))

    def project(self, x_BxNxD: jax.Array, context_BxMxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, N, H, D/H] from `x`; k, v [B, M, H, D/H] from `context`."""
        q = rms_norm(self.to_q(x_BxNxD), self.norm_q[...], self.eps)
        k = rms_norm(self.to_k(context_BxMxD), self.norm_k[...], self.eps)
        v = self.to_v(context_BxMxD)
        return tuple(t.reshape(*t.shape[:2], self.heads, -1) for t in (q, k, v))  # type: ignore[return-value]

    def output(self, y_BxNxHxD: jax.Array) -> jax.Array:
        """The projection [B, N, D] of all heads' outputs."""
        return self.to_out(y_BxNxHxD.reshape(*y_BxNxHxD.shape[:2], -1))


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention to every key: [B, N, H, D]."""
    return hybrid_attention(q, k, v, None, None, num_softmax=k.shape[1])


class Block(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; scaled, shifted and gated by the timestep (adaLN)."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        dim = config.dim
        self.eps, self.cross_attn_norm = config.eps, config.cross_attn_norm
        self.attn1 = Attention(config, dtype=dtype, rngs=rngs)
        self.attn2 = Attention(config, dtype=dtype, rngs=rngs)
        if config.cross_attn_norm:
            self.norm2_scale = nnx.Param(jnp.ones(dim))
            self.norm2_bias = nnx.Param(jnp.zeros(dim))
        self.ffn_in = Linear(dim, config.ffn_dim, dtype=dtype, rngs=rngs)
        self.ffn_out = Linear(config.ffn_dim, dim, dtype=dtype, rngs=rngs)
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (6, dim)) / math.sqrt(dim))

    def __call__(
        self,
        x_BxNxD: jax.Array,
        text_BxMxD: jax.Array,
        modulation_Bx6xD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        self_attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        cross_attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = full_attention,
        given: GivenTokens | None = None,
    ) -> jax.Array:
        """Tokens [B, N, D] after the block; `rope` are the cosines and sines [N, D/(2 H)] of the tokens' angles."""
        x, dtype = x_BxNxD, x_BxNxD.dtype
        rows = lambda modulation: jnp.split(self.scale_shift_table[None] + modulation.astype(jnp.float32), 6, axis=1)
        modulations = rows(modulation_Bx6xD)
        if given is not None:
            modulations = [given.choose(*both) for both in zip(rows(given.modulation), modulations, strict=True)]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations

        h = (layer_norm(x, self.eps) * (1 + scale1) + shift1).astype(dtype)
        q, k, v = self.attn1.project(h, h)
        y = self_attention(apply_rope(q, *rope), apply_rope(k, *rope), v)
        x = (x + self.attn1.output(y) * gate1).astype(dtype)

        h = x
        if self.cross_attn_norm:
            h = (layer_norm(x, self.eps) * self.norm2_scale[None, None] + self.norm2_bias[None, None]).astype(dtype)
        q, k, v = self.attn2.project(h, text_BxMxD)
        x = x + self.attn2.output(cross_attention(q, k, v))

        h = (layer_norm(x, self.eps) * (1 + scale2) + shift2).astype(dtype)
        h = self.ffn_out(jax.nn.gelu(self.ffn_in(h), approximate=True))
        return (x + h * gate2).astype(dtype)


class ConditionEmbedder(nnx.Module):
    """Projects timestep and text to the model's width."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        dim = config.dim
        self.freq_dim = config.freq_dim
        self.time_in = Linear(config.freq_dim, dim, rngs=rngs)
        self.time_out = Linear(dim, dim, rngs=rngs)
        self.time_proj = Linear(dim, 6 * dim, rngs=rngs)
        self.text_in = Linear(config.text_dim, dim, dtype=dtype, rngs=rngs)
        self.text_out = Linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, timesteps_B: jax.Array, text_BxMxE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Time embedding [B, D], modulation [B, 6, D], text [B, M, D]."""
        text_BxMxD = self.text_out(jax.nn.gelu(self.text_in(text_BxMxE), approximate=True))
        return *self.at_time(timesteps_B), text_BxMxD

    def at_time(self, timesteps_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Time embedding [B, D] and modulation [B, 6, D]."""
        time_BxD = self.time_out(jax.nn.silu(self.time_in(timestep_embedding(timesteps_B, self.freq_dim))))
        return time_BxD, self.time_proj(jax.nn.silu(time_BxD)).reshape(time_BxD.shape[0], 6, -1)


class WanTransformer(nnx.Module):
    """velocity = transformer(latents [B, T, H, W, C], timesteps [B] in [0, 1000], text embeddings [B, M, text_dim]).

    With `given_frames`, so many latent frames at the start hold no noise, as in image to video of Wan2.2 TI2V 5B.

    Block parameters are stacked [L, ...] and scanned, also when rates differ from block to block, so that compile time
    does not grow with depth. Feature maps are stacked in the order of `hybrid.mapped`, projections of `projected`.
    """

    def __init__(self, config: WanConfig, *, dtype: Any = jnp.float32, remat: str = "none", rngs: nnx.Rngs):
        dim, patch = config.dim, math.prod(config.patch_size)
        self.config, self.dtype, self.remat = config, dtype, remat
        self.device_mesh: Mesh | None = None  # where the parameters are, if that was said
        self.mesh: Mesh | None = None  # the same if it has several devices
        self.exchange = "gather"
        self.patch_embedding = Linear(patch * config.in_channels, dim, dtype=dtype, rngs=rngs)
        self.condition = ConditionEmbedder(config, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=dtype, rngs=rngs)

        self.blocks = stacked_blocks(rngs)
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (2, dim)) / math.sqrt(dim))
        self.proj_out = Linear(dim, patch * config.out_channels, dtype=dtype, rngs=rngs)

        hybrid = config.hybrid
        if hybrid and hybrid.mapped:
            shape = len(hybrid.mapped), config.num_attention_heads, config.attention_head_dim
            self.query_maps = FeatureMapParams(init_feature_maps(rngs.params(), *shape, hybrid.feature_map))
            self.key_maps = FeatureMapParams(init_feature_maps(rngs.params(), *shape, hybrid.feature_map))
        if hybrid and hybrid.projected:
            self.projections = ProjectionParams(init_projections(len(hybrid.projected), config.attention_head_dim))

    def __call__(
        self, latents: jax.Array, timesteps: jax.Array, text_embeddings: jax.Array, given_frames: int = 0
    ) -> jax.Array:
        attention, layers, order = self.planned_attention(self.config.token_grid(latents.shape[1:4]))
        inputs = latents, timesteps, text_embeddings
        return self.apply_blocks(*inputs, attention, layers, order=order, given_frames=given_frames)[0]

    def planned_attention(self, grid: tuple[int, int, int]) -> tuple[Callable, Any, TokenOrder | None]:
        """(self_attention, layers, order) for `apply_blocks`, with every block of its kind."""
        hybrid, shards = self.config.hybrid, self.shards
        order = hybrid.token_order(grid, shards) if hybrid else None
        if order is None and shards > 1:
            order = token_order(grid, (1,), "strided", shards)
        if hybrid is None or not hybrid.converted:
            return lambda q, k, v, _: (self.attend(q, k, v, None, 1, grid, order), None), None, order
        kinds = sorted(set(self.config.rates), key=str)

        def at(rate: Rate) -> Callable:
            what = kind_of(rate).learns
            return lambda q, k, v, maps: self.attend(q, k, v, maps.get(what), rate, grid, order, hybrid.stabilizer)

        branches = [at(rate) for rate in kinds]
        planned = lambda q, k, v, layer: (lax.switch(layer[0], branches, q, k, v, layer[1]), None)
        kind_L = jnp.array([kinds.index(rate) for rate in hybrid.rates])
        maps = {}
        if hybrid.mapped:
            pair = self.query_maps.maps, self.key_maps.maps
            maps["feature_maps"] = of_every_block(pair, hybrid.mapped, self.config.num_layers)
        if hybrid.projected:
            maps["projection"] = of_every_block(self.projections.maps, hybrid.projected, self.config.num_layers)
        return planned, (kind_L, maps), order

    def store_in_compute_dtype(self) -> None:
        """Converts weights to `dtype`, in place, where a layer converts them at every call: same results, less memory.

        For inference. Norms, the time embedding and the modulation stay float32, and so do feature maps. The model may
        be abstract.
        """
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Linear) and module.dtype is not None:
                for param in (module.kernel, module.bias):
                    value: Any = param.get_value()  # type: ignore[union-attr]
                    abstract = isinstance(value, jax.ShapeDtypeStruct)
                    value = value.update(dtype=module.dtype) if abstract else value.astype(module.dtype)
                    param.set_value(value)  # type: ignore[union-attr]

    def shard(self, mesh: Mesh, exchange: str = "gather") -> None:
        """Moves the parameters onto the mesh, in place, and spreads activations over it from now on; see `set_mesh`."""
        self.set_mesh(mesh, exchange)
        shard_module(mesh, self)

    def set_mesh(self, mesh: Mesh, exchange: str = "gather") -> None:
        """Spreads activations over a mesh from now on.

        `exchange` is how attention reaches the keys in other shards of the sequence: "gather" or "all_to_all". Raises
        DoesNotFit when the mesh does not divide the heads.
        """
        check_heads(mesh, self.config.num_attention_heads, exchange, self.config.rates)
        self.device_mesh, self.mesh, self.exchange = mesh, (mesh if mesh.size > 1 else None), exchange
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Linear):
                module.set_mesh(self.mesh)

    @property
    def attention_mesh(self) -> Mesh | None:
        """The mesh over which attention is mapped; None on the only device.

        On one of several devices attention is mapped, too: else XLA might partition the arrays, and `hybrid_attention`
        would avoid the kernels.
        """
        mesh = self.device_mesh
        alone = mesh is not None and mesh.size == 1 and list(mesh.devices.flat) == jax.devices()
        return None if alone else mesh

    @property
    def shards(self) -> int:
        """The number of pieces of the token sequence: one per device along the mesh's context axis."""
        return 1 if self.mesh is None else self.mesh.shape[LOGICAL["sequence"]]

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        maps: Any,
        rate: Rate,
        grid: tuple[int, int, int],
        order: TokenOrder | None,
        stabilizer: str = "lse",
    ) -> jax.Array:
        """A block's self-attention of the kind `rate`, on one device or over the mesh.

        The tokens of `grid` lie in `order`; None: in natural order.
        """
        spread = None if self.attention_mesh is None else self._sharding(len(q), "sequence", "heads")
        place = TokenPlace(grid, order, stabilizer, spread, self.exchange)
        return kind_of(rate).attend(q, k, v, maps, place)

    def apply_blocks(
        self,
        latents_BxTxHxWxC: jax.Array,
        timesteps_B: jax.Array,
        text_BxMxE: jax.Array,
        self_attention: Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
        layers: Any,
        *,
        order: TokenOrder | None,
        stop_block: int | None = None,
        given_frames: int = 0,
        angles: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, Any]:
        """The whole network, with the caller's self-attention in every block.

        `self_attention(q, k, v, layer) -> (y, record)` is traced once and scanned. `layer` is the block's slice of the
        [L, ...] leaves of `layers`. Inside the blocks, tokens lie in `order`, or in natural order if it is None. Blocks
        from number `stop_block` on are skipped, and their records are zero. The tokens of the first `given_frames`
        latent frames have timestep 0. `angles` are the `rope_tables` of latents that are no video's first frames.
        Returns (velocity [B, T, H, W, C], records stacked [L, ...]).
        """
        config = self.config
        grid = config.token_grid(latents_BxTxHxWxC.shape[1:4])
        cos, sin = angles or rope_tables(grid, config.attention_head_dim, config.rope_max_seq_len)
        x = self.patchify(latents_BxTxHxWxC.astype(self.dtype))
        if order is not None:
            x, cos, sin = x[:, order.permutation], cos[order.permutation], sin[order.permutation]
        x = self.patch_embedding(self._constrained(x))
        rope = jnp.asarray(cos), jnp.asarray(sin)
        time, modulation, text = self.condition(timesteps_B, text_BxMxE.astype(self.dtype))
        given = self._given_tokens(given_frames, grid, order) if given_frames else None

        graph, stacked = nnx.split(self.blocks)
        to_text = full_attention
        if self.attention_mesh is not None:
            to_text = functools.partial(sharded_cross_attention, sharding=self._sharding(len(x), "sequence", "heads"))

        def block(x, layer):
            state, layer = layer
            records = []

            def recorded(q, k, v):
                y, record = self_attention(q, k, v, layer)
                records.append(record)
                return y

            x = nnx.merge(graph, state)(x, text, modulation, rope, recorded, to_text, given)
            return self._constrained(x), records[0]

        def block_or_none(x, layer):
            number, layer = layer
            zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
            none = lambda x, layer: (x, jax.tree.map(zeros, jax.eval_shape(block, x, layer)[1]))
            return lax.cond(number < stop_block, block, none, x, layer)

        body, layers = block, (stacked, layers)
        if stop_block is not None:
            body, layers = block_or_none, (jnp.arange(config.num_layers), layers)
        x, records = lax.scan(REMAT[self.remat](body), x, layers)

        rows = lambda time: jnp.split(self.scale_shift_table[None] + time[:, None].astype(jnp.float32), 2, axis=1)
        shift, scale = rows(time)
        if given is not None:
            shift, scale = (given.choose(*both) for both in zip(rows(given.time), (shift, scale), strict=True))
        x = self.proj_out((layer_norm(x, config.eps) * (1 + scale) + shift).astype(self.dtype))
        if order is not None:
            x = x[:, order.inverse]
        return self.unpatchify(x, grid), records

    def _given_tokens(self, frames: int, grid: tuple[int, int, int], order: TokenOrder | None) -> GivenTokens:
        """The tokens of the first latent `frames` of a token grid, in `order`."""
        frame_N = np.arange(math.prod(grid)) // math.prod(grid[1:]) * self.config.patch_size[0]
        mask_N = (frame_N if order is None else frame_N[order.permutation]) < frames
        return GivenTokens(jnp.asarray(mask_N)[None, :, None], *self.condition.at_time(jnp.zeros(1)))

    def _constrained(self, x_BxNxD: jax.Array) -> jax.Array:
        """The same tokens, constrained to be split over the mesh by batch and sequence."""
        if self.mesh is None:
            return x_BxNxD
        return lax.with_sharding_constraint(x_BxNxD, self._sharding(len(x_BxNxD), "sequence", None))

    def _sharding(self, batch: int, *dimensions: str | None) -> NamedSharding:
        """The sharding of an array of `batch` examples. A batch that the mesh does not divide is replicated."""
        assert self.attention_mesh is not None
        divides = batch % batch_shards(self.attention_mesh) == 0
        return sharding(self.attention_mesh, "batch" if divides else None, *dimensions)

    def patchify(self, latents_BxTxHxWxC: jax.Array) -> jax.Array:
        """[B, T, H, W, C] -> [B, N, pt * ph * pw * C], tokens in row-major order."""
        (pt, ph, pw), (b, t, h, w, c) = self.config.patch_size, latents_BxTxHxWxC.shape
        x = latents_BxTxHxWxC.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, c)
        return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, pt * ph * pw * c)

    def unpatchify(self, x_BxNxP: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
        """[B, N, pt * ph * pw * C] -> [B, T, H, W, C]; the inverse of `patchify`."""
        (pt, ph, pw), (t, h, w) = self.config.patch_size, grid
        x = x_BxNxP.reshape(-1, t, h, w, pt, ph, pw, self.config.out_channels)
        return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, t * pt, h * ph, w * pw, self.config.out_channels)
