"""SIGTERM and SIGINT during a stage: the stage finishes its current step, saves it, and ends."""

import signal
import threading
from typing import Any, Self

from jsurgery.errors import Interrupted, Terminated
from jsurgery.runtime import processes
from jsurgery.runtime.agreement import Agreement

KINDS = {signal.SIGTERM: Terminated, signal.SIGINT: Interrupted}


class Preemption:
    """Inside the `with` block a signal is only noted; a second SIGINT ends the process at once.

    If any process gets a signal, all stop together, after the next step; with `alone`, each stops by itself.
    """

    def __init__(self, stage: str, *, alone: bool = False):
        self.stage, self.signal_number, self.agreed = stage, 0, 0
        self._signals = Agreement(processes.several() and not alone)

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
        self.agreed = self._signals.largest(self.signal_number)
        return bool(self.agreed)

    def stop_if_asked(self) -> None:
        """Raises Terminated or Interrupted if `should_stop` was true."""
        if self.agreed:
            name = signal.Signals(self.agreed).name
            raise KINDS[signal.Signals(self.agreed)](
                f"{self.stage}: stopped by {name}; its steps are saved, and the same command goes on from there"
            )
