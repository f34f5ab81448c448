"""SIGTERM and SIGINT while a stage works: it ends after the step under way, with that step saved."""

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
    """While its `with` block runs, signals are noted only; a second SIGINT ends the process at once.

    Of several processes all stop after the same step when any is told to, unless each works `alone`. What they were
    told travels over the devices and is read when the next step has begun, so that none waits for the others.
    """

    def __init__(self, stage: str, *, alone: bool = False):
        self.stage, self.signal_number, self.agreed = stage, 0, 0
        self._together = processes.several() and not alone
        self._pending: collections.deque[jax.Array] = collections.deque()

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            # A handler of JAX's, in C++, is None here: it would not save.
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
        """Whether to stop after this step; to be asked once in each, by all processes."""
        if not self._together:
            self.agreed = self.signal_number
            return bool(self.agreed)
        self._pending.append(largest(self.signal_number))
        if len(self._pending) > 1:
            self.agreed = int(self._pending.popleft())
        return bool(self.agreed)

    def stop_if_asked(self) -> None:
        """Ends the stage if that was asked: raises Terminated or Interrupted."""
        if self.agreed:
            name = signal.Signals(self.agreed).name
            raise KINDS[signal.Signals(self.agreed)](
                f"{self.stage}: stopped by {name}; what was done is saved, and the same command goes on from there"
            )


def largest(number: int) -> jax.Array:
    """The largest of what the processes say; all must call it."""
    mesh = Mesh(np.array(jax.devices()), "devices")
    where = NamedSharding(mesh, PartitionSpec("devices"))
    told = jax.make_array_from_callback((mesh.size,), where, lambda index: np.full(1, number, np.int32))
    return _maximum(mesh)(told)


@functools.cache
def _maximum(mesh: Mesh) -> Any:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
