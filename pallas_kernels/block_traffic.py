"""The HBM traffic of a Pallas kernel on TPU, from its grid and block specs."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import pallas as pl


def block_traffic(grid: Sequence[int], specs: Sequence[pl.BlockSpec], arrays: Sequence[Any]) -> int:
    """Bytes that a kernel copies between HBM and VMEM.

    The kernel's steps run over the grid in row-major order. A block is copied in the steps whose block is not that of
    the step before, and only as far as it lies inside its array.

    Args:
        specs: of operands and results.
        arrays: their arrays or shapes, in the same order.
    """
    steps = np.indices(grid).reshape(len(grid), -1)
    total = 0
    with jax.ensure_compile_time_eval():
        for spec, array in zip(specs, arrays, strict=True):
            total += _copied_elements(spec, array.shape, steps) * array.dtype.itemsize
    return total


def _copied_elements(spec: pl.BlockSpec, shape: tuple[int, ...], steps: np.ndarray) -> int:
    assert spec.index_map is not None and spec.block_shape is not None
    index = np.stack([np.broadcast_to(np.asarray(i), steps.shape[1:]) for i in spec.index_map(*steps)])
    starts, sizes = zip(*map(_start_and_size, spec.block_shape, index), strict=True)
    inside = [np.minimum(size, length - start) for size, length, start in zip(sizes, shape, starts, strict=True)]
    changes = np.concatenate([[True], (index[:, 1:] != index[:, :-1]).any(axis=0)])
    return int(np.prod(np.stack(inside), axis=0)[changes].sum())


def _start_and_size(block: Any, index: np.ndarray) -> tuple[np.ndarray, int]:
    """Of a block along one axis. The index is that of the block, or of its first element for `pl.Element`."""
    if isinstance(block, pl.Element):
        return index, block.block_size
    size = 1 if block is None else block
    return index * size, size
