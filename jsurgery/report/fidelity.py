"""How near a run's models stay to their teacher: what `evaluate fidelity` has left in the run's folder."""

import pathlib
from typing import Any

from jsurgery.evaluate.fidelity import CONTROL, OF_ANY_VIDEO
from jsurgery.report.charts import Chart, line_chart

STAGES = {"hybrid": "distilled", "model": "finetuned"}  # folder of a run -> the stage whose model it is
COLUMNS = {  # of a model's numbers: what is said of them, and digits
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


def fidelity(found: dict[str, Any], stages: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Tables by duration, with a row for the teacher, and charts.

    `found` is a fidelity.json, `stages` have the labels of a run's models. Cells are (value, digits); a value is None
    where videos are equal and PSNR infinite, a cell where nothing was measured.
    """
    labels = labelled(list(found["durations"][0]["models"]), stages)
    measured = found["durations"][0]["models"].values()
    columns = {name: about for name, about in COLUMNS.items() if any(name in numbers for numbers in measured)}
    tables = []
    for duration in found["durations"]:
        own = next(iter(duration["models"].values()))
        teacher = [(own[f"teacher_{name}"], columns[name][2]) if name in OF_ANY_VIDEO else None for name in columns]
        rows = [
            (labels[path], [(numbers[name], about[2]) if name in numbers else None for name, about in columns.items()])
            for path, numbers in duration["models"].items()
        ]
        tables.append(
            {
                "frames": duration["frames"],
                "seconds": duration["seconds"],
                "rows": [(stages["teacher"][0], teacher), *rows],
            }
        )
    return {
        "columns": [about[:2] for about in columns.values()],
        "tables": tables,
        "prompts": len(found["prompts"]),
        "charts": charts(found, labels),
    }


def labelled(paths: list[str], stages: dict[str, tuple[str, str]]) -> dict[str, str]:
    """A name for each model: its stage's, else the end of its path."""
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


def charts(found: dict[str, Any], labels: dict[str, str]) -> list[Chart]:
    """Over the frames of the longest clips, over the timestep, and over durations where there are several."""
    longest = found["durations"][-1]
    within = [
        {"step": frame, **{path: numbers["ssim_per_frame"][frame] for path, numbers in longest["models"].items()}}
        for frame in range(longest["frames"])
    ]
    moved = {path: numbers for path, numbers in longest["models"].items() if "velocity_error_per_step" in numbers}
    errors = [
        {"step": timestep, **{path: numbers["velocity_error_per_step"][i] for path, numbers in moved.items()}}
        for i, timestep in enumerate(found["timesteps"])
    ]
    lengths = [
        {"step": duration["frames"], **{path: numbers["ssim"] for path, numbers in duration["models"].items()}}
        for duration in found["durations"]
    ]
    candidates = [
        line_chart(f"SSIM by frame, clips of {longest['frames']}", within, labels),
        line_chart("Error of the velocity by timestep, 1000 is noise", errors[::-1], {p: labels[p] for p in moved}),
        line_chart("SSIM over the frames of a clip", lengths, labels),
    ]
    return [chart for chart in candidates if chart]
