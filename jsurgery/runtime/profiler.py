"""A profiler trace of some steps of a stage, for TensorBoard's profiler, XProf or Perfetto."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
from etils import epath

from jsurgery.runtime import processes


class Profiler:
    """Traces `steps` steps into `folder`, from the second step on, because the first one compiles.

    With several processes, process 0 alone traces. The caller sets `result` to the arrays of each step, so that the
    trace can end when those of its last step are computed.
    """

    def __init__(self, folder: epath.PathLike | None, steps: int):
        self.folder, self.steps = folder, steps if folder is not None and processes.is_first() else 0
        self.result: Any = None

    def over(self, steps: Iterable[int]) -> Iterator[int]:
        tracing = False
        for number, step in enumerate(steps):
            if number == 1 and self.steps:
                jax.block_until_ready(self.result)
                jax.profiler.start_trace(str(self.folder))
                tracing = True
            yield step
            if tracing and number == self.steps:
                tracing = self._end()
        if tracing:
            self._end()

    def _end(self) -> bool:
        jax.block_until_ready(self.result)
        jax.profiler.stop_trace()
        return False
