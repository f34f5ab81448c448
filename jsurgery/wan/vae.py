"""Wan's causal video VAEs: 4x fewer frames, smaller sides, z_dim channels. The first frame has its own latent.

Wan2.1's has sides 8 times smaller, Wan2.2's 16 times: its blocks have shortcuts, and it computes on patches of pixels.

`encode` and `decode` take a whole clip at once, are differentiable, and need memory in proportion to its frames.
`encode_in_chunks` and `decode_in_chunks` compute the same, one latent frame at a time with cached features, and on
request over tiles in space. Attribute names are the parameter names of the reference, diffusers' AutoencoderKLWan.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jsurgery.errors import InputError
from jsurgery.runtime.finite import describe_weights, is_finite
from jsurgery.wan.causal_conv import CausalConv, FrameCache, per_channel
from jsurgery.wan.model_config import VaeConfig
from jsurgery.wan.vae_chunks import RunChunk, in_chunks, mesh_of_clips
from jsurgery.wan.vae_layers import Downsample, MidBlock, ResidualBlock, RMSNorm, Upsample
from jsurgery.wan.vae_shortcuts import DownBlockWithShortcut, UpBlockWithShortcut, from_patches, to_patches
from jsurgery.wan.vae_tiles import Tiling, in_tiles


def _frame_by_frame(
    layers: Callable[[jax.Array, FrameCache | None], Any], x: jax.Array, cache: FrameCache | None
) -> Any:
    """`layers` over the frames of x in a loop if there is a cache, else over all of them at once."""
    return layers(x, cache) if cache is None else cache.frame_by_frame(layers, x)


class Encoder(nnx.Module):
    """Layers up to the first one that halves the number of frames run frame by frame: they hold the largest arrays."""

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs):
        self.conv_in = CausalConv(config.pixel_channels, config.base_dim, (3, 3, 3), rngs=rngs)
        dim, layers = config.base_dim, []
        steps = (*config.temperal_downsample, None)  # after each level: whether it is temporal; none after the last
        for mult, temporal in zip(config.dim_mult, steps, strict=True):
            out_dim = config.base_dim * mult
            if config.is_residual:
                layers.append(DownBlockWithShortcut(dim, out_dim, config.num_res_blocks, temporal, rngs=rngs))
            else:
                dims = (dim,) + (out_dim,) * (config.num_res_blocks - 1)
                layers += [ResidualBlock(each, out_dim, rngs=rngs) for each in dims]
                layers += [] if temporal is None else [Downsample(out_dim, temporal, rngs=rngs)]
            dim = out_dim
        self.down_blocks = nnx.List(layers)
        spatial_levels = config.temperal_downsample.index(True)
        layers_of_level = 1 if config.is_residual else config.num_res_blocks + 1
        self.first_temporal = (spatial_levels + 1) * layers_of_level - 1
        self.mid_block = MidBlock(dim, rngs=rngs)
        self.norm_out = RMSNorm(dim, 3)
        self.conv_out = CausalConv(dim, 2 * config.z_dim, (3, 3, 3), rngs=rngs)

    def __call__(self, x: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        x = _frame_by_frame(self._at_full_rate, x, cache)
        first_temporal: Any
        first_temporal, *others = self.down_blocks[self.first_temporal :]
        x = first_temporal.downsampled(*x, cache) if isinstance(x, tuple) else first_temporal(x, cache)
        for block in others:
            x = block(x, cache)
        return self.conv_out(nnx.silu(self.norm_out(self.mid_block(x, cache))), cache)

    def _at_full_rate(self, x: jax.Array, cache: FrameCache | None) -> Any:
        """What the first temporal layer takes: x, or (the block's input, x) for the rest of a block with a shortcut."""
        x = self.conv_in(x, cache)
        for block in self.down_blocks[: self.first_temporal]:
            x = block(x, cache)
        block = self.down_blocks[self.first_temporal]
        return (x, block.residual(x, cache)) if isinstance(block, DownBlockWithShortcut) else x


class UpBlock(nnx.Module):
    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, upsample: Upsample | None, *, rngs: nnx.Rngs):
        dims = (in_dim,) + (out_dim,) * num_res_blocks
        self.resnets = nnx.List([ResidualBlock(dim, out_dim, rngs=rngs) for dim in dims])
        self.upsamplers = nnx.List([] if upsample is None else [upsample])

    def __call__(self, x: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, cache)
        return x


class Decoder(nnx.Module):
    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs):
        dims = [(config.decoder_base_dim or config.base_dim) * mult for mult in reversed(config.dim_mult)]
        self.conv_in = CausalConv(config.z_dim, dims[0], (3, 3, 3), rngs=rngs)
        self.mid_block = MidBlock(dims[0], rngs=rngs)
        in_dim, blocks = dims[0], []
        for dim, temporal in zip(dims, (*reversed(config.temperal_downsample), None), strict=True):
            if config.is_residual:
                blocks.append(UpBlockWithShortcut(in_dim, dim, config.num_res_blocks, temporal, rngs=rngs))
                in_dim = dim
            else:
                upsample = None if temporal is None else Upsample(dim, dim // 2, temporal, rngs=rngs)
                blocks.append(UpBlock(in_dim, dim, config.num_res_blocks, upsample, rngs=rngs))
                in_dim = dim // 2
        self.up_blocks = nnx.List(blocks)
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv(dims[-1], config.pixel_channels, (3, 3, 3), rngs=rngs)

    def __call__(self, x: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        return self._from_level(0, self.mid_block(self.conv_in(x, cache), cache), cache)

    def _from_level(self, level: int, x: jax.Array, cache: FrameCache | None) -> jax.Array:
        """The up blocks from `level` on, frame by frame: a frame reaches full size before the next one is computed."""
        if level == len(self.up_blocks):
            return self.conv_out(nnx.silu(self.norm_out(x)), cache)
        x = self.up_blocks[level](x, cache)
        return _frame_by_frame(functools.partial(self._from_level, level + 1), x, cache)


class WanVae(nnx.Module):
    """Video [B, F, H, W, 3] in [-1, 1] to latents [B, T, H/8, W/8, z_dim] and back; F = 4(T - 1) + 1.

    Instead of 8 it is 16 in Wan2.2's: `VaeConfig.strides`.
    The latents of `encode` and `decode` are normalised, as the transformer takes them. `moments` and `pixels` are the
    VAE without that normalisation, for training it.
    """

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.devices: Mesh | None = None  # a clip on each; None: all clips on one device
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = CausalConv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), rngs=rngs)
        self.post_quant_conv = CausalConv(config.z_dim, config.z_dim, (1, 1, 1), rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def moments(self, video_BxFxHxWx3: jax.Array, cache: FrameCache | None = None) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance of the posterior, unnormalised and unclamped, each [B, T, H/8, W/8, z_dim].

        Without a cache, raises InputError unless F = 4k + 1 and the stride divides H and W. With a cache, nothing is
        checked, and the video must be a clip's first frame or 4 later ones.
        """
        if cache is None:
            _check_video_shape(video_BxFxHxWx3.shape, self.config.strides[1])
        features = self.encoder(to_patches(video_BxFxHxWx3.astype(self._dtype), self.config.patch_size), cache)
        mean, logvar = jnp.split(self.quant_conv(features), 2, axis=-1)
        return mean, logvar

    def pixels(self, z_BxTxHxWxC: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        """Unnormalised latents to video, not clipped, as a reconstruction loss needs it."""
        patches = self.decoder(self.post_quant_conv(z_BxTxHxWxC.astype(self._dtype)), cache)
        return from_patches(patches, self.config.patch_size)

    def encode(self, video_BxFxHxWx3: jax.Array) -> jax.Array:
        """The posterior's mean, normalised per channel by the config's latents_mean and latents_std."""
        return self._normalized(self.moments(video_BxFxHxWx3)[0])

    def decode(self, latents_BxTxHxWxC: jax.Array) -> jax.Array:
        """Normalised latents to video in [-1, 1]."""
        return jnp.clip(self.pixels(self._unnormalized(latents_BxTxHxWxC)), -1, 1)

    def encode_in_chunks(self, video_BxFxHxWx3: jax.Array | np.ndarray, tiling: Tiling | None = None) -> np.ndarray:
        """`encode`, 4 frames at a time: float32 on the host, device memory independent of F. Cannot be jitted.

        With a `tiling`, also tile by tile. That is an approximation, since a tile does not see beyond its edges.
        """
        stride = self.config.strides[1]
        _check_video_shape(video_BxFxHxWx3.shape, stride)
        whole = lambda video: self.in_chunks(encode_chunk, [(video[:, frames],) for frames in _chunks(video, 4)])
        return in_tiles(whole, np.asarray(video_BxFxHxWx3), tiling, unit=1, result_unit=stride)

    def decode_in_chunks(self, latents_BxTxHxWxC: jax.Array | np.ndarray, tiling: Tiling | None = None) -> np.ndarray:
        """`decode`, a latent frame at a time: float32 on the host, device memory independent of T. Cannot be jitted.

        With a `tiling`, also tile by tile. That is an approximation, since a tile does not see beyond its edges.
        """
        whole = lambda latents: self.in_chunks(decode_chunk, [(latents[:, frame],) for frame in _chunks(latents, 1)])
        video = in_tiles(whole, np.asarray(latents_BxTxHxWxC), tiling, unit=self.config.strides[1], result_unit=1)
        return np.clip(video, -1, 1, out=video)

    def decode_as_they_come(self, latents_BxTxHxWxC: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """`decode_in_chunks` of a clip whose latents come piece by piece: yields the frames of each latent frame.

        Nothing is kept but what the next frame needs. On several devices, all of them decode the same clip.
        Raises InputError for frames that are not finite.
        """
        graph, state = nnx.split(self)
        kept, frame = None, 0
        for piece in latents_BxTxHxWxC:
            for number in range(piece.shape[1]):
                y, kept = decode_chunk(graph, state, jnp.asarray(piece[:, number : number + 1]), kept)
                video = np.array(y, np.float32)
                if not is_finite(video):
                    raise InputError(
                        f"the VAE's decode chunks: frames from {frame} on are not finite: {describe_weights(state)}"
                    )
                frame += video.shape[1]
                yield np.clip(video, -1, 1, out=video)

    def spread(self, devices: Sequence[Any]) -> None:
        """From now on the methods `..._in_chunks` give each of these devices a clip of its own.

        The weights move there, in place: every device gets all of them.
        """
        self.devices = mesh_of_clips(devices)
        if self.devices is not None:
            nnx.update(self, jax.device_put(nnx.state(self), NamedSharding(self.devices, PartitionSpec())))

    @property
    def clips_at_once(self) -> int:
        """The number of clips that keep all devices busy."""
        return 1 if self.devices is None else self.devices.size

    def in_chunks(self, run_chunk: RunChunk, chunks: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """`run_chunk`, a function like `encode_chunk`, over chunks in turn; see `vae_chunks.in_chunks`."""
        result = in_chunks(run_chunk, *nnx.split(self), chunks, self.devices)
        if not is_finite(result):
            clip, frame = np.argwhere(~np.isfinite(result).all(axis=(2, 3, 4)))[0]
            where = f"the VAE's {run_chunk.__name__.strip('_').replace('_', ' ')}s: frame {frame} of clip {clip}"
            raise InputError(f"{where} of {len(result)} is not finite: {describe_weights(nnx.state(self))}")
        return result

    def _normalized(self, mean: jax.Array) -> jax.Array:
        config = self.config
        mean = mean.astype(jnp.float32)
        return (mean - per_channel(config.latents_mean, mean)) / per_channel(config.latents_std, mean)

    def _unnormalized(self, latents: jax.Array) -> jax.Array:
        config = self.config
        return latents * per_channel(config.latents_std, latents) + per_channel(config.latents_mean, latents)

    @property
    def _dtype(self) -> jnp.dtype:
        return self.quant_conv.kernel.dtype


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="kept")
def encode_chunk(
    graph: nnx.GraphDef, state: nnx.State, video_BxFxHxWx3: jax.Array, kept: list[Any] | None = None
) -> tuple[jax.Array, list[Any]]:
    """(a latent frame, `kept` for the next chunk) of a clip's first frame, with `kept` None, or of the next 4 frames.

    `graph` and `state` are a split WanVae.
    """
    vae, cache = nnx.merge(graph, state), FrameCache(kept)
    return vae._normalized(vae.moments(video_BxFxHxWx3, cache)[0]), cache.left


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="kept")
def decode_chunk(
    graph: nnx.GraphDef, state: nnx.State, latents_Bx1xHxWxC: jax.Array, kept: list[Any] | None = None
) -> tuple[jax.Array, list[Any]]:
    """(frames, `kept` for the next chunk) of a latent frame; the frames are not clipped. See `encode_chunk`."""
    vae, cache = nnx.merge(graph, state), FrameCache(kept)
    return vae.pixels(vae._unnormalized(latents_Bx1xHxWxC), cache), cache.left


def _chunks(x_BxTxHxWxC: np.ndarray, size: int) -> list[slice]:
    """The frames of each chunk: the first frame, then `size` frames at a time."""
    return [slice(0, 1), *(slice(t, t + size) for t in range(1, x_BxTxHxWxC.shape[1], size))]


def _check_video_shape(shape: tuple[int, ...], stride: int) -> None:
    if len(shape) != 5 or shape[-1] != 3:
        raise InputError(f"video: expected [batch, frames, height, width, 3], found {list(shape)}")
    _, frames, height, width, _ = shape
    if frames % 4 != 1:
        nearest = 4 * max(round((frames - 1) / 4), 0) + 1
        raise InputError(f"frames: expected 4k + 1, found {frames}; the nearest that works is {nearest}")
    for name, side in (("height", height), ("width", width)):
        if side % stride or side == 0:
            nearest = f"the nearest that works is {stride * max(round(side / stride), 1)}"
            raise InputError(f"{name}: expected a multiple of {stride}, found {side}; {nearest}")
