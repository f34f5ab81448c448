"""What Wan2.2's VAE has beside the layers of Wan2.1's: shortcuts around changes of size, and patches of pixels.

A shortcut moves values between pixels and channels without weights. Attribute names are those of diffusers.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jsurgery.wan.causal_conv import FrameCache
from jsurgery.wan.vae_layers import Downsample, ResidualBlock, Upsample


def average_down(x_BxTxHxWxC: jax.Array, out_dim: int, time: int, side: int) -> jax.Array:
    """[B, T, H, W, C] -> [B, ceil(T / time), H / side, W / side, out_dim].

    The values of each channel in a box of `time` x `side` x `side` become channels of their own, and groups of
    neighbouring ones are averaged. Zeros stand before a first frame that has no box of its own.
    """
    x = jnp.pad(x_BxTxHxWxC, ((0, 0), (-x_BxTxHxWxC.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    batch, frames, height, width, dim = x.shape
    x = x.reshape(batch, frames // time, time, height // side, side, width // side, side, dim)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], out_dim, -1).mean(axis=-1)


def duplicate_up(x_BxTxHxWxC: jax.Array, out_dim: int, time: int, side: int, at_start: bool) -> jax.Array:
    """[B, T, H, W, C] -> [B, time * T, side * H, side * W, out_dim], the reverse of `average_down`.

    At a clip's start the frames that only the padding of `average_down` would have are left out.
    """
    batch, frames, height, width, dim = x_BxTxHxWxC.shape
    x = x_BxTxHxWxC.repeat(out_dim * time * side**2 // dim, axis=-1)
    x = x.reshape(batch, frames, height, width, out_dim, time, side, side).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(batch, frames * time, height * side, width * side, out_dim)
    return x[:, time - 1 :] if at_start else x


class DownBlockWithShortcut(nnx.Module):
    """Residual blocks and a downsampler, beside an average of what goes in. `temporal` None: no change of size."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, temporal: bool | None, *, rngs: nnx.Rngs):
        dims = (in_dim,) + (out_dim,) * (num_res_blocks - 1)
        self.out_dim = out_dim
        self.resnets = nnx.List([ResidualBlock(dim, out_dim, rngs=rngs) for dim in dims])
        self.downsampler = None if temporal is None else Downsample(out_dim, temporal, rngs=rngs)

    def __call__(self, x: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        return self.downsampled(x, self.residual(x, cache), cache)

    def residual(self, x: jax.Array, cache: FrameCache | None) -> jax.Array:
        """The block's input after its residual blocks, of the same size."""
        for block in self.resnets:
            x = block(x, cache)
        return x

    def downsampled(self, x: jax.Array, residual: jax.Array, cache: FrameCache | None) -> jax.Array:
        """The block's output, from its input and what `residual` made of it."""
        if self.downsampler is None:
            return residual + average_down(x, self.out_dim, 1, 1)
        time = 1 if self.downsampler.time_conv is None else 2
        return self.downsampler(residual, cache) + average_down(x, self.out_dim, time, 2)


class UpBlockWithShortcut(nnx.Module):
    """Residual blocks and an upsampler, beside copies of what goes in. `temporal` None: neither of the last two."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, temporal: bool | None, *, rngs: nnx.Rngs):
        dims = (in_dim,) + (out_dim,) * num_res_blocks
        self.out_dim = out_dim
        self.resnets = nnx.List([ResidualBlock(dim, out_dim, rngs=rngs) for dim in dims])
        self.upsampler = None if temporal is None else Upsample(out_dim, out_dim, temporal, rngs=rngs)

    def __call__(self, x: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        y = x
        for block in self.resnets:
            y = block(y, cache)
        if self.upsampler is None:
            return y
        time = 1 if self.upsampler.time_conv is None else 2
        at_start = cache is None or cache.at_start
        return self.upsampler(y, cache) + duplicate_up(x, self.out_dim, time, 2, at_start)


def to_patches(video_BxFxHxWxC: jax.Array, patch: int | None) -> jax.Array:
    """[B, F, H / P, W / P, C * P * P], the channels in the reference's order: colour, column, row. None: no patches."""
    if patch is None:
        return video_BxFxHxWxC
    batch, frames, height, width, dim = video_BxFxHxWxC.shape
    x = video_BxFxHxWxC.reshape(batch, frames, height // patch, patch, width // patch, patch, dim)
    x = x.transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(*x.shape[:4], dim * patch**2)


def from_patches(x_BxFxHxWxK: jax.Array, patch: int | None) -> jax.Array:
    """The reverse of `to_patches`."""
    if patch is None:
        return x_BxFxHxWxK
    batch, frames, height, width, channels = x_BxFxHxWxK.shape
    x = x_BxFxHxWxK.reshape(batch, frames, height, width, channels // patch**2, patch, patch)
    return x.transpose(0, 1, 2, 6, 3, 5, 4).reshape(batch, frames, height * patch, width * patch, channels // patch**2)
