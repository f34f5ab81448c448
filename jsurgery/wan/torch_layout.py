"""Fills NNX modules from a torch checkpoint, and writes them out as one, where attribute paths are tensor names.

A module *mirrors* a checkpoint if the path of each parameter is the tensor's name ("encoder.down_blocks.0.conv1"). Only
the leaves differ: NNX has kernels, input-first and channels last; torch has weights, output-first.
"""

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

# The number of a weight's axes -> torch's axes in NNX's order: of linear layers, 2-D and 3-D convolutions.
_KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}

# NNX's name of a leaf -> torch's; other names are the same.
_LEAF_NAMES = {"kernel": "weight", "embedding": "weight"}


def mirrored_tensors(module: nnx.Module) -> dict[str, np.ndarray]:
    """The module's parameters under the checkpoint's names and in torch's layout."""
    return {name: _to_torch(leaf, np.asarray(param[...])) for name, leaf, param in _mirrored_params(module)}


def mirrored_shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The names and shapes of `mirrored_tensors`. The module may be abstract (see `abstract_module`)."""
    # An array without memory of its own, to find the shape in torch's layout.
    stand_in = lambda param: np.broadcast_to(0, param.shape)
    return {name: _to_torch(leaf, stand_in(param)).shape for name, leaf, param in _mirrored_params(module)}


def load_mirrored(
    module: nnx.Module,
    tensors: Tensors,
    *,
    dtype: jnp.dtype | None = None,
    source: epath.PathLike = "weights",
) -> None:
    """Fills the module in place; it may be abstract (see `abstract_module`).

    Parameters keep their sharding, if they have any, and their dtype, unless `dtype` is given.
    Raises InputError, naming `source`, with the missing, unexpected and mis-shaped tensors; nothing is filled then.
    """
    check_fit(mirrored_shapes(module), tensors, source)
    for name, leaf, param in _mirrored_params(module):
        fill(param, [tensors[name]], functools.partial(_from_torch, leaf), stacked=False, dtype=dtype)


def set_mirrored(module: nnx.Module, arrays: Mapping[str, jax.Array], dtype: jnp.dtype) -> None:
    """Sets the module's parameters to arrays that have the checkpoint's names and torch's layout; for use under jit."""
    for name, leaf, param in _mirrored_params(module):
        param.set_value(_from_torch(leaf, arrays[name]).astype(dtype))


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
    """Sets `param` to its only source, or with `stacked` to all sources on a new first axis.

    `param` keeps its sharding, and its dtype unless `dtype` is given. Sources are read if a part of them lies on this
    process's devices, and then once.
    """
    shape, dtype, value = param.shape, np.dtype(dtype or param.dtype), param.get_value()
    placed = not isinstance(value, jax.Array) or value.committed
    sharding = value.sharding if placed else None
    read: Callable[[int], np.ndarray] = lambda number: np.asarray(sources[number])
    if sharding is not None and len(sharding.addressable_devices) > 1:
        read = functools.cache(read)  # devices take slices of the same sources

    def part(index: Any) -> np.ndarray:
        filled = _aligned(np.broadcast_to(0, shape)[index].shape, dtype)
        if not stacked:
            _copy(filled, from_torch(read(0))[index])
        else:
            for row, number in zip(filled, range(len(sources))[index[0]], strict=True):
                _copy(row, from_torch(read(number))[index[1:]])
        return filled

    if sharding is not None:
        param.set_value(jax.make_array_from_callback(shape, sharding, part))
    else:
        param.set_value(jax.device_put(part((slice(None),) * len(shape))))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array, aligned to 64 bytes: JAX on CPU uses such an array without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source; a transpose in strips, which stay in the cache and make it several times faster."""
    if source.ndim < 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, source.shape[-1], 256):
        target[..., start : start + 256] = source[..., start : start + 256]


def _mirrored_params(module: nnx.Module) -> list[tuple[str, str, nnx.Param]]:
    """(tensor name, NNX's name of the leaf, parameter) for each parameter."""
    params = []
    for (*path, leaf), param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        name = ".".join(map(str, (*path, _LEAF_NAMES.get(str(leaf), leaf))))
        params.append((name, str(leaf), param))
    return params


def _to_torch(leaf: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(np.argsort(_KERNEL_AXES[array.ndim])) if leaf == "kernel" else array


def _from_torch(leaf: str, array: Any) -> Any:
    return array.transpose(_KERNEL_AXES[array.ndim]) if leaf == "kernel" else array
