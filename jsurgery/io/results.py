"""Results of measurements: written as JSON or Markdown, and described by machine and package versions."""

import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.files import check_writable, write_json

PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """A table in Markdown. With `numbers` all columns but the first are aligned to the right."""
    line = lambda cells: "| " + " | ".join(cells) + " |"
    rule = "|---" + ("|---:" if numbers else "|---") * (len(header) - 1) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def format_ranges(numbers: Iterable[int], dash: str = "-", separator: str = ",") -> str:
    """(0, 1, 2, 5) -> "0-2,5"."""
    runs = itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return separator.join(f"{run[0]}{dash}{run[-1]}" if len(run) > 1 else str(run[0]) for run in ends)


def xla_threads() -> int:
    """The number of threads that XLA computes with on the CPU."""
    if "--xla_cpu_multi_thread_eigen=false" in os.environ.get("XLA_FLAGS", ""):
        return 1
    schedulable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(os.environ.get("NPROC") or schedulable or 1)


def peak_bytes() -> int:
    """The most memory that this process has used so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def processor() -> str:
    """The name of this machine's CPU."""
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def si_prefix(value: float) -> tuple[str, float]:
    """The largest SI prefix in which `value` is at least 1, and its factor; no prefix for smaller values."""
    return next(prefix for prefix in PREFIXES if value >= prefix[1] or prefix[1] == 1)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs| in Euclidean norms, computed in float64; infinite if the shapes differ."""
    if ours.shape != theirs.shape:
        return math.inf
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package, or a remark that it is not installed."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed as a package"

    return {package: version(package) for package in packages}


def check_report(path: str | None) -> None:
    """Raises InputError if `--json=path` cannot be written: to be called before the work, not after it."""
    if path is None:
        return
    if "://" not in path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(os.path.abspath(path)))):
        raise InputError(f"--json={path}: expected a file in a folder that exists")
    check_writable(path, "--json")


def publish(result: dict[str, Any], path: str | None) -> None:
    """Writes the result as JSON to standard output, and to `path` if it is given."""
    print(json.dumps(result, indent=2), flush=True)
    if path is not None:
        write_json(epath.Path(path), result)
