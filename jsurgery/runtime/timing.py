"""Seconds of programs that take turns, so that a machine that slows down slows all of them."""

import time
from collections.abc import Callable
from typing import Any

from jsurgery.runtime.progress import Progress


def alternate(programs: list[Callable[[], Any]], runs: int, label: str = "bench") -> list[list[float]]:
    """Seconds of the `runs` runs of each program. Every round runs each program once; `label` is shown with progress.

    A round before the first, in which programs compile or warm up, is not timed.
    """
    seconds: list[list[float]] = [[] for _ in programs]
    for run in programs:
        run()
    for _ in Progress(label, runs).over(range(runs)):
        for run, times in zip(programs, seconds, strict=True):
            times.append(timed(run)[0])
    return seconds


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """(seconds, result) of one call, which must return when its result is there."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result
