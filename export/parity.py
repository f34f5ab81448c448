"""How far an artefact may be from JAX, and how far it is."""

import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from jsurgery.errors import ParityError

from .formats import BOUNDS
from .parts import Part


def sample_file(folder: str | pathlib.Path, number: int, tensor: str) -> pathlib.Path:
    return pathlib.Path(folder) / "reference" / str(number) / f"{tensor}.npy"


def load_sample(folder: str | pathlib.Path, number: int, names: tuple[str, ...]) -> list[np.ndarray]:
    """Named tensors of one sample."""
    return [np.load(sample_file(folder, number, name)) for name in names]


def missing_samples(folder: str | pathlib.Path, count: int) -> list[int]:
    """Which of the first `count` samples are not there."""
    return [number for number in range(count) if not (pathlib.Path(folder) / "reference" / str(number)).exists()]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """|actual - expected| / |expected|, Euclidean norms in float64."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def errors(part: Part, made: Iterable[Any], folder: str | pathlib.Path, sample: int = 0) -> dict[str, float | None]:
    """{"relative_error", "max_error"} of a part's outputs against JAX's, the worst of them."""
    expected = load_sample(folder, sample, part.outputs)
    pairs = [(np.asarray(x, np.float32), y) for x, y in zip(made, expected, strict=True)]
    found = {
        "relative_error": max(relative_error(x, y) for x, y in pairs),
        "max_error": float(max(np.abs(x - y).max() for x, y in pairs)),
    }
    return {name: error if math.isfinite(error) else None for name, error in found.items()}  # JSON has no other word


def parity_rows(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every measured artefact: its errors, the bound, whether it holds."""
    rows = []
    for record in records:
        measured = {(record["format"], record["precision"]): record, ("torch", "float32"): record.get("torch")}
        for (format, precision), found in measured.items():
            if not found or "relative_error" not in found:
                continue
            bound = BOUNDS[format, precision]
            row = {"part": record["part"], "format": format, "precision": precision}
            row |= {"chip": record["chip"]} if "chip" in record and format != "torch" else {}
            error = found["relative_error"]
            row |= {"relative_error": error, "max_error": found["max_error"], "bound": bound}
            row["passed"] = error is not None and error <= bound
            if row not in rows:
                rows.append(row)
    return rows


def check_parity(rows: Iterable[dict[str, Any]], file: str | pathlib.Path) -> None:
    """Raises ParityError naming what is over its bound."""
    wrong = [row for row in rows if not row["passed"]]
    if wrong:
        size = lambda row: math.inf if row["relative_error"] is None else row["relative_error"]
        worst = [
            f"{row['format']} {row['part']} {row['precision']} {size(row):.1e} > {row['bound']:.0e}"
            for row in sorted(wrong, key=lambda row: -size(row) / row["bound"])
        ]
        more = f" and {len(worst) - 3} more" if len(worst) > 3 else ""
        raise ParityError(f"{file}: {'; '.join(worst[:3])}{more}")
