"""The numbers of `evaluate fidelity`: of a pair of videos, of a pair of velocities, their means, and the table."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.diffusion import evenly_spaced_steps, schedule
from jsurgery.evaluate import video_metrics
from jsurgery.evaluate.clip_model import ClipModel
from jsurgery.evaluate.lpips import Weights, lpips
from jsurgery.io.files import write_json
from jsurgery.runtime.finite import check_finite

STEPS = 10  # sampling steps, evenly spaced, at which velocities are compared
CONTROL = "teacher, other noise"
COLUMNS = {  # of the table: a number's key -> (title, format, whether a single video has it)
    "psnr": ("PSNR (dB)", ".2f", False),
    "ssim": ("SSIM", ".4f", False),
    "lpips": ("LPIPS", ".4f", False),
    "velocity_error": ("velocity error", ".4f", False),
    "drift": ("drift (levels/s)", "+.2f", False),
    "clip_text": ("CLIP, prompt", ".4f", True),
    "clip_frames": ("CLIP, frames", ".4f", True),
    "flicker": ("flicker (levels)", ".2f", True),
    "motion": ("motion (pixels/frame)", ".2f", True),
}
OF_ANY_VIDEO = [name for name, (_, _, any_video) in COLUMNS.items() if any_video]


@dataclasses.dataclass(frozen=True)
class MetricNetworks:
    """The networks of the metrics that need one; without weights from the user a metric is left out."""

    lpips: Weights | None = None
    clip: ClipModel | None = None


def video_numbers(video: np.ndarray, teacher: np.ndarray, prompt: str, networks: MetricNetworks) -> dict[str, Any]:
    """MSE, SSIM and LPIPS of every frame against the teacher's; flicker, motion and CLIP's scores of both videos."""
    numbers = {"mse": video_metrics.mse(video, teacher), "ssim": video_metrics.ssim(video, teacher)}
    if networks.lpips is not None:
        numbers["lpips"] = lpips(networks.lpips, video, teacher)
    for prefix, each in (("", video), ("teacher_", teacher)):
        own = {"flicker": video_metrics.flicker(each), "motion": video_metrics.motion(each)}
        if networks.clip is not None:
            own |= networks.clip.scores(each, prompt)
        numbers |= {prefix + name: value for name, value in own.items()}
    return numbers


def velocity_numbers(velocity_SxTxHxWxC: np.ndarray, teacher_SxTxHxWxC: np.ndarray) -> dict[str, Any]:
    """Relative L2 errors: of each step [S], and of each step and latent frame [S, T]."""
    square = ((velocity_SxTxHxWxC - teacher_SxTxHxWxC).astype(float) ** 2).sum(axis=(2, 3, 4))
    norm = (teacher_SxTxHxWxC.astype(float) ** 2).sum(axis=(2, 3, 4))
    return {
        "velocity_error_per_step": np.sqrt(square.sum(axis=1) / norm.sum(axis=1)),
        "velocity_error": np.sqrt(square / norm),
    }


def write_numbers(file: epath.Path, numbers: dict[str, Any]) -> None:
    for name, value in numbers.items():
        check_finite(np.asarray(value, float), f"fidelity: {name} of {file}")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {name: np.asarray(value).tolist() for name, value in numbers.items()})


def collect(
    config: ConfigDict, names: dict[str, str], prompts: int, folder: epath.Path, durations: Sequence[int]
) -> dict[str, Any]:
    """Means over prompts at every duration, of the models in `names` (name -> folder). Infinite PSNR becomes None."""
    kept = evenly_spaced_steps(config.sampler.steps, min(STEPS, config.sampler.steps))
    timesteps = schedule(
        config.sampler.solver, config.sampler.steps, config.sampler.shift, config.sampler.timesteps
    ).timestep[kept]
    result: dict[str, Any] = {"timesteps": timesteps.tolist(), "durations": []}
    for frames in durations:
        seconds = np.arange(frames) / config.video.fps
        models = {}
        for name, part in names.items():
            files = [folder / str(frames) / part / f"{number:04d}.json" for number in range(prompts)]
            models[name] = summarize([json.loads(file.read_text()) for file in files], seconds)
        result["durations"].append({"frames": frames, "seconds": frames / config.video.fps, "models": models})
    return result


def summarize(rows: Sequence[dict[str, Any]], seconds: np.ndarray) -> dict[str, Any]:
    """Means over prompts. drift: slope of the root mean square difference over a video, in grey levels per second."""
    mean = {name: np.mean([row[name] for row in rows], axis=0) for name in rows[0]}
    psnr = np.mean([video_metrics.psnr(np.mean(row["mse"])) for row in rows])
    difference_per_frame = np.sqrt(mean["mse"])
    numbers = {
        "psnr": psnr,
        "ssim": np.mean(mean["ssim"]),
        "drift": np.polyfit(seconds, difference_per_frame, 1)[0] if len(seconds) > 1 else 0.0,
        **{name: mean[name] for name in mean if name.removeprefix("teacher_") in OF_ANY_VIDEO},
        "psnr_per_frame": [video_metrics.psnr(error) for error in mean["mse"]],
        "ssim_per_frame": mean["ssim"],
    }
    if "lpips" in mean:
        numbers |= {"lpips": np.mean(mean["lpips"]), "lpips_per_frame": mean["lpips"]}
    if "velocity_error" in mean:
        numbers |= {
            "velocity_error": np.mean(mean["velocity_error_per_step"]),
            "velocity_error_per_step": mean["velocity_error_per_step"],
            "velocity_error_per_frame": np.mean(mean["velocity_error"], axis=0),
        }
    return {name: _finite(np.asarray(value).tolist()) for name, value in numbers.items()}


def _finite(value: Any) -> Any:
    """None for infinities, which JSON does not have."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def table(result: dict[str, Any]) -> str:
    """The result as a table in Markdown, the teacher first at every duration."""
    names = [name for name in COLUMNS if any(name in m for m in result["durations"][0]["models"].values())]
    rows = [["", "seconds", *(COLUMNS[name][0] for name in names)], ["---", *["---:"] * (1 + len(names))]]
    for duration in result["durations"]:
        models = duration["models"]
        first = next(iter(models.values()))
        teacher = {name: first[f"teacher_{name}"] for name in names if name in OF_ANY_VIDEO}
        for model, numbers in {"teacher": teacher, **models}.items():
            rows.append([model, f"{duration['seconds']:.2f}", *(cell(numbers, name) for name in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(numbers: dict[str, Any], name: str) -> str:
    if name not in numbers:
        return "–"
    return "∞" if numbers[name] is None else f"{numbers[name]:{COLUMNS[name][1]}}"
