"""Messages of a running stage on stderr, among them a progress line with its rate and the remaining time."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from jsurgery.runtime import processes


def say(message: str) -> None:
    """Prints to stderr; with several processes, process 0 alone does."""
    if processes.is_first():
        print(message, file=sys.stderr, flush=True)


class Progress:
    """Iterates over steps and reports progress: on one line of a terminal, or every ten seconds as a line of a log.

    With several processes, process 0 alone reports.
    """

    def __init__(self, name: str, total: int, start: int = 0):
        self.name, self.total, self.start = name, total, start
        self.began = self.shown = time.monotonic()
        self.note = ""

    def over(self, steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            yield step
            self.show(step + 1)
        self.show(self.total, last=True)

    def during(self, done: int, count: int, steps: int) -> Callable[[int], None]:
        """A function that shows how many of `steps` are done, which together make the next `count` after `done`."""
        return lambda step: self.show(done + count * step / steps)

    def show(self, done: float, last: bool = False) -> None:
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if not processes.is_first() or (not last and now - self.shown < (0.2 if terminal else 10.0)):
            return
        self.shown = now
        elapsed = max(now - self.began, 1e-9)
        rate = (done - self.start) / elapsed
        time_left = f"ETA {clock((self.total - done) / rate)}" if rate and not last else f"took {clock(elapsed)}"
        speed = f"{rate:.2f}/s" if rate >= 1 or not rate else f"{1 / rate:.2f} s each"
        count = f"{done:.2f}" if isinstance(done, float) else str(done)
        line = f"{self.name}: {count}/{self.total}  {speed}  {time_left}  {self.note}".rstrip()
        print(f"\r\x1b[K{line}" if terminal else line, file=sys.stderr, end="" if terminal and not last else "\n")
        sys.stderr.flush()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
