"""python -m jsurgery.bench.gpu_evidence --minutes=10 --output=DIR: sends rows to a worker and writes its results."""

import argparse
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from jsurgery.bench.gpu_evidence.report import TOY_NOTE, Report, line, summary
from jsurgery.bench.gpu_evidence.rows import FULL, TOY, Row, all_rows
from jsurgery.bench.gpu_evidence.worker import work

# A row is stopped after PATIENCE times its allowance plus WARM_UP seconds. The first row of a kind also imports modules
# and makes inputs.
PATIENCE, WARM_UP = 3, 30
START = 180.0  # seconds in which a worker must start: CUDA libraries load slowly from a cold disk
# Toy programs run only three times: optimising them would take longer than it saves.
TOY_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)


class Worker:
    """A process that measures. If it dies or takes too long it is killed, and the next row starts a new one."""

    def __init__(self, toy: bool):
        self.toy = toy
        self.process: BaseProcess | None = None
        self.connection: Connection | None = None

    def start(self, seconds: float) -> dict[str, Any]:
        """Starts the process. Returns its header, or {"failed": the reason}."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.toy))
        self.process.start()
        theirs.close()
        header = self.receive(min(seconds, START))
        return {"failed": header["missing"]} if "missing" in header else header

    def ask(self, row: Row, seconds: float, left: Callable[[], float]) -> dict[str, Any]:
        """The result of a row, or {"missing": the reason} if there is none within `seconds` or the time `left()`."""
        if self.connection is None:
            header = self.start(left())
            if header.get("on_gpu", self.toy) == self.toy:
                self.stop()
                return {"missing": header.get("failed", "the GPU is gone")}
        assert self.connection is not None
        try:
            self.connection.send(row)
        except OSError:
            return self.receive(0)
        result = self.receive(min(left(), seconds))
        if result.pop("lost", False):
            self.stop()
        return result

    def receive(self, seconds: float) -> dict[str, Any]:
        """The worker's next message. {"missing": the reason} if it sends none in time or has ended."""
        assert self.connection is not None and self.process is not None
        try:
            if self.connection.poll(max(seconds, 0)):
                return self.connection.recv()
            reason = f"it was stopped after {max(seconds, 0):.0f} s"
        except (EOFError, OSError):
            self.process.join(10)
            reason = f"the process that measured it ended with exit code {self.process.exitcode}"
        self.stop()
        return {"missing": reason}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join(10)
        self.process = self.connection = None


def begin(toy: bool, left: Callable[[], float]) -> tuple[Worker, dict[str, Any]]:
    """A worker and its header; without a GPU it measures at toy sizes. "failed" in the header: it does not start."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to torch on the same GPU
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a killed worker would leave compile processes behind
    if not toy:
        worker = Worker(toy=False)
        header = worker.start(left())
        if header.get("on_gpu") is not False:
            return worker, header
        worker.stop()
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{TOY_FLAGS} {os.environ.get('XLA_FLAGS', '')}"}
    worker = Worker(toy=True)
    return worker, worker.start(left()) | {"note": TOY_NOTE}


def gather(folder: pathlib.Path, minutes: float, toy: bool) -> int:
    """Measures rows until all are done or the time is up. Exit code 1: a kernel test failed, or no row was measured."""
    began = time.monotonic()
    left = lambda: began + 60 * minutes - time.monotonic()
    worker, header = begin(toy, left)
    scale = TOY if worker.toy else FULL
    rows = all_rows(scale)
    report = Report(folder, rows, {"minutes": minutes, "sizes": scale.shown(), **header})
    if worker.toy:
        print(TOY_NOTE, flush=True)
    try:
        for index, row in enumerate(rows):
            result = {"missing": header["failed"]} if "failed" in header else ask_in_time(worker, row, left)
            report.add(index, result)
            print(line(row, result), flush=True)
    finally:
        worker.stop()
    seconds = time.monotonic() - began
    report.end(seconds)
    counts = summary(report)
    print(f"\n{report.markdown.read_text()}")
    totals = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{totals}, in {seconds:.0f} s: {report.json}, {report.markdown}", flush=True)
    return int(counts["failed"] > 0 or counts["measured"] == 0)


def ask_in_time(worker: Worker, row: Row, left: Callable[[], float]) -> dict[str, Any]:
    """The result of a row, which is not begun with less time left than its allowance."""
    if left() < row.seconds:
        return {"missing": f"time was up: {max(left(), 0):.0f} s were left of what may take {row.seconds:g} s"}
    return worker.ask(row, WARM_UP + PATIENCE * row.seconds, left)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jsurgery.bench.gpu_evidence", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of wall time, compilation included")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/gpu_evidence"), help="folder")
    parser.add_argument("--toy", action="store_true", help="tiny sizes on the CPU, as without a GPU")
    options = parser.parse_args()
    return gather(options.output, options.minutes, options.toy)


if __name__ == "__main__":
    sys.exit(main())
