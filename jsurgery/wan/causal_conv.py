"""Causal convolutions over time, and the cache of frames that lets a clip run through them chunk by chunk."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class FrameCache:
    """The state of a network between two chunks of a clip: the last input frames of every causal convolution.

    Entries are in the order in which the convolutions run. All chunks but the first must have the same size.
    """

    def __init__(self, kept: list[Any] | None = None):
        """`kept` is the `left` of the chunk before, or None for a clip's first chunk."""
        self.at_start = kept is None
        self.left: list[Any] = []
        self._kept = iter(kept or [])

    def prepend(self, start_BxKxHxWxC: jax.Array, x_BxTxHxWxC: jax.Array) -> jax.Array:
        """The K frames before x, followed by x. At the start of a clip the K frames are `start`."""
        before = [start_BxKxHxWxC] if self.at_start else next(self._kept)
        joined = jnp.concatenate([*before, x_BxTxHxWxC], axis=1)
        # Every frame is an array of its own. As slices of a longer array they would be copied, and early.
        self.left.append(jnp.split(joined[:, x_BxTxHxWxC.shape[1] :], start_BxKxHxWxC.shape[1], axis=1))
        return joined

    def frame_by_frame(self, layers: Callable[[jax.Array, "FrameCache"], Any], x_BxTxHxWxC: jax.Array) -> Any:
        """Runs `layers` in a loop over the frames of x, so that intermediate values take the memory of one frame.

        `layers` may return several arrays.
        """

        def run(kept: list[Any] | None, x_BxSxHxWxC: jax.Array) -> tuple[list[Any], Any]:
            cache = FrameCache(kept)
            y = layers(x_BxSxHxWxC, cache)
            return cache.left, y

        if self.at_start:
            left, y = run(None, x_BxTxHxWxC)
        else:
            x_TxBx1xHxWxC = jnp.moveaxis(x_BxTxHxWxC, 1, 0)[:, :, None]
            left, y_TxBxSxHxWxC = jax.lax.scan(run, next(self._kept), x_TxBx1xHxWxC)
            y = jax.tree.map(lambda y_TxBxSxHxWxC: jnp.concatenate(list(y_TxBxSxHxWxC), axis=1), y_TxBxSxHxWxC)
        self.left.append(left)
        return y


class CausalConv(nnx.Module):
    """Convolution over [B, T, H, W, C] in which a frame sees itself and the kt - 1 frames before it; keeps H and W.

    It is computed as one 2-D convolution over frames whose channels hold kt copies, shifted in time. XLA's 3-D
    convolution is several times slower on CPU, and with one path for all devices their results stay comparable.
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
        """Returns T / time_stride frames.

        `start` [B, kt - time_stride, H, W, C], by default zeros, stands for the frames before a clip's first frame.
        """
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
        return y_BxTxHxWxO + per_channel(self.bias[...], y_BxTxHxWxO)


def per_channel(values: Any, x: jax.Array) -> jax.Array:
    """Values [C] in x's dtype, shaped to broadcast against x [..., C]."""
    return jnp.asarray(values, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
