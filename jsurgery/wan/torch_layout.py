"""NNX modules filled from a torch checkpoint and written out as one, where attribute paths are tensor names."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from jsurgery.errors import InputError
from jsurgery.io.safetensors import LazyTensor, Tensors

# A torch weight's axes in the order in which NNX keeps them, by their number: linear, 2-D and 3-D convolution.
_KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}

_LEAF_NAMES = {"kernel": "weight", "embedding": "weight"}


def mirrored_tensors(module: nnx.Module) -> dict[str, np.ndarray]:
    """The module's parameters under the reference library's names and layouts."""
    return {name: _to_torch(leaf, np.asarray(param[...])) for name, leaf, param in _mirrored_params(module)}


def mirrored_shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The names and shapes of `mirrored_tensors`, also of an abstract module."""
    # A stand-in without memory: only the shape in the reference's layout is wanted.
    stand_in = lambda param: np.broadcast_to(0, param.shape)
    return {name: _to_torch(leaf, stand_in(param)).shape for name, leaf, param in _mirrored_params(module)}


def load_mirrored(
    module: nnx.Module,
    tensors: Tensors,
    *,
    dtype: jnp.dtype | None = None,
    source: epath.PathLike = "weights",
) -> None:
    """Fills the module, which may be abstract (from nnx.eval_shape), in place.

    Parameters keep their sharding, if they have one, and their dtype, unless `dtype` is given.
    Raises InputError, naming `source`, with the missing, unexpected and mis-shaped tensors; nothing is then filled.
    """
    check_fit(mirrored_shapes(module), tensors, source)
    for name, leaf, param in _mirrored_params(module):
        fill(param, [tensors[name]], functools.partial(_from_torch, leaf), stacked=False, dtype=dtype)


def check_fit(expected: Mapping[str, tuple[int, ...]], tensors: Tensors, source: epath.PathLike) -> None:
    """Raises InputError with the missing, unexpected and mis-shaped tensors: the first 20, and how many more."""
    problems = [f"missing {name} {expected[name]}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected {name} {tuple(tensors[name].shape)}" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} should be {shape}, is {tuple(tensors[name].shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        listed = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError(f"{source}: {len(problems)} tensors do not fit: {listed}")


def fill(
    param: nnx.Param,
    sources: Sequence[np.ndarray | LazyTensor],
    from_torch: Callable[[np.ndarray], np.ndarray],
    *,
    stacked: bool,
    dtype: jnp.dtype | None = None,
) -> None:
    """Sets `param` to the one source, or with `stacked` to all on a new first axis, in its sharding and dtype.

    Sources are read one at a time, and only for the parts that lie on this process's devices.
    """
    shape, dtype = param.shape, np.dtype(dtype or param.dtype)

    def part(index: Any) -> np.ndarray:
        filled = _aligned(np.broadcast_to(0, shape)[index].shape, dtype)
        if not stacked:
            _copy(filled, from_torch(np.asarray(sources[0]))[index])
        else:
            for row, source in zip(filled, sources[index[0]], strict=True):
                _copy(row, from_torch(np.asarray(source))[index[1:]])
        return filled

    value = param.get_value()
    placed = not isinstance(value, jax.Array) or value.committed
    if placed and value.sharding is not None:
        param.set_value(jax.make_array_from_callback(shape, value.sharding, part))
    else:
        param.set_value(jax.device_put(part((slice(None),) * len(shape))))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX on a CPU takes as it is, where it would copy one at another address."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, in strips when that is a transpose: several times faster, as strips stay in the cache."""
    if source.ndim < 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, source.shape[-1], 256):
        target[..., start : start + 256] = source[..., start : start + 256]


def _mirrored_params(module: nnx.Module) -> list[tuple[str, str, nnx.Param]]:
    """(reference name, NNX leaf name, parameter) for each parameter."""
    params = []
    for (*path, leaf), param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        name = ".".join(map(str, (*path, _LEAF_NAMES.get(str(leaf), leaf))))
        params.append((name, str(leaf), param))
    return params


def _to_torch(leaf: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(np.argsort(_KERNEL_AXES[array.ndim])) if leaf == "kernel" else array


def _from_torch(leaf: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(_KERNEL_AXES[array.ndim]) if leaf == "kernel" else array
