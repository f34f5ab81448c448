"""Results of measurements: as JSON, as Markdown, and what they were measured on."""

import importlib
import importlib.metadata
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
from jsurgery.io.files import write_json


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """A table in Markdown; with `numbers` all columns but the first are aligned to the right."""
    line = lambda cells: "| " + " | ".join(cells) + " |"
    rule = "|---" + ("|---:" if numbers else "|---") * (len(header) - 1) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def xla_threads() -> int:
    """The threads that XLA computes with on the CPU."""
    if "--xla_cpu_multi_thread_eigen=false" in os.environ.get("XLA_FLAGS", ""):
        return 1
    schedulable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(os.environ.get("NPROC") or schedulable or 1)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def processor() -> str:
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))


def si_prefix(value: float) -> tuple[str, float]:
    """The largest prefix in which this is at least 1."""
    return next(prefix for prefix in PREFIXES if value >= prefix[1] or prefix[1] == 1)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|, Euclidean norms in float64; infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return math.inf
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def check_report(path: str | None) -> None:
    """Raises InputError where `--json=path` could not be written at the end."""
    if path is not None and (pathlib.Path(path).is_dir() or not pathlib.Path(path).resolve().parent.is_dir()):
        raise InputError(f"--json={path}: expected a file in a folder that exists")


def publish(result: dict[str, Any], path: str | None) -> None:
    """The result as JSON to standard output, and to a file if one is named."""
    print(json.dumps(result, indent=2), flush=True)
    if path is not None:
        write_json(epath.Path(path), result)
