"""SIGTERM and SIGINT during a stage: the stage finishes its current step, saves it, and ends."""

import collections
import functools
import signal
import threading
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jsurgery.errors import Interrupted, Terminated
from jsurgery.runtime import processes

KINDS = {signal.SIGTERM: Terminated, signal.SIGINT: Interrupted}


class Preemption:
    """Inside the `with` block a signal is only noted; a second SIGINT ends the process at once.

    If any process gets a signal, all stop after the same step, except with `alone`. The signal is shared by a device
    reduction whose result is read one step later, so that no process waits.
    """

    def __init__(self, stage: str, *, alone: bool = False):
        self.stage, self.signal_number, self.agreed = stage, 0, 0
        self._together = processes.several() and not alone
        self._pending: collections.deque[jax.Array] = collections.deque()

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it there only
            # A handler that JAX installed in C++ reads as None here, and Python cannot restore it.
            self._before = {number: signal.signal(number, self._note) or signal.SIG_DFL for number in KINDS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.signal_number = max(self.signal_number, number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def should_stop(self) -> bool:
        """Whether to stop after this step. All processes must call it exactly once in every step."""
        if not self._together:
            self.agreed = self.signal_number
            return bool(self.agreed)
        self._pending.append(largest_over_processes(self.signal_number))
        if len(self._pending) > 1:
            self.agreed = int(self._pending.popleft())
        return bool(self.agreed)

    def stop_if_asked(self) -> None:
        """Raises Terminated or Interrupted if `should_stop` was true."""
        if self.agreed:
            name = signal.Signals(self.agreed).name
            raise KINDS[signal.Signals(self.agreed)](
                f"{self.stage}: stopped by {name}; its steps are saved, and the same command goes on from there"
            )


def largest_over_processes(number: int) -> jax.Array:
    """The largest `number` of all processes, int32 []. All processes must call it."""
    mesh = Mesh(np.array(jax.devices()), "devices")
    where = NamedSharding(mesh, PartitionSpec("devices"))
    numbers = jax.make_array_from_callback((mesh.size,), where, lambda index: np.full(1, number, np.int32))
    return _maximum(mesh)(numbers)


@functools.cache
def _maximum(mesh: Mesh) -> Any:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
