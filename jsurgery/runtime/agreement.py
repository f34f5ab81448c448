"""A number that all processes of a run know, though it is one process's alone, without any of them waiting."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Agreement:
    """The largest of the processes' numbers of a step, shared by a device reduction that is read one step later.

    Unless `together`, each process takes its own number, at once.
    """

    def __init__(self, together: bool):
        self.together = together
        self._pending: collections.deque[jax.Array] = collections.deque()

    def largest(self, number: int) -> int:
        """The largest number of the step before, 0 in the first. All processes must call it once in every step."""
        if not self.together:
            return number
        self._pending.append(_largest_over_processes(number))
        return int(self._pending.popleft()) if len(self._pending) > 1 else 0

    def forget(self) -> None:
        """Drops the numbers of the step before. All processes must call it after the same step."""
        self._pending.clear()


def _largest_over_processes(number: int) -> jax.Array:
    """The largest `number` of all processes, int32 []. All processes must call it."""
    mesh = Mesh(np.array(jax.devices()), "devices")
    where = NamedSharding(mesh, PartitionSpec("devices"))
    numbers = jax.make_array_from_callback((mesh.size,), where, lambda index: np.full(1, number, np.int32))
    return _maximum(mesh)(numbers)


@functools.cache
def _maximum(mesh: Mesh) -> Any:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
