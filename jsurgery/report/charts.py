"""Line charts for a page. Positions are in percent of the plot area, so that text keeps its size on small screens."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

POINTS = 240  # most that are drawn of a line
SMOOTHING = 12  # the running mean spans 1 / SMOOTHING of a line
LOG_RANGE = 4.0  # a y range that spans more than this factor is drawn on a log axis


@dataclasses.dataclass(frozen=True)
class Line:
    """SVG paths of the raw values and of their running mean, in a 100 x 100 plot with y downwards."""

    label: str
    raw: str
    smooth: str
    last: float  # of the running mean
    depth: float  # position among the chart's lines from 0 to 1, which sets its colour
    points: tuple[tuple[float, float], ...]  # (x, y) of the raw values that are drawn
    places: tuple[tuple[float, float], ...]  # the same in percent from the left and from the top


@dataclasses.dataclass(frozen=True)
class Chart:
    """Ticks are (percent from the left or from the top, text)."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_range: tuple[float, float]  # values at the left and the right end
    y_range: tuple[float, float]  # values at the bottom and the top
    log: bool

    def hover(self) -> dict[str, Any]:
        """The data with which page.js shows the values under the pointer."""
        lines = [{"label": line.label, "points": [[rounded(v) for v in p] for p in line.points]} for line in self.lines]
        return {"x": self.x_range, "y": self.y_range, "log": self.log, "lines": lines}


def line_chart(
    title: str, rows: Sequence[dict[str, float]], names: dict[str, str], from_zero: bool = False
) -> Chart | None:
    """A line over "step" for each key of `names` (key -> label); None for fewer than two steps or no finite value.

    from_zero: makes the y axis linear and begin at zero.
    """
    steps = np.array([row["step"] for row in rows], float)
    series = {name: np.array([row.get(name, np.nan) for row in rows], float) for name in names}
    everything = np.concatenate([*series.values(), np.array([])])
    everything = everything[np.isfinite(everything)]
    if len(steps) < 2 or not everything.size or steps[0] == steps[-1]:
        return None
    low, high = float(everything.min()), float(everything.max())
    low = min(0.0, low) if from_zero else low
    log = low > 0 and high > LOG_RANGE * low
    transform = np.log10 if log else np.asarray
    bottom, top = (float(transform(value)) for value in (low, high))
    margin = 0.06 * (top - bottom) or 0.5 * abs(top) or 1.0
    bottom, top = bottom - (0 if from_zero else margin), top + margin
    first, last = steps[0], steps[-1]

    def drawn(values: np.ndarray) -> np.ndarray:
        keep = np.unique(np.linspace(0, len(values) - 1, min(POINTS, len(values))).round().astype(int))
        return keep[np.isfinite(values[keep])]

    def places(values: np.ndarray) -> tuple[tuple[float, float], ...]:
        keep = drawn(values)
        x = 100 * (steps[keep] - first) / (last - first)
        y = 100 * (top - transform(values[keep])) / (top - bottom)
        return tuple(zip(x.tolist(), y.tolist(), strict=True))

    def path(values: np.ndarray) -> str:
        return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in places(values))

    lines = []
    for index, (name, label) in enumerate(names.items()):
        values = series[name]
        if np.isfinite(values).any():
            smooth = running_mean(values)
            finite = smooth[np.isfinite(smooth)]
            depth = index / (len(names) - 1) if len(names) > 1 else 1.0
            points = tuple((float(steps[i]), float(values[i])) for i in drawn(values))
            lines.append(Line(label, path(values), path(smooth), float(finite[-1]), depth, points, places(values)))

    def at(value: float) -> float:
        return 100 * (top - float(transform(value))) / (top - bottom)

    y_values = log_ticks(10**bottom, 10**top) if log else linear_ticks(bottom, top)
    return Chart(
        title,
        tuple(lines),
        tuple((100 * (value - first) / (last - first), f"{value:,g}") for value in linear_ticks(first, last, 6)),
        tuple((at(value), f"{value:.4g}") for value in y_values),
        (float(first), float(last)),
        (10**bottom, 10**top) if log else (bottom, top),
        log,
    )


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over a centred window. Values that are not finite are left out, and stay NaN."""
    reach = len(values) // (2 * SMOOTHING)
    finite = np.isfinite(values)
    total = np.concatenate([[0], np.cumsum(np.where(finite, values, 0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    start = np.maximum(np.arange(len(values)) - reach, 0)
    end = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return np.divide(
        total[end] - total[start], count[end] - count[start], out=np.full(len(values), np.nan), where=finite
    )


def linear_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round values in [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(math.log(factor * power / rough)))
    return [float(f"{i * step:.12g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]; powers alone when there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [value for power in powers for factor in factors if low <= (value := float(f"{factor}e{power}")) <= high]
