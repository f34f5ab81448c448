"""Means, deviations and bootstrap intervals of scores."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000

MeanAndStd = tuple[float, float]  # mean and standard deviation over seeds


def mean_and_std(values: Sequence[float]) -> MeanAndStd:
    """(mean, sample standard deviation); a deviation of 0 for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=min(1, len(values) - 1)))


def fact(values: Sequence[float]) -> MeanAndStd | float:
    """What does not depend on the seed is a number."""
    return values[0] if len(set(values)) == 1 else mean_and_std(values)


def paired_difference(a: Sequence[ArrayLike], b: Sequence[ArrayLike], resamples: int = RESAMPLES) -> dict[str, float]:
    """mean(a - b) over the items of all seeds, [seeds][items], with a 95 % bootstrap interval.

    Items (prompts, or blocks) are resampled in pairs within each seed.
    """
    differences = [np.subtract(x, y) for x, y in zip(a, b, strict=True)]
    rng, count = np.random.default_rng(0), sum(map(len, differences))
    sums = sum(d[rng.integers(len(d), size=(resamples, len(d)))].sum(axis=1) for d in differences)
    low, high = np.quantile(np.asarray(sums) / count, [0.025, 0.975])
    mean = float(np.concatenate(differences).mean())
    return {"difference": mean, "low": float(low), "high": float(high), "items": count}


def bootstrap_interval(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean with a 95 % percentile bootstrap interval, over prompts."""
    values = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}
