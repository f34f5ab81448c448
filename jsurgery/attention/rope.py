"""Rotary position embedding over a (time, height, width) grid of tokens, as in Wan2.1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jsurgery.errors import InputError

THETA = 10_000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """A head's channels for time, height and width. Height and width get a third each, rounded down to even."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


@functools.lru_cache(maxsize=16)
def rope_tables(
    grid: tuple[int, int, int], head_dim: int, max_len: int = 1024, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, two float32 arrays [N, head_dim / 2] for the tokens of `grid` in natural (row-major) order.

    The angles are computed in float64, as in the original model. The grid's frames are those of a video from number
    `first` on. Raises InputError if an axis, up to the grid's end, is longer than `max_len`.
    """
    check_grid((first + grid[0], *grid[1:]), max_len)
    angles = []
    for axis, (length, width) in enumerate(zip(grid, axis_widths(head_dim), strict=True)):
        frequencies = THETA ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        start = first if axis == 0 else 0
        angle = np.arange(start, start + length, dtype=np.float64)[:, None] * frequencies
        shape = [1, 1, 1, width // 2]
        shape[axis] = length
        angles.append(np.broadcast_to(angle.reshape(shape), (*grid, width // 2)))
    angle_NxE = np.concatenate(angles, axis=-1).reshape(-1, head_dim // 2)
    return np.cos(angle_NxE).astype(np.float32), np.sin(angle_NxE).astype(np.float32)


def check_grid(grid: tuple[int, int, int], max_len: int = 1024) -> None:
    """Raises InputError if an axis of the token grid is longer than `max_len`."""
    for axis, length in zip(("time", "height", "width"), grid, strict=True):
        if length > max_len:
            raise InputError(f"token grid: the {axis} axis has {length} positions, RoPE's table holds {max_len}")


def apply_rope(x_BxNxHxD: jax.Array, cos_NxE: jax.Array, sin_NxE: jax.Array) -> jax.Array:
    """Rotates the channel pairs (0, 1), (2, 3), ... of every head by its token's angles; E = D / 2."""
    pairs = x_BxNxHxD.reshape(*x_BxNxHxD.shape[:-1], -1, 2)
    real, imag = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_NxE[None, :, None, :], sin_NxE[None, :, None, :]
    rotated = jnp.stack([real * cos - imag * sin, real * sin + imag * cos], axis=-1)
    return rotated.reshape(x_BxNxHxD.shape).astype(x_BxNxHxD.dtype)
