"""VBench's results per dimension, summed up as its leaderboards do, beside the paper's rows.

Ranges, weights and groups are those of `scripts/constant.py` and `VBench-2.0/scripts/constant.py` in
github.com/Vchitect/VBench, and the sums are those of `cal_final_score.py` beside them. One difference: a group with a
missing dimension has no score here, where VBench counts the missing dimension as zero.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence

from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.files import read_json, write_json
from jsurgery.io.results import check_report, markdown_table

QUALITY = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality",
)  # fmt: skip
SEMANTIC = (
    "object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene", "appearance_style",
    "temporal_style", "overall_consistency",
)  # fmt: skip
DIMENSIONS = QUALITY + SEMANTIC
RANGES = {  # of raw scores; all others range from 0 to 1
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
WEIGHTS = {"dynamic_degree": 0.5}  # within its group; all others weigh 1
GROUP_WEIGHTS = {"Quality": 4, "Semantic": 1}

CATEGORIES = {
    "Human Fidelity": ("human_anatomy", "human_identity", "human_clothes"),
    "Creativity": ("diversity", "composition"),
    "Controllability": (
        "dynamic_spatial_relationship", "dynamic_attribute", "motion_order_understanding", "human_interaction",
        "complex_landscape", "complex_plot", "camera_motion",
    ),
    "Commonsense": ("motion_rationality", "instance_preservation"),
    "Physics": ("mechanics", "thermotics", "material", "multi-view_consistency"),
}  # fmt: skip
DIMENSIONS_2 = tuple(name for category in CATEGORIES.values() for name in category)

GROUPS = ("Total", "Quality", "Semantic")
GROUPS_2 = ("Total", *CATEGORIES)
PUBLISHED = {  # Table 1; * is the paper's own measurement
    "CogVideoX 5B": (81.91, 83.05, 77.33),
    "CogVideoX 2B": (81.55, 82.48, 77.81),
    "LTX-Video": (80.00, 82.30, 70.79),
    "Wan2.1 1.3B": (83.31, 85.23, 75.65),
    "Wan2.1 1.3B*": (83.10, 85.10, 75.12),
    "Attention Surgery 15R2": (83.21, 85.19, 75.25),
}
# Table 4, with two oddities. It gives Wan2.1's Physics as 53.8, but Table 11 and the total imply 53.3. CogVideoX-1.5's
# total is not the mean of its categories.
PUBLISHED_2 = {
    "Wan2.1 1.3B": (56.0, 80.7, 48.7, 34.0, 63.4, 53.3),
    "CogVideoX-1.5 5B": (53.4, 72.1, 43.7, 29.6, 63.2, 48.2),
    "Attention Surgery 15R2": (55.1, 78.9, 47.5, 33.4, 63.1, 52.8),
}


def canonical(name: str) -> str:
    """A dimension's name as spelt here: VBench uses spaces or underscores, and upper or lower case."""
    return name.strip().lower().replace(" ", "_")


def read_results(paths: Sequence[str]) -> tuple[dict[str, float], dict[str, int]]:
    """(score from 0 to 1, number of videos) per dimension, from files `*_eval_results.json` or folders of them.

    If several files hold a dimension, the last counts; a folder's files are read in the order of their names.
    Raises InputError for files without results of VBench, and for results of both suites at once.
    """
    files: list[pathlib.Path] = []
    for path in map(pathlib.Path, paths):
        files += sorted(path.rglob("*_eval_results.json")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{', '.join(map(str, paths))}: expected files *_eval_results.json, found none")
    scores, videos = {}, {}
    for file in files:
        results = read_json(file, "VBench's results as JSON")
        for key, value in (results if isinstance(results, dict) else {"": None}).items():
            name = canonical(key)
            if name not in (*DIMENSIONS, *DIMENSIONS_2):
                raise InputError(f"{file}: expected dimensions of VBench or VBench-2.0, found {key!r}")
            score, *details = value if isinstance(value, list) and value else [value]
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
                raise InputError(f"{file}: {key}: expected a score from 0 to 1, found {score!r}")
            scores[name] = float(score)
            videos[name] = len(details[0]) if details and isinstance(details[0], list) else 0
    if not scores or (scores.keys() & set(DIMENSIONS) and scores.keys() & set(DIMENSIONS_2)):
        raise InputError(
            f"{files[0]}: expected results of VBench or of VBench-2.0, found {'both' if scores else 'none'}"
        )
    return scores, videos


def is_second(scores: Mapping[str, float]) -> bool:
    """Whether the dimensions are those of VBench-2.0."""
    return not set(scores) <= set(DIMENSIONS)


def summarize(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Per cent: Total, Quality and Semantic, or for VBench-2.0 Total and the five categories.

    A sum with a missing dimension is None.
    """
    if is_second(scores):
        groups = {name: _mean(scores, members) for name, members in CATEGORIES.items()}
        weights = dict.fromkeys(groups, 1)
    else:
        normalized = {name: _normalize(name, score) for name, score in scores.items()}
        groups = {"Quality": _mean(normalized, QUALITY), "Semantic": _mean(normalized, SEMANTIC)}
        weights = GROUP_WEIGHTS
    percents = {name: 100 * value for name, value in groups.items() if value is not None}
    total = sum(weights[name] * value for name, value in percents.items()) / sum(weights.values())
    return {"Total": total if len(percents) == len(groups) else None, **dict.fromkeys(groups), **percents}


def _normalize(name: str, score: float) -> float:
    low, high = RANGES.get(name, (0.0, 1.0))
    return (score - low) / (high - low)


def _mean(scores: Mapping[str, float], names: Sequence[str]) -> float | None:
    if not set(names) <= set(scores):
        return None
    weights = [WEIGHTS.get(name, 1.0) for name in names]
    return math.fsum(weight * scores[name] for name, weight in zip(names, weights, strict=True)) / sum(weights)


def report_results(paths: Sequence[str], name: str, file: str | None = None) -> None:
    """Prints `report` of result files or folders, and writes its numbers to a JSON file if one is named."""
    check_report(file)
    scores, videos = read_results(paths)
    print(report(name, scores, videos))
    if file is not None:
        write_json(epath.Path(file), {"sums": summarize(scores), "dimensions": scores, "videos": videos})


def report(name: str, scores: Mapping[str, float], videos: Mapping[str, int]) -> str:
    """Markdown: the model's sums beside the published ones, then its dimensions as they were measured."""
    second = is_second(scores)
    groups, published = (GROUPS_2, PUBLISHED_2) if second else (GROUPS, PUBLISHED)
    sums = summarize(scores)
    digits = 1 if second else 2
    rows = [[f"**{name}**", *(_percent(sums[group], digits) for group in groups)]]
    rows += [[f"{row} (published)", *(f"{value:.{digits}f}" for value in values)] for row, values in published.items()]
    names = DIMENSIONS_2 if second else DIMENSIONS
    measured = [
        [dimension.replace("_", " "), _percent(100 * scores[dimension], 2), str(videos.get(dimension) or "–")]
        for dimension in names
        if dimension in scores
    ]
    parts = [
        markdown_table(["", *groups], rows, numbers=True),
        markdown_table(["dimension", "measured", "videos"], measured, numbers=True),
    ]
    missing = [dimension.replace("_", " ") for dimension in names if dimension not in scores]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}. Sums that need them are left out.")
    return "\n\n".join(parts)


def _percent(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
