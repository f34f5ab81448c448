"""The command `evaluate fidelity`: how close models stay to their teacher for equal prompts, noise and solver.

Videos are compared frame by frame. Velocities are compared along the teacher's trajectory from noise to latents, so
that both models see the same x_t. The control is the teacher itself with different noise: it shows how close two
unrelated videos of a prompt are.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.config import check_video, recorded_section
from jsurgery.diffusion import evenly_spaced_steps, schedule
from jsurgery.errors import InputError
from jsurgery.evaluate import video_metrics
from jsurgery.evaluate.clip_model import ClipModel, load_clip_model
from jsurgery.evaluate.lpips import Weights, load_lpips, lpips
from jsurgery.io.fields import describe_changes
from jsurgery.io.files import replacing, write_json
from jsurgery.io.hashes import folder_fingerprint, size_and_sha256
from jsurgery.io.results import check_report
from jsurgery.runtime.progress import Progress
from jsurgery.sample import transformer_identity
from jsurgery.wan import hub
from jsurgery.wan.checkpoint import load_transformer, read_config
from jsurgery.wan.guidance import guided_velocity
from jsurgery.wan.model_folder import check_pipeline, model_path, transformer_folder
from jsurgery.wan.pipeline import Pipeline, load_pipeline
from jsurgery.wan.video_size import check_size

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


def evaluate_fidelity(
    config: ConfigDict,
    models: Sequence[str],
    prompts: Sequence[str],
    workdir: str,
    durations: Sequence[int] = (),
    report: str | None = None,
    lpips_weights: str | None = None,
    clip_model: str | None = None,
) -> dict[str, Any]:
    """Compares model folders with the teacher, `config.model.path`: prints a table and writes `workdir/fidelity.json`.

    durations: numbers of frames, each 4k + 1 (default: `config.video.frames`). report: a second file for the numbers.
    lpips_weights, clip_model: paths for `load_lpips` and `load_clip_model`. Prompts that the workdir has numbers of are
    not sampled again. Returns the numbers.
    Raises InputError for models whose latents or text embeddings differ from the teacher's, and for a workdir that was
    made with other settings.
    """
    check_report(report)
    durations = sorted(set(durations)) or [config.video.frames]
    teacher = check_pipeline(config.model.path)
    for path in models:
        other = read_config(transformer_folder(model_path(path)))
        for field in ("in_channels", "text_dim", "patch_size"):
            if getattr(other, field) != getattr(teacher, field):
                raise InputError(
                    f"--model={path}: expected the teacher's {field} = {getattr(teacher, field)}, "
                    f"found {getattr(other, field)}"
                )
    for frames in durations:
        check_video(frames, config.video.height, config.video.width, prefix="--durations: ")
        check_size(teacher, frames, config.video.height, config.video.width)
    folder = epath.Path(workdir)
    networks = MetricNetworks(
        load_lpips(lpips_weights) if lpips_weights else None, load_clip_model(clip_model) if clip_model else None
    )
    hashes = {}
    if lpips_weights:
        hashes["lpips"] = size_and_sha256(epath.Path(lpips_weights))[1][:16]
    if clip_model:
        hashes["clip"] = folder_fingerprint(epath.Path(hub.local_path(clip_model)))
    mark_workdir(folder, config, prompts, hashes)
    pipeline = load_pipeline(config.model.path, jnp.dtype(config.model.dtype))
    pipeline.embedder.unpadded([*prompts, config.sampler.negative_prompt], config.text_length)
    for frames in durations:
        make_reference(pipeline, with_frames(config, frames), prompts, folder / str(frames), networks)
    names = {}
    for path in models:
        part = transformer_folder(model_path(path))
        names[path] = f"{model_path(path).name}-{folder_fingerprint(part)}"
        files = [
            folder / str(frames) / names[path] / f"{i:04d}.json" for frames in durations for i in range(len(prompts))
        ]
        if not all(file.exists() for file in files):
            transformer = load_transformer(part, jnp.dtype(config.model.dtype), inference=True)
            pipeline = pipeline.with_transformer(transformer)
            for frames in durations:
                compare(pipeline, with_frames(config, frames), prompts, folder / str(frames), names[path], networks)
    result = collect(config, {**names, CONTROL: "control"}, len(prompts), folder, durations)
    for file in (folder / "fidelity.json", *([epath.Path(report)] if report else [])):
        write_json(file, {"prompts": list(prompts), **result})
    print(table(result))
    return result


def mark_workdir(folder: epath.Path, config: ConfigDict, prompts: Sequence[str], hashes: dict[str, str]) -> None:
    """Records in `made_with.json` the settings and networks (`hashes`) that the numbers depend on.

    Raises InputError if the workdir was made with others.
    """
    made_with = {
        "teacher": transformer_identity(config),
        "prompts": list(prompts),
        "seed": config.seed,
        **recorded_section(config, "sampler", without=["guidance_batched"]),
        **recorded_section(config, "video", without=["frames"]),
        "text_length": config.text_length,
        "dtype": config.model.dtype,
        **hashes,
    }
    marker = folder / "made_with.json"
    if marker.exists():
        recorded = json.loads(marker.read_text())
        if recorded != made_with:
            raise InputError(f"{marker}: {describe_changes(recorded, made_with)}; use another --workdir")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(marker, made_with)
    except OSError as error:
        raise InputError(f"--workdir={folder}: {error.strerror}") from None


def with_frames(config: ConfigDict, frames: int) -> ConfigDict:
    with config.unlocked():
        sized = config.copy_and_resolve_references()
    sized.video.frames = frames
    return sized


def make_reference(
    pipeline: Pipeline, config: ConfigDict, prompts: Sequence[str], folder: epath.Path, networks: MetricNetworks
) -> None:
    """Writes the teacher's video and trajectory of every prompt to `folder/teacher`, and the control's numbers."""
    kept = evenly_spaced_steps(config.sampler.steps, min(STEPS, config.sampler.steps))
    progress = Progress(f"teacher, {config.video.frames} frames", len(prompts))
    for number in progress.over(range(len(prompts))):
        file = folder / "teacher" / f"{number:04d}.npz"
        control = folder / "control" / f"{number:04d}.json"
        if file.exists() and control.exists():
            continue
        latents, trajectory = pipeline.sample(
            [prompts[number]], config, seed=config.seed, first=number, record=list(kept)
        )
        trajectory = np.asarray(trajectory)[:, 0]
        video = pipeline.decode(latents)[0]
        velocity = velocities(pipeline, config, prompts[number], trajectory)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, way=trajectory, velocity=velocity, video=video)
        other_seed = (config.seed + 1) % 2**32
        latents, _ = pipeline.sample([prompts[number]], config, seed=other_seed, first=number)
        write_numbers(control, video_numbers(pipeline.decode(latents)[0], video, prompts[number], networks))


def compare(
    pipeline: Pipeline,
    config: ConfigDict,
    prompts: Sequence[str],
    folder: epath.Path,
    name: str,
    networks: MetricNetworks,
) -> None:
    """Writes the numbers of the pipeline's transformer to `folder`/`name`, one file per prompt."""
    progress = Progress(f"{name}, {config.video.frames} frames", len(prompts))
    for number in progress.over(range(len(prompts))):
        file = folder / name / f"{number:04d}.json"
        if file.exists():
            continue
        with (folder / "teacher" / f"{number:04d}.npz").open("rb") as stream:
            teacher = dict(np.load(stream))
        latents, _ = pipeline.sample([prompts[number]], config, seed=config.seed, first=number)
        numbers = video_numbers(pipeline.decode(latents)[0], teacher["video"], prompts[number], networks)
        velocity = velocities(pipeline, config, prompts[number], teacher["way"])
        write_numbers(file, numbers | velocity_numbers(velocity, teacher["velocity"]))


def velocities(pipeline: Pipeline, config: ConfigDict, prompt: str, trajectory_SxTxHxWxC: np.ndarray) -> np.ndarray:
    """The transformer's velocity, guided as in sampling, at every x_t of a trajectory: float32 [S, T, H, W, C]."""
    sampler = config.sampler
    rows = schedule(sampler.solver, sampler.steps, sampler.shift)
    text = pipeline.embed([prompt], config.text_length)
    negative_text = None if sampler.guidance == 1 else pipeline.embed([sampler.negative_prompt], config.text_length)
    timesteps = rows.timestep[evenly_spaced_steps(sampler.steps, len(trajectory_SxTxHxWxC))]
    guidance = sampler.guidance, sampler.guidance_batched
    per_step = [
        _velocity(pipeline.transformer, text, negative_text, x[None], timestep, *guidance)
        for x, timestep in zip(trajectory_SxTxHxWxC, timesteps, strict=True)
    ]
    return np.concatenate([np.asarray(velocity, np.float32) for velocity in per_step])


@functools.partial(jax.jit, static_argnames=("guidance", "batched"))
def _velocity(transformer, text, negative_text, x, timestep, guidance, batched):
    return guided_velocity(transformer, text, negative_text, guidance, batched)(x, jnp.full(x.shape[0], timestep))


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
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {name: np.asarray(value).tolist() for name, value in numbers.items()})


def collect(
    config: ConfigDict, names: dict[str, str], prompts: int, folder: epath.Path, durations: Sequence[int]
) -> dict[str, Any]:
    """Means over prompts at every duration, of the models in `names` (name -> folder). Infinite PSNR becomes None."""
    kept = evenly_spaced_steps(config.sampler.steps, min(STEPS, config.sampler.steps))
    timesteps = schedule(config.sampler.solver, config.sampler.steps, config.sampler.shift).timestep[kept]
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
