"""Errors of artefacts against JAX's reference tensors, and the check against their bounds."""

import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from jsurgery.errors import ParityError
from jsurgery.io.results import relative_error

from .formats import BOUNDS
from .parts import Part


def sample_file(folder: str | pathlib.Path, number: int, tensor: str) -> pathlib.Path:
    return pathlib.Path(folder) / "reference" / str(number) / f"{tensor}.npy"


def load_sample(folder: str | pathlib.Path, number: int, names: tuple[str, ...]) -> list[np.ndarray]:
    """The named tensors of a sample of the reference."""
    return [np.load(sample_file(folder, number, name)) for name in names]


def missing_samples(folder: str | pathlib.Path, count: int, names: Iterable[str]) -> list[int]:
    """The numbers of those of the first `count` samples that lack one of the named tensors."""
    names = list(names)
    whole = lambda number: all(sample_file(folder, number, name).exists() for name in names)
    return [number for number in range(count) if not whole(number)]


def errors(part: Part, outputs: Iterable[Any], folder: str | pathlib.Path, sample: int = 0) -> dict[str, float | None]:
    """{"relative_error", "max_error"}: the largest of the part's outputs against JAX's; None where not finite."""
    expected = load_sample(folder, sample, part.outputs)
    pairs = [(np.asarray(x, np.float32), y) for x, y in zip(outputs, expected, strict=True)]
    worst = {
        "relative_error": max(relative_error(x, y) for x, y in pairs),
        "max_error": float(max(np.abs(x - y).max() for x, y in pairs)),
    }
    return {name: error if math.isfinite(error) else None for name, error in worst.items()}  # JSON has no NaN


def parity_rows(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each measured artefact, and one for the torch module behind it: errors, bound, "passed"."""
    rows = []
    for record in records:
        measured = {(record["format"], record["precision"]): record, ("torch", "float32"): record.get("torch")}
        for (format, precision), measurement in measured.items():
            if not measurement or "relative_error" not in measurement:
                continue
            bound = BOUNDS[format, precision]
            row = {"part": record["part"], "format": format, "precision": precision}
            row |= {"chip": record["chip"]} if "chip" in record and format != "torch" else {}
            error = measurement["relative_error"]
            row |= {"relative_error": error, "max_error": measurement["max_error"], "bound": bound}
            row["passed"] = error is not None and error <= bound
            if row not in rows:
                rows.append(row)
    return rows


def check_parity(rows: Iterable[dict[str, Any]], file: str | pathlib.Path) -> None:
    """Raises ParityError that names the three worst rows that exceed their bounds. `file` is where all rows are."""
    breached = [row for row in rows if not row["passed"]]
    if breached:
        size = lambda row: math.inf if row["relative_error"] is None else row["relative_error"]
        worst = [
            f"{row['format']} {row['part']} {row['precision']} {size(row):.1e} > {row['bound']:.0e}"
            for row in sorted(breached, key=lambda row: -size(row) / row["bound"])
        ]
        more = f" and {len(worst) - 3} more" if len(worst) > 3 else ""
        raise ParityError(f"{file}: {'; '.join(worst[:3])}{more}")
