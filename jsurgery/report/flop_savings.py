"""What a run saves, in FLOPs: by part of a block, and over the length of a video."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jsurgery.attention.kinds.registry import rate_key
from jsurgery.io.results import si_prefix
from jsurgery.rates import Rate
from jsurgery.report.charts import Chart, line_chart
from jsurgery.wan.cost import Workload, block_flops, core_flops, model_flops
from jsurgery.wan.model_sizes import PUBLISHED

FULL_SIZE = {
    "frames": 81,
    "height": 480,
    "width": 832,
}  # the video for which savings of Wan2.1 1.3B are computed
UNITS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("FLOP", 1.0))
PARTS = ("core", "projections", "cross_attention", "ffn", "total")
LENGTHS = np.linspace(1, 4, 13)  # of a video, relative to the run's


def costs(work: Workload, rates: Sequence[Rate], config: ConfigDict) -> list[dict[str, Any]]:
    """`cost_table` and `duration_charts` of this model, and of Wan2.1 1.3B at full size with the same mix of rates.

    The second is left out if this model is Wan2.1 1.3B at full size.
    """
    subjects = [(work, config.video.to_dict(), False)]
    full = Workload(PUBLISHED["Wan2.1 1.3B"], 0, feature_map=work.feature_map).of_video(**FULL_SIZE)
    if (full.config, full.tokens) != (dataclasses.replace(work.config, hybrid=None), work.tokens):
        subjects.append((full, FULL_SIZE, True))
    return [
        {
            "full_size": is_full,
            "size": size,
            "charts": duration_charts(subject, rates, size),
            **cost_table(subject, rates),
        }
        for subject, size, is_full in subjects
    ]


def cost_table(work: Workload, rates: Sequence[Rate]) -> dict[str, Any]:
    """FLOPs by part of a block: at each rate, the plan's mean, and what that saves; also of a whole forward pass."""
    used = sorted({1, *rates}, key=rate_key)
    by_rate = {rate: {part: getattr(block_flops(work, rate), part) for part in PARTS} for rate in used}
    mean = {part: sum(by_rate[rate][part] for rate in rates) / len(rates) for part in PARTS}
    blocks = work.config.num_layers
    teacher, hybrid = model_flops(work, [1] * blocks), model_flops(work, []) + blocks * mean["total"]
    unit, scale = next(unit for unit in UNITS if by_rate[1]["total"] > unit[1] / 10)
    return {
        "unit": unit,
        "scale": scale,
        "tokens": work.tokens,
        "by_rate": by_rate,
        "blocks_at": {rate: list(rates).count(rate) for rate in used},
        "teacher": by_rate[1],
        "plan": mean,
        "saved": {part: 1 - mean[part] / by_rate[1][part] for part in PARTS},
        "forward": {"teacher": teacher, "plan": hybrid, "saved": 1 - hybrid / teacher},
    }


def duration_charts(work: Workload, rates: Sequence[Rate], size: dict[str, int]) -> list[Chart | None]:
    """FLOPs of one forward pass over frames, of the teacher and of a mix of rates: attention cores, then all parts."""
    frames = sorted({4 * round(size["frames"] * length / 4) + 1 for length in LENGTHS})
    works = [work.of_video(count, size["height"], size["width"]) for count in frames]
    blocks = work.config.num_layers

    def cores(work: Workload, rates: Sequence[Rate]) -> float:
        return blocks * sum(core_flops(work, rate) for rate in rates) / len(rates)

    def forward(work: Workload, rates: Sequence[Rate]) -> float:
        return model_flops(work, []) + blocks * sum(block_flops(work, rate).total for rate in rates) / len(rates)

    charts = []
    for title, flops in {"Attention cores": cores, "The whole forward pass": forward}.items():
        prefix, scale = si_prefix(flops(works[-1], [1]))
        rows = [
            {"step": n, "teacher": flops(work, [1]) / scale, "plan": flops(work, rates) / scale}
            for n, work in zip(frames, works, strict=True)
        ]
        names = {"teacher": "teacher", "plan": "this plan"}
        charts.append(line_chart(f"{title}, {prefix}FLOP over frames", rows, names, from_zero=True))
    return charts
