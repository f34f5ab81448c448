"""The layers of Wan's VAEs. Attribute names are the parameter names of the reference, diffusers' AutoencoderKLWan."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jsurgery.wan.causal_conv import CausalConv, FrameCache, per_channel


class RMSNorm(nnx.Module):
    """Scales the channel vector to length sqrt(C), then by gamma, which has the reference's trailing axes of size 1."""

    def __init__(self, dim: int, trailing_axes: int):
        self.gamma = nnx.Param(jnp.ones((dim,) + (1,) * trailing_axes))

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        # The floor is applied before the root, so that the gradient of an all-zero vector is finite.
        square_length = jnp.sum(jnp.square(x_f32), axis=-1, keepdims=True)
        unit = x_f32 * jax.lax.rsqrt(jnp.maximum(square_length, 1e-24))
        return unit.astype(x.dtype) * per_channel(self.gamma[...], x) * x.shape[-1] ** 0.5


class ResidualBlock(nnx.Module):
    def __init__(self, in_dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(in_dim, 3)
        self.conv1 = CausalConv(in_dim, out_dim, (3, 3, 3), rngs=rngs)
        self.norm2 = RMSNorm(out_dim, 3)
        self.conv2 = CausalConv(out_dim, out_dim, (3, 3, 3), rngs=rngs)
        self.conv_shortcut = CausalConv(in_dim, out_dim, (1, 1, 1), rngs=rngs) if in_dim != out_dim else None

    def __call__(self, x: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x, cache)
        x = self.conv1(nnx.silu(self.norm1(x)), cache)
        return shortcut + self.conv2(nnx.silu(self.norm2(x)), cache)


class FrameAttention(nnx.Module):
    """Self-attention with one head over the pixels of each frame."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nnx.Conv(dim, 3 * dim, (1, 1), rngs=rngs)
        self.proj = nnx.Conv(dim, dim, (1, 1), rngs=rngs)

    def __call__(self, x_BxTxHxWxC: jax.Array) -> jax.Array:
        batch, time, height, width, dim = x_BxTxHxWxC.shape
        x_NxHxWxC = x_BxTxHxWxC.reshape(batch * time, height, width, dim)
        qkv_NxPx1x3C = self.to_qkv(self.norm(x_NxHxWxC)).reshape(batch * time, height * width, 1, 3 * dim)
        q, k, v = jnp.split(qkv_NxPx1x3C, 3, axis=-1)
        # Frame by frame, because the scores of all frames at once would be the largest array by far.
        y_NxPx1xC = jax.lax.map(lambda qkv: jax.nn.dot_product_attention(*qkv), (q, k, v))
        y_NxHxWxC = self.proj(y_NxPx1xC.reshape(x_NxHxWxC.shape))
        return x_BxTxHxWxC + y_NxHxWxC.reshape(x_BxTxHxWxC.shape)


class MidBlock(nnx.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResidualBlock(dim, dim, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([FrameAttention(dim, rngs=rngs)])

    def __call__(self, x: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        before, after = self.resnets
        return after(self.attentions[0](before(x, cache)), cache)


def _pad_right_and_bottom(x_NxHxWxC: jax.Array) -> jax.Array:
    return jnp.pad(x_NxHxWxC, ((0, 0), (0, 1), (0, 1), (0, 0)))


def _repeat_pixels(x_NxHxWxC: jax.Array) -> jax.Array:
    return x_NxHxWxC.repeat(2, axis=1).repeat(2, axis=2)


def _two_frames_of_each(x_BxTxHxWx2C: jax.Array) -> jax.Array:
    batch, time, height, width, dim = x_BxTxHxWx2C.shape
    x_BxTxHxWx2xC = x_BxTxHxWx2C.reshape(batch, time, height, width, 2, dim // 2)
    return jnp.moveaxis(x_BxTxHxWx2xC, 4, 2).reshape(batch, 2 * time, height, width, dim // 2)


def _apply_per_frame(layers: nnx.List, x_BxTxHxWxC: jax.Array) -> jax.Array:
    batch, time = x_BxTxHxWxC.shape[:2]
    x = x_BxTxHxWxC.reshape(-1, *x_BxTxHxWxC.shape[2:])
    for layer in layers:
        x = layer(x)
    return x.reshape(batch, time, *x.shape[1:])


def _past_first(layer: Callable[[jax.Array], jax.Array], x: jax.Array, cache: FrameCache | None) -> jax.Array:
    """`layer` over all frames except a clip's first, which stays as it is."""
    if cache is not None and not cache.at_start:
        return layer(x)
    return jnp.concatenate([x[:, :1], layer(x[:, 1:])], axis=1)


class Downsample(nnx.Module):
    """Halves the sides and, if temporal, the number of frames after the first. No later frame mixes into the first."""

    def __init__(self, dim: int, temporal: bool, *, rngs: nnx.Rngs):
        conv = nnx.Conv(dim, dim, (3, 3), strides=2, padding="VALID", rngs=rngs)
        self.resample = nnx.List([_pad_right_and_bottom, conv])
        self.time_conv = CausalConv(dim, dim, (3, 1, 1), time_stride=2, rngs=rngs) if temporal else None

    def __call__(self, x: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        x = _apply_per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        return _past_first(functools.partial(self.time_conv, cache=cache, start=x[:, :1]), x, cache)


class Upsample(nnx.Module):
    """Doubles the sides and, if temporal, makes two frames of every frame after the first.

    The temporal convolution does not see the first frame: as in the reference, the cache has zeros in its place.
    """

    def __init__(self, dim: int, out_dim: int, temporal: bool, *, rngs: nnx.Rngs):
        self.resample = nnx.List([_repeat_pixels, nnx.Conv(dim, out_dim, (3, 3), rngs=rngs)])
        self.time_conv = CausalConv(dim, 2 * dim, (3, 1, 1), rngs=rngs) if temporal else None

    def __call__(self, x: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        if (time_conv := self.time_conv) is not None:
            x = _past_first(lambda x: _two_frames_of_each(time_conv(x, cache)), x, cache)
        return _apply_per_frame(self.resample, x)
