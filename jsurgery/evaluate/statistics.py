"""Summary statistics of scores: mean and deviation over seeds, and bootstrap intervals over prompts or blocks.

All intervals are 95 % percentile bootstrap intervals of a mean, with a fixed seed: equal scores give equal intervals.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
LEVELS = (0.025, 0.975)  # quantiles of the resampled means at the ends of an interval

MeanAndStd = tuple[float, float]  # mean and standard deviation over seeds


def mean_and_std(values: Sequence[float]) -> MeanAndStd:
    """(mean, sample standard deviation); the deviation of a single value is 0."""
    return float(np.mean(values)), float(np.std(values, ddof=min(1, len(values) - 1)))


def fact(values: Sequence[float]) -> MeanAndStd | float:
    """`mean_and_std` over seeds, or just the value if it is the same for every seed."""
    return values[0] if len(set(values)) == 1 else mean_and_std(values)


def bootstrap_interval(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean of one value per prompt [N], with its interval: mean, low, high."""
    values = np.asarray(values, float)
    low, high = _interval_of_mean([values], RESAMPLES)
    return {"mean": float(values.mean()), "low": low, "high": high}


def paired_difference(a: Sequence[ArrayLike], b: Sequence[ArrayLike], resamples: int = RESAMPLES) -> dict[str, float]:
    """Mean of a - b over the items (prompts or blocks) of all seeds, with its interval: difference, low, high, items.

    a, b: one array per seed, [items]. Items are resampled in pairs within each seed.
    """
    differences = [np.subtract(x, y) for x, y in zip(a, b, strict=True)]
    low, high = _interval_of_mean(differences, resamples)
    values = np.concatenate(differences)
    return {"difference": float(values.mean()), "low": low, "high": high, "items": len(values)}


def _interval_of_mean(groups: Sequence[np.ndarray], resamples: int) -> tuple[float, float]:
    """(low, high) of the mean over all values. Values are resampled within their group."""
    rng, count = np.random.default_rng(0), sum(map(len, groups))
    sums = sum(group[rng.integers(len(group), size=(resamples, len(group)))].sum(axis=1) for group in groups)
    low, high = np.quantile(np.asarray(sums) / count, LEVELS)
    return float(low), float(high)
