"""Seconds of programs that take turns."""

import time
from collections.abc import Callable
from typing import Any

from jsurgery.runtime.progress import say


def alternate(programs: list[Callable[[], Any]], runs: int) -> list[list[float]]:
    """Seconds of every run of every program, one run of each in turn."""
    seconds: list[list[float]] = [[] for _ in programs]
    for run in programs:
        run()
    for number in range(1, runs + 1):
        say(f"bench: run {number} of {runs}")
        for run, times in zip(programs, seconds, strict=True):
            times.append(timed(run))
    return seconds


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
