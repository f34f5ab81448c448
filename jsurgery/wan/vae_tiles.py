"""Runs the VAE on overlapping tiles of large frames and blends the tiles where they overlap."""

import dataclasses
from collections.abc import Callable

import numpy as np

from jsurgery.errors import InputError


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of the tiles, and the distances from one to the next, in pixels; the defaults are those of diffusers."""

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


def in_tiles(
    function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, tiling: Tiling | None, *, unit: int, result_unit: int
) -> np.ndarray:
    """Runs `function` on tiles of x [B, T, H, W, C] and blends each into the tiles above and to its left, as diffusers.

    `unit` and `result_unit` are the sides, in pixels, of one element of x and of the result: 8 for latents. Without a
    tiling, or if one tile holds all of x, `function` runs once.
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
    """`tile`, whose first `overlap` elements along `axis` fade in over the last `overlap` elements of `before`."""
    overlap = min(overlap, before.shape[axis], tile.shape[axis])
    share = np.linspace(0, 1, overlap, endpoint=False, dtype=np.float32)
    share = share.reshape([-1 if i == axis else 1 for i in range(tile.ndim)])
    fading_out = np.split(before, [before.shape[axis] - overlap], axis)[1]
    fading_in, rest = np.split(tile, [overlap], axis)
    return np.concatenate([(1 - share) * fading_out + share * fading_in, rest], axis)
