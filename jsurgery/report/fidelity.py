"""The page's section on fidelity to the teacher, from the numbers of `evaluate fidelity` in the run's folder."""

import pathlib
from typing import Any

from jsurgery.evaluate.fidelity_numbers import CONTROL, OF_ANY_VIDEO
from jsurgery.report.charts import Chart, line_chart

STAGES = {"hybrid": "distilled", "model": "finetuned"}  # folder of a run -> the stage whose model it is
COLUMNS = {  # a number's key -> (title, explanation, digits)
    "psnr": ("PSNR", "dB, higher is closer", 2),
    "ssim": ("SSIM", "1 is the same clip", 4),
    "lpips": ("LPIPS", "0 is the same clip", 4),
    "velocity_error": ("Velocity error", "relative, at equal x and time", 4),
    "drift": ("Drift", "grey levels a second", 2),
    "clip_text": ("CLIP, prompt", "higher is nearer", 4),
    "clip_frames": ("CLIP, frames", "of adjacent ones", 4),
    "flicker": ("Flicker", "grey levels", 2),
    "motion": ("Motion", "pixels a frame", 2),
}


def fidelity(numbers: dict[str, Any], stages: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """A table for every duration, with a row for the teacher, and charts.

    numbers: a fidelity.json. stages: name -> (label, meaning) of the run's models. A cell is (value, digits), or None
    if nothing was measured; a value of None is the infinite PSNR of equal videos.
    """
    labels = model_labels(list(numbers["durations"][0]["models"]), stages)
    measured = numbers["durations"][0]["models"].values()
    columns = {name: column for name, column in COLUMNS.items() if any(name in model for model in measured)}
    tables = []
    for duration in numbers["durations"]:
        own = next(iter(duration["models"].values()))
        teacher = [(own[f"teacher_{name}"], columns[name][2]) if name in OF_ANY_VIDEO else None for name in columns]
        rows = [
            (labels[path], [(model[name], column[2]) if name in model else None for name, column in columns.items()])
            for path, model in duration["models"].items()
        ]
        tables.append(
            {
                "frames": duration["frames"],
                "seconds": duration["seconds"],
                "rows": [(stages["teacher"][0], teacher), *rows],
            }
        )
    return {
        "columns": [column[:2] for column in columns.values()],
        "tables": tables,
        "prompts": len(numbers["prompts"]),
        "charts": charts(numbers, labels),
    }


def model_labels(paths: list[str], stages: dict[str, tuple[str, str]]) -> dict[str, str]:
    """path -> label of a model: its stage's label, else the end of its path."""
    names = {path: pathlib.PurePath(path).name for path in paths}
    unique = {path: name for path, name in names.items() if list(names.values()).count(name) == 1}
    return {
        path: "Teacher, other noise"
        if path == CONTROL
        else stages[STAGES[names[path]]][0]
        if path in unique and names[path] in STAGES
        else unique.get(path, path)
        for path in paths
    }


def charts(numbers: dict[str, Any], labels: dict[str, str]) -> list[Chart]:
    """SSIM over the frames of the longest clips, velocity error over the timestep, SSIM over durations."""
    longest = numbers["durations"][-1]
    within = [
        {"step": frame, **{path: model["ssim_per_frame"][frame] for path, model in longest["models"].items()}}
        for frame in range(longest["frames"])
    ]
    with_velocity = {path: m for path, m in longest["models"].items() if "velocity_error_per_step" in m}
    errors = [
        {"step": timestep, **{path: model["velocity_error_per_step"][i] for path, model in with_velocity.items()}}
        for i, timestep in enumerate(numbers["timesteps"])
    ]
    lengths = [
        {"step": duration["frames"], **{path: model["ssim"] for path, model in duration["models"].items()}}
        for duration in numbers["durations"]
    ]
    candidates = [
        line_chart(f"SSIM by frame, clips of {longest['frames']}", within, labels),
        line_chart(
            "Error of the velocity by timestep, 1000 is noise",
            errors[::-1],
            {path: labels[path] for path in with_velocity},
        ),
        line_chart("SSIM over the frames of a clip", lengths, labels),
    ]
    return [chart for chart in candidates if chart]
