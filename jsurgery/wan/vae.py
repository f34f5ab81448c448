"""Wan2.1's causal video VAE: 4x fewer frames (the first is kept apart), 8x smaller sides, z_dim channels.

`encode` and `decode` take a whole clip at once, are differentiable, and need memory in proportion to its frames.
`encode_in_chunks` and `decode_in_chunks` are the same functions, a latent frame at a time with cached features, and if
need be over tiles in space. Attribute names are the parameter names of the reference, diffusers' AutoencoderKLWan.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from jsurgery.errors import InputError
from jsurgery.files import read_object
from jsurgery.model_config import check_fields
from jsurgery.runtime.stages import write_json
from jsurgery.wan import weights
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.hashes import check_hashes, write_hashes
from jsurgery.wan.safetensors_files import open_tensors, write_shards

WAN_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# What a config.json may also say, and the only values that are Wan2.1's.
_FIXED_FIELDS = {
    "attn_scales": [],
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """The fields of diffusers' vae/config.json, spelt as there; defaults are Wan2.1's."""

    base_dim: int = 96
    decoder_base_dim: int | None = None  # None: base_dim
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN_LATENTS_STD

    def __post_init__(self):
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            found = f"{len(self.latents_mean)} and {len(self.latents_std)}"
            raise InputError(f"latents_mean, latents_std: expected z_dim = {self.z_dim} values each, found {found}")
        if len(self.dim_mult) != 4 or len(self.temperal_downsample) != 3 or sum(self.temperal_downsample) != 2:
            raise InputError(
                "dim_mult, temperal_downsample: expected 4 levels and 3 steps between them, 2 of them temporal "
                f"(stride 4, 8, 8), found {self.dim_mult} and {self.temperal_downsample}"
            )

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """From a parsed config.json; raises InputError on an unknown field or another architecture."""
        fields = {name: value for name, value in fields.items() if not name.startswith("_") and name != "dropout"}
        for name, fixed in _FIXED_FIELDS.items():
            if (value := fields.pop(name, fixed)) != fixed:
                raise InputError(f"{name}: Wan2.1's VAE has {fixed}, found {value}")
        if unknown := fields.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise InputError(f"{min(unknown)}: not a field of AutoencoderKLWan's config")
        values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in fields.items()}
        config = cls(**values)
        check_fields(config, "config.json")
        return config

    def to_json(self) -> dict[str, Any]:
        """The content of a config.json that diffusers' AutoencoderKLWan.from_pretrained reads."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {"_class_name": "AutoencoderKLWan", **fields, **_FIXED_FIELDS, "dropout": 0.0}


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of overlapping tiles and the steps between them, in pixels; the defaults are those of diffusers."""

    height: int = 256
    width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 8 or value % 8:
                raise InputError(f"tiling.{name}: expected a positive multiple of 8, found {value}")
        for side in ("height", "width"):
            size, stride = getattr(self, side), getattr(self, f"stride_{side}")
            if stride > size:
                raise InputError(f"tiling.stride_{side}: expected at most the tile's {side}, {size}, found {stride}")


class FrameCache:
    """What a network carries from one chunk of a clip to the next: the last frames that each causal convolution saw.

    Convolutions and inner caches take theirs in the order in which they run; all chunks but the first are of one size.
    """

    def __init__(self, kept: list[Any] | None = None):
        """`kept` is `left` of the chunk before; None in a clip's first chunk, which begins with its first frame."""
        self.at_start = kept is None
        self.left: list[Any] = []
        self._kept = iter(kept or [])

    def prepend(self, start_BxKxHxWxC: jax.Array, x_BxTxHxWxC: jax.Array) -> jax.Array:
        """The K frames that lie before x, then x; before a clip lies `start`."""
        before = [start_BxKxHxWxC] if self.at_start else next(self._kept)
        joined = jnp.concatenate([*before, x_BxTxHxWxC], axis=1)
        # Each frame is an array of its own: slices of a longer one would be copies that the compiler makes early.
        self.left.append(jnp.split(joined[:, x_BxTxHxWxC.shape[1] :], start_BxKxHxWxC.shape[1], axis=1))
        return joined

    def frame_by_frame(
        self, layers: Callable[[jax.Array, "FrameCache"], jax.Array], x_BxTxHxWxC: jax.Array
    ) -> jax.Array:
        """`layers` in a loop over the frames of x, so that intermediate values are those of one frame."""

        def run(kept: list[Any] | None, x_BxSxHxWxC: jax.Array) -> tuple[list[Any], jax.Array]:
            cache = FrameCache(kept)
            y = layers(x_BxSxHxWxC, cache)
            return cache.left, y

        if self.at_start:
            left, y = run(None, x_BxTxHxWxC)
        else:
            x_TxBx1xHxWxC = jnp.moveaxis(x_BxTxHxWxC, 1, 0)[:, :, None]
            left, y_TxBxSxHxWxC = jax.lax.scan(run, next(self._kept), x_TxBx1xHxWxC)
            y = jnp.concatenate(list(y_TxBxSxHxWxC), axis=1)
        self.left.append(left)
        return y


def _per_channel(values: Any, x: jax.Array) -> jax.Array:
    return jnp.asarray(values, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class CausalConv(nnx.Module):
    """Convolution over [B, T, H, W, C] that sees the present and the kt - 1 frames before it; sides keep their size.

    Computed as one 2-D convolution over frames whose channels hold the kt time-shifted copies: XLA's 3-D convolution on
    CPU is several times slower, and one path for all devices keeps their results comparable.
    """

    def __init__(
        self, in_dim: int, out_dim: int, kernel_size: tuple[int, int, int], *, time_stride: int = 1, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (*kernel_size, in_dim, out_dim)))
        self.bias = nnx.Param(jnp.zeros(out_dim))
        self.time_stride = time_stride

    def __call__(
        self, x_BxTxHxWxC: jax.Array, cache: FrameCache | None = None, start: jax.Array | None = None
    ) -> jax.Array:
        """T / time_stride frames. `start` [B, kt - time_stride, H, W, C], by default zeros, lies before the clip."""
        kt, kh, kw, in_dim, out_dim = self.kernel.shape
        batch, time, height, width, _ = x_BxTxHxWxC.shape
        frames = batch * time // self.time_stride
        if overlap := kt - self.time_stride:
            if start is None:
                start = jnp.zeros((batch, overlap, height, width, in_dim), x_BxTxHxWxC.dtype)
            x_BxTxHxWxC = (cache or FrameCache()).prepend(start, x_BxTxHxWxC)
        shifted = [x_BxTxHxWxC[:, t : t + time : self.time_stride] for t in range(kt)]
        x_NxHxWxK = jnp.concatenate(shifted, axis=-1).reshape(frames, height, width, kt * in_dim)
        kernel_HxWxKxO = self.kernel[...].transpose(1, 2, 0, 3, 4).reshape(kh, kw, kt * in_dim, out_dim)
        y_NxHxWxO = jax.lax.conv_general_dilated(
            x_NxHxWxK,
            kernel_HxWxKxO,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y_BxTxHxWxO = y_NxHxWxO.reshape(batch, time // self.time_stride, height, width, out_dim)
        return y_BxTxHxWxO + _per_channel(self.bias[...], y_BxTxHxWxO)


class RMSNorm(nnx.Module):
    """Scales the channel vector to length sqrt(C), then by gamma, stored with the reference's trailing axes of one."""

    def __init__(self, dim: int, trailing_axes: int):
        self.gamma = nnx.Param(jnp.ones((dim,) + (1,) * trailing_axes))

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        # The floor lies under the root, so that the gradient of an all-zero vector is finite.
        square_length = jnp.sum(jnp.square(x_f32), axis=-1, keepdims=True)
        unit = x_f32 * jax.lax.rsqrt(jnp.maximum(square_length, 1e-24))
        return unit.astype(x.dtype) * _per_channel(self.gamma[...], x) * x.shape[-1] ** 0.5


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
        # Frame by frame: the scores of all frames at once would be the largest array by far.
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


def _frame_by_frame(
    layers: Callable[[jax.Array, FrameCache | None], jax.Array], x: jax.Array, cache: FrameCache | None
) -> jax.Array:
    return layers(x, cache) if cache is None else cache.frame_by_frame(layers, x)


def _past_first(layer: Callable[[jax.Array], jax.Array], x: jax.Array, cache: FrameCache | None) -> jax.Array:
    """`layer` over all frames but a clip's first, which passes by."""
    if cache is not None and not cache.at_start:
        return layer(x)
    return jnp.concatenate([x[:, :1], layer(x[:, 1:])], axis=1)


class Downsample(nnx.Module):
    """Halves the sides and, if temporal, the frames after the first, which is never mixed into."""

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
    """Doubles the sides, halves the channels and, if temporal, makes two frames of each after the first.

    The first frame passes by the temporal convolution unseen: the reference's cache starts with zeros in its place.
    """

    def __init__(self, dim: int, temporal: bool, *, rngs: nnx.Rngs):
        self.resample = nnx.List([_repeat_pixels, nnx.Conv(dim, dim // 2, (3, 3), rngs=rngs)])
        self.time_conv = CausalConv(dim, 2 * dim, (3, 1, 1), rngs=rngs) if temporal else None

    def __call__(self, x: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        if (time_conv := self.time_conv) is not None:
            x = _past_first(lambda x: _two_frames_of_each(time_conv(x, cache)), x, cache)
        return _apply_per_frame(self.resample, x)


class Encoder(nnx.Module):
    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs):
        self.conv_in = CausalConv(3, config.base_dim, (3, 3, 3), rngs=rngs)
        dim, layers = config.base_dim, []
        for level, mult in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(dim, config.base_dim * mult, rngs=rngs))
                dim = config.base_dim * mult
            if level < len(config.temperal_downsample):
                layers.append(Downsample(dim, config.temperal_downsample[level], rngs=rngs))
        self.down_blocks = nnx.List(layers)
        spatial_levels = config.temperal_downsample.index(True)
        self.num_at_full_rate = spatial_levels * (config.num_res_blocks + 1) + config.num_res_blocks
        self.mid_block = MidBlock(dim, rngs=rngs)
        self.norm_out = RMSNorm(dim, 3)
        self.conv_out = CausalConv(dim, 2 * config.z_dim, (3, 3, 3), rngs=rngs)

    def __call__(self, x: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        x = _frame_by_frame(self._at_full_rate, x, cache)
        for block in self.down_blocks[self.num_at_full_rate :]:
            x = block(x, cache)
        return self.conv_out(nnx.silu(self.norm_out(self.mid_block(x, cache))), cache)

    def _at_full_rate(self, x: jax.Array, cache: FrameCache | None) -> jax.Array:
        """The layers before the first that halves the frames."""
        x = self.conv_in(x, cache)
        for block in self.down_blocks[: self.num_at_full_rate]:
            x = block(x, cache)
        return x


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
            upsample = None if temporal is None else Upsample(dim, temporal, rngs=rngs)
            blocks.append(UpBlock(in_dim, dim, config.num_res_blocks, upsample, rngs=rngs))
            in_dim = dim // 2
        self.up_blocks = nnx.List(blocks)
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv(dims[-1], 3, (3, 3, 3), rngs=rngs)

    def __call__(self, x: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        return self._from_level(0, self.mid_block(self.conv_in(x, cache), cache), cache)

    def _from_level(self, level: int, x: jax.Array, cache: FrameCache | None) -> jax.Array:
        """The up block and all after it: frame by frame, so that a frame reaches full size before the next one does."""
        if level == len(self.up_blocks):
            return self.conv_out(nnx.silu(self.norm_out(x)), cache)
        x = self.up_blocks[level](x, cache)
        return _frame_by_frame(functools.partial(self._from_level, level + 1), x, cache)


class WanVae(nnx.Module):
    """Video [B, F, H, W, 3] in [-1, 1] to latents [B, T, H/8, W/8, z_dim] and back; F = 4(T - 1) + 1.

    `encode` and `decode` speak the normalised latents that the transformer takes; `moments` and `pixels` are the plain
    VAE behind them, for training it.
    """

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = CausalConv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), rngs=rngs)
        self.post_quant_conv = CausalConv(config.z_dim, config.z_dim, (1, 1, 1), rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def moments(self, video_BxFxHxWx3: jax.Array, cache: FrameCache | None = None) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance of the posterior, unnormalised and unclamped, each [B, T, H/8, W/8, z_dim].

        Raises InputError unless F = 4k + 1 and H and W are multiples of 8; with a cache, nothing is checked, and the
        video is a clip's first frame or 4 later ones.
        """
        if cache is None:
            _check_video_shape(video_BxFxHxWx3.shape)
        features = self.encoder(video_BxFxHxWx3.astype(self._dtype), cache)
        mean, logvar = jnp.split(self.quant_conv(features), 2, axis=-1)
        return mean, logvar

    def pixels(self, z_BxTxHxWxC: jax.Array, cache: FrameCache | None = None) -> jax.Array:
        """Unnormalised latents to video, not clipped: what a reconstruction loss wants."""
        return self.decoder(self.post_quant_conv(z_BxTxHxWxC.astype(self._dtype)), cache)

    def encode(self, video_BxFxHxWx3: jax.Array) -> jax.Array:
        """The posterior's mean, normalised per channel by the config's latents_mean and latents_std."""
        return self._normalized(self.moments(video_BxFxHxWx3)[0])

    def decode(self, latents_BxTxHxWxC: jax.Array) -> jax.Array:
        """Normalised latents to video in [-1, 1]."""
        return jnp.clip(self.pixels(self._unnormalized(latents_BxTxHxWxC)), -1, 1)

    def encode_in_chunks(self, video_BxFxHxWx3: jax.Array | np.ndarray, tiling: Tiling | None = None) -> np.ndarray:
        """`encode`, 4 frames at a time: float32 on the host, device memory independent of F. Not to be jitted.

        With a `tiling`, also tile by tile: an approximation, since tiles do not see past their edges.
        """
        _check_video_shape(video_BxFxHxWx3.shape)
        whole = functools.partial(_in_chunks, encode_chunk, self, 4)
        return _in_tiles(whole, np.asarray(video_BxFxHxWx3), tiling, unit=1, result_unit=8)

    def decode_in_chunks(self, latents_BxTxHxWxC: jax.Array | np.ndarray, tiling: Tiling | None = None) -> np.ndarray:
        """`decode`, a latent frame at a time: float32 on the host, device memory independent of T. Not to be jitted.

        With a `tiling`, also tile by tile: an approximation, since tiles do not see past their edges.
        """
        whole = functools.partial(_in_chunks, decode_chunk, self, 1)
        video = _in_tiles(whole, np.asarray(latents_BxTxHxWxC), tiling, unit=8, result_unit=1)
        return np.clip(video, -1, 1, out=video)

    def _normalized(self, mean: jax.Array) -> jax.Array:
        config = self.config
        return (mean - _per_channel(config.latents_mean, mean)) / _per_channel(config.latents_std, mean)

    def _unnormalized(self, latents: jax.Array) -> jax.Array:
        config = self.config
        return latents * _per_channel(config.latents_std, latents) + _per_channel(config.latents_mean, latents)

    @property
    def _dtype(self) -> jnp.dtype:
        return self.quant_conv.kernel.dtype


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="kept")
def encode_chunk(
    graph: nnx.GraphDef, state: nnx.State, video_BxFxHxWx3: jax.Array, kept: list[Any] | None = None
) -> tuple[jax.Array, list[Any]]:
    """One latent frame, from a clip's first frame (`kept` None) or the next 4, and what the next chunk must be given.

    `graph` and `state` are a split WanVae.
    """
    vae, cache = nnx.merge(graph, state), FrameCache(kept)
    return vae._normalized(vae.moments(video_BxFxHxWx3, cache)[0]), cache.left


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="kept")
def decode_chunk(
    graph: nnx.GraphDef, state: nnx.State, latents_Bx1xHxWxC: jax.Array, kept: list[Any] | None = None
) -> tuple[jax.Array, list[Any]]:
    """A clip's first frame (`kept` None) or the next 4, unclipped, from a latent frame; else as `encode_chunk`."""
    vae, cache = nnx.merge(graph, state), FrameCache(kept)
    return vae.pixels(vae._unnormalized(latents_Bx1xHxWxC), cache), cache.left


def _in_chunks(run_chunk: Callable[..., Any], vae: WanVae, size: int, x_BxTxHxWxC: np.ndarray) -> np.ndarray:
    """`run_chunk` over the first frame, then over `size` frames at a time; finished frames move to the host."""
    graph, state = nnx.split(vae)
    y, kept = run_chunk(graph, state, x_BxTxHxWxC[:, :1])
    finished = [np.array(y, np.float32)]
    for t in range(1, x_BxTxHxWxC.shape[1], size):
        y, kept = run_chunk(graph, state, x_BxTxHxWxC[:, t : t + size], kept)
        finished.append(np.array(y, np.float32))
    return np.concatenate(finished, axis=1)


def _in_tiles(
    function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, tiling: Tiling | None, *, unit: int, result_unit: int
) -> np.ndarray:
    """`function` over tiles of x [B, T, H, W, C], each blended into those above and to the left, as diffusers does.

    `unit` and `result_unit` are the pixels to a side of one place of x and of the result.
    """
    height, width = x.shape[2:4]
    if tiling is None or (height * unit <= tiling.height and width * unit <= tiling.width):
        return function(x)
    stride_h, stride_w = tiling.stride_height // result_unit, tiling.stride_width // result_unit
    overlap_h, overlap_w = tiling.height // result_unit - stride_h, tiling.width // result_unit - stride_w
    above: list[np.ndarray] = []
    finished = []
    for top in range(0, height, tiling.stride_height // unit):
        row: list[np.ndarray] = []
        for column, left in enumerate(range(0, width, tiling.stride_width // unit)):
            tile = function(x[:, :, top : top + tiling.height // unit, left : left + tiling.width // unit])
            if above:
                tile = _blend(above[column], tile, overlap_h, axis=2)
            if row:
                tile = _blend(row[-1], tile, overlap_w, axis=3)
            row.append(tile)
        finished.append(np.concatenate([tile[:, :, :stride_h, :stride_w] for tile in row], axis=3))
        above = row
    return np.concatenate(finished, axis=2)


def _blend(before: np.ndarray, tile: np.ndarray, overlap: int, axis: int) -> np.ndarray:
    """`tile` with its first `overlap` places along `axis` faded in from the last of `before`, which lie there too."""
    overlap = min(overlap, before.shape[axis], tile.shape[axis])
    share = np.linspace(0, 1, overlap, endpoint=False, dtype=np.float32)
    share = share.reshape([-1 if i == axis else 1 for i in range(tile.ndim)])
    fading_out = np.split(before, [before.shape[axis] - overlap], axis)[1]
    fading_in, rest = np.split(tile, [overlap], axis)
    return np.concatenate([(1 - share) * fading_out + share * fading_in, rest], axis)


def _check_video_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 5 or shape[-1] != 3:
        raise InputError(f"video: expected [batch, frames, height, width, 3], found {list(shape)}")
    _, frames, height, width, _ = shape
    if frames % 4 != 1:
        nearest = 4 * max(round((frames - 1) / 4), 0) + 1
        raise InputError(f"frames: expected 4k + 1, found {frames}; the nearest that works is {nearest}")
    for name, side in (("height", height), ("width", width)):
        if side % 8 or side == 0:
            nearest = 8 * max(round(side / 8), 1)
            raise InputError(f"{name}: expected a multiple of 8, found {side}; the nearest that works is {nearest}")


def read_vae_config(path: epath.PathLike) -> VaeConfig:
    """Of a diffusers vae/ folder. Raises InputError, naming the file."""
    config_file = epath.Path(path) / "config.json"
    if not config_file.exists():
        raise InputError(f"{config_file}: no such file; expected a diffusers vae/ folder")
    fields = read_object(config_file, "the config of an AutoencoderKLWan as JSON")
    try:
        return VaeConfig.from_json(fields)
    except TypeError as error:  # a field that should be a list
        raise InputError(f"{config_file}: expected the config of an AutoencoderKLWan ({error})") from error
    except InputError as error:
        raise InputError(f"{config_file}: {error}") from error


def load_vae(path: epath.PathLike, dtype: jnp.dtype = jnp.float32) -> WanVae:
    """From a diffusers vae/ folder (config.json and safetensors); `dtype` is that of parameters and computation.

    Raises InputError, naming the file, for a folder that is not there, incomplete, damaged, or of another architecture.
    """
    check_hashes(path)
    config, tensors = read_vae_config(path), open_tensors(path)
    vae = abstract_module(WanVae, config)
    weights.load_mirrored(vae, tensors, dtype=dtype, source=path)
    return vae


def save_vae(vae: WanVae, path: epath.PathLike) -> None:
    """Writes a folder that `load_vae` and diffusers' AutoencoderKLWan.from_pretrained read."""
    path = epath.Path(path)
    hashes = write_shards(path, "diffusion_pytorch_model", weights.mirrored_tensors(vae))
    write_json(path / "config.json", vae.config.to_json())
    write_hashes(path, hashes, "config.json")
