"""Numbers that are not finite outside of training: a scalar tells, and only then are they traced to a tensor."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsurgery.errors import InputError
from jsurgery.runtime.guard import describe_non_finite, non_finite


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether all numbers of the arrays are finite: a bool [] on the device, computed without a copy of any."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def is_finite(array: np.ndarray) -> bool:
    """The same for an array on the host, without an array of flags as large as a fourth of it."""
    return math.isfinite(array.sum(dtype=np.float64)) or bool(np.isfinite(array).all())


def check_finite(array: np.ndarray, what: str) -> None:
    """Raises InputError, which says `what` holds numbers that are not finite, and where the first of them is."""
    if not is_finite(array):
        index = np.argwhere(~np.isfinite(array))[0].tolist()
        raise InputError(f"{what}: not finite, first at {index} of {list(array.shape)}; nothing is written of it")


def in_half(array: np.ndarray, what: str) -> np.ndarray:
    """The array in float16, as shards store it. Raises InputError where a number is too large for it, or not finite."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        largest = f"at most {np.finfo(np.float16).max:.0f} in size"
        raise InputError(f"{what}: expected numbers {largest}, found {np.abs(array).max():.4g}; they are not written")
    return half


def describe_weights(state: Any) -> str:
    """The names of those of a model's weights that are not finite, or that all are finite."""
    names = describe_non_finite(jax.jit(non_finite)(state))
    return f"weights {names} are not finite" if names else "all weights are finite, so they overflow"
