"""Sums over many pieces of work, kept in a small file, so that a run that was interrupted adds the missing pieces."""

from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from jsurgery.io.files import read_object, write_json
from jsurgery.runtime import processes
from jsurgery.runtime.finite import check_finite
from jsurgery.runtime.preemption import Preemption
from jsurgery.runtime.progress import Progress


class ResumableSums:
    """Sums that a `stage` keeps in the file `path` until it is done.

    `made_with`, a JSON value, names what the sums depend on: those of a file made with anything else are not used.
    With several processes, all work on every piece, and process 0 reads and writes the file.
    """

    def __init__(self, path: epath.Path, stage: str, made_with: Any):
        self.path, self.stage, self.made_with = path, stage, made_with
        self.saved: dict[str, Any] = processes.on_first(self._read)

    def add_up(
        self, name: str, pieces: int, measure: Callable[[int], dict[str, np.ndarray]], *, save_every: int = 1
    ) -> dict[str, np.ndarray]:
        """The float64 sums of the arrays that `measure(number)` returns, over all numbers below `pieces`, in order.

        The file is written after every `save_every` pieces. Raises Terminated or Interrupted at a signal, after the
        current piece, with the sums saved, and InputError for a number that is not finite, with those before it saved.
        """
        begun = self.saved.get(name, {"done": 0, "sums": {}})
        done, sums = begun["done"], {key: np.asarray(values) for key, values in begun["sums"].items()}
        progress = Progress(name, pieces, done)
        with Preemption(self.stage) as preemption:
            for number in progress.over(range(done, pieces)):
                for key, values in measure(number).items():
                    check_finite(np.asarray(values), f"{self.stage}: {name}: `{key}` of piece {number + 1} of {pieces}")
                    sums[key] = sums.get(key, 0.0) + np.asarray(values, np.float64)
                done = number + 1
                if preemption.should_stop() or done % save_every == 0 or done == pieces:
                    self.saved[name] = {"done": done, "sums": {key: values.tolist() for key, values in sums.items()}}
                    processes.on_first(self._write)
                preemption.stop_if_asked()
        return sums

    def remove(self) -> None:
        """Removes the file, once the results are written elsewhere."""
        processes.on_first(lambda: self.path.unlink(missing_ok=True))

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        content = read_object(self.path, "the sums of an interrupted run")
        return content["sums"] if content.get("made_with") == self.made_with else {}

    def _write(self) -> None:
        write_json(self.path, {"made_with": self.made_with, "sums": self.saved}, indent=None)
