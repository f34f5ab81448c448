"""python -m jsurgery.bench.gpu_evidence --minutes=10 --output=DIR: plans, asks the worker, writes every row at once."""

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

# A row is given up after so many times its allowance, and seconds: the first of a kind also imports and makes inputs.
PATIENCE, WARM_UP = 3, 30
START = 180.0  # seconds until a worker has to have started: from a cold disk, libraries of CUDA take a while
# Toy programs run thrice: compilers need not try hard.
TOY_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)


class Worker:
    """A process that measures. One that dies or takes too long is ended, and the next row gets a new one."""

    def __init__(self, toy: bool):
        self.toy = toy
        self.process: BaseProcess | None = None
        self.connection: Connection | None = None

    def start(self, seconds: float) -> dict[str, Any]:
        """Its header, or {"failed": the reason}."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.toy))
        self.process.start()
        theirs.close()
        header = self.receive(min(seconds, START))
        return {"failed": header["missing"]} if "missing" in header else header

    def ask(self, row: Row, seconds: float, left: Callable[[], float]) -> dict[str, Any]:
        """What was found of a row within `seconds`, or {"missing": the reason}."""
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
        found = self.receive(min(left(), seconds))
        if found.pop("lost", False):
            self.stop()
        return found

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next message; {"missing": the reason} where there is none within these seconds, or never will be."""
        assert self.connection is not None and self.process is not None
        try:
            if self.connection.poll(max(seconds, 0)):
                return self.connection.recv()
            told = f"it was stopped after {max(seconds, 0):.0f} s"
        except (EOFError, OSError):
            self.process.join(10)
            told = f"the process that measured it ended with exit code {self.process.exitcode}"
        self.stop()
        return {"missing": told}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join(10)
        self.process = self.connection = None


def begin(toy: bool, left: Callable[[], float]) -> tuple[Worker, dict[str, Any]]:
    """A worker and its header; without a GPU one of toys. With "failed" in the header nothing can be measured."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch works on the same GPU
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes that a killed worker leaves behind
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
    """Measures rows until all are or the time is up. The exit code: 1 if a kernel failed its test or nothing ran."""
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
            found = {"missing": header["failed"]} if "failed" in header else ask_in_time(worker, row, left)
            report.add(index, found)
            print(line(row, found), flush=True)
    finally:
        worker.stop()
    seconds = time.monotonic() - began
    report.end(seconds)
    counts = summary(report)
    print(f"\n{report.markdown.read_text()}")
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{told}, in {seconds:.0f} s: {report.json}, {report.markdown}", flush=True)
    return int(counts["failed"] > 0 or counts["measured"] == 0)


def ask_in_time(worker: Worker, row: Row, left: Callable[[], float]) -> dict[str, Any]:
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
