"""The command `evaluate fidelity`: how close models stay to their teacher for equal prompts, noise and solver.

Videos are compared frame by frame. Velocities are compared along the teacher's trajectory from noise to latents, so
that both models see the same x_t. The control is the teacher itself with different noise: it shows how close two
unrelated videos of a prompt are.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.config import check_video, recorded_section
from jsurgery.diffusion import evenly_spaced_steps, schedule
from jsurgery.errors import InputError
from jsurgery.evaluate.clip_model import load_clip_model
from jsurgery.evaluate.fidelity_numbers import (
    CONTROL,
    STEPS,
    MetricNetworks,
    collect,
    table,
    velocity_numbers,
    video_numbers,
    write_numbers,
)
from jsurgery.evaluate.lpips import load_lpips
from jsurgery.io.fields import describe_changes
from jsurgery.io.files import replacing, write_json
from jsurgery.io.hashes import folder_fingerprint, size_and_sha256
from jsurgery.io.results import check_report
from jsurgery.runtime import processes
from jsurgery.runtime.finite import check_finite
from jsurgery.runtime.garbage import free_dropped_models
from jsurgery.runtime.mesh import LOGICAL, make_mesh
from jsurgery.runtime.mesh_choice import sampling_batch
from jsurgery.runtime.preemption import Preemption
from jsurgery.runtime.progress import Progress
from jsurgery.sample import transformer_identity
from jsurgery.wan import hub
from jsurgery.wan.checkpoint import load_transformer, read_config
from jsurgery.wan.guidance import guided_velocity
from jsurgery.wan.lora import check_loras, loras_of, with_lora_hashes
from jsurgery.wan.memory import on_sampling_mesh
from jsurgery.wan.model_folder import check_pipeline, model_path, transformer_folder
from jsurgery.wan.model_sizes import find_sizes
from jsurgery.wan.pipeline import Pipeline, batched, configured_pipeline
from jsurgery.wan.video_size import check_size

TEACHER, CONTROL_FOLDER = "teacher", "control"


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
    not sampled again. Each of several processes takes its share of the prompts, and `config.mesh` describes its
    devices; process 0 prints and writes. Returns the numbers.
    Raises InputError for models whose latents or text embeddings differ from the teacher's, and for a workdir that was
    made with other settings.
    """
    check_report(report)
    durations = sorted(set(durations)) or [config.video.frames]
    teacher = check_pipeline(config.model.path)
    check_loras(teacher, loras_of(config))
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
    if loras := loras_of(config):
        hashes["loras"] = with_lora_hashes("", loras)
    if lpips_weights:
        hashes["lpips"] = size_and_sha256(epath.Path(lpips_weights))[1][:16]
    if clip_model:
        hashes["clip"] = folder_fingerprint(epath.Path(hub.local_path(clip_model)))
    processes.on_first(lambda: mark_workdir(folder, config, prompts, hashes))
    parts = {path: transformer_folder(model_path(path)) for path in models}
    names = {path: f"{model_path(path).name}-{folder_fingerprint(part)}" for path, part in parts.items()}
    own = range(len(prompts))[jax.process_index() :: jax.process_count()]
    batch = sampling_batch(len(own), jax.local_device_count())
    placed = on_sampling_mesh("fidelity", with_frames(config, durations[-1]), find_sizes(config, ""), batch)

    def work() -> None:
        with Preemption("fidelity", alone=True) as preemption:
            share = Share(placed, prompts, own, folder, networks, preemption)
            compare_all(share, {names[path]: part for path, part in parts.items()}, durations)

    processes.on_all(work)
    return processes.on_first(lambda: finish_comparison(config, names, prompts, folder, durations, report))


@dataclasses.dataclass(frozen=True)
class Share:
    """What a process works on.

    Attributes:
      config: the config, with the mesh of this process's devices.
      prompts: all prompts.
      own: the numbers of the prompts that are this process's share.
      folder: the workdir.
    """

    config: ConfigDict
    prompts: Sequence[str]
    own: Sequence[int]
    folder: epath.Path
    networks: MetricNetworks
    preemption: Preemption

    def of_frames(self, frames: int) -> "Share":
        """The same with videos of `frames` frames, whose files lie in a folder of their own."""
        return dataclasses.replace(self, config=with_frames(self.config, frames), folder=self.folder / str(frames))

    def file(self, name: str, number: int) -> epath.Path:
        """The file of a prompt in the folder of a model, of the teacher or of the control."""
        return self.folder / name / f"{number:04d}{'.npz' if name == TEACHER else '.json'}"

    def missing(self, *names: str) -> list[int]:
        """The own prompts that lack a file in one of these folders."""
        return [number for number in self.own if not all(self.file(name, number).exists() for name in names)]

    def batches(self, label: str, missing: Sequence[int]) -> Iterator[tuple[Sequence[int], Callable[[int], None]]]:
        """The missing prompts, as many at once as keep the mesh busy, and `on_step` for `Pipeline.sample`.

        Shows progress, and obeys signals between batches.
        """
        done = len(self.own) - len(missing)
        progress = Progress(f"{label}, {self.config.video.frames} frames", len(self.own), start=done)
        for first, numbers in batched(missing, math.prod(self.config.mesh[axis] for axis in LOGICAL["batch"])):
            yield numbers, progress.during(done + first, len(numbers), self.config.sampler.steps)
            progress.show(done + first + len(numbers))
            self.preemption.should_stop()
            self.preemption.stop_if_asked()
        progress.show(len(self.own), last=True)


def compare_all(share: Share, parts: Mapping[str, epath.Path], durations: Sequence[int]) -> None:
    """Makes what is missing: of the teacher, then of one model after the other. `parts` are transformers by name."""
    config, shares = share.config, [share.of_frames(frames) for frames in durations]
    references = {number for sized in shares for number in sized.missing(TEACHER, CONTROL_FOLDER)}
    missing = {name: {number for sized in shares for number in sized.missing(name)} for name in parts}
    mesh, dtype = make_mesh(config.mesh, jax.local_devices()), jnp.dtype(config.model.dtype)
    pipeline = configured_pipeline(config, mesh)
    if words := [share.prompts[number] for number in sorted(references.union(*missing.values()))]:
        pipeline.embedder.unpadded([*words, config.sampler.negative_prompt], config.text_length)
    for sized in shares:
        make_reference(pipeline, sized)
    for name in (name for name in parts if missing[name]):
        pipeline.drop_transformer()
        model = load_transformer(parts[name], dtype, mesh, inference=True)
        model.set_mesh(mesh, config.mesh.exchange)
        compared = pipeline.with_transformer(model)
        for sized in shares:
            compare(compared, sized, name)
        del model, compared
        free_dropped_models()


def finish_comparison(
    config: ConfigDict,
    names: dict[str, str],
    prompts: Sequence[str],
    folder: epath.Path,
    durations: Sequence[int],
    report: str | None,
) -> dict[str, Any]:
    """Writes and prints the means of all numbers; returns them."""
    result = collect(config, {**names, CONTROL: CONTROL_FOLDER}, len(prompts), folder, durations)
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


def make_reference(pipeline: Pipeline, share: Share) -> None:
    """Writes the teacher's video and trajectory of every prompt, and the numbers of the control."""
    config, prompts = share.config, share.prompts
    kept = list(evenly_spaced_steps(config.sampler.steps, min(STEPS, config.sampler.steps)))
    for numbers, on_step in share.batches(TEACHER, share.missing(TEACHER, CONTROL_FOLDER)):
        texts = [prompts[number] for number in numbers]
        sources = [(config.seed, number) for number in numbers]
        latents, trajectory = pipeline.sample(texts, config, sources=sources, record=kept, on_step=on_step)
        trajectory = np.asarray(trajectory)
        videos, velocity = pipeline.decode(latents), velocities(pipeline, config, texts, trajectory)
        for row, number in enumerate(numbers):
            file = share.file(TEACHER, number)
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary, temporary.open("wb") as stream:
                np.savez(stream, way=trajectory[:, row], velocity=velocity[:, row], video=videos[row])
        others = [((config.seed + 1) % 2**32, number) for number in numbers]
        latents, _ = pipeline.sample(texts, config, sources=others)
        for number, video, other in zip(numbers, videos, pipeline.decode(latents), strict=True):
            found = video_numbers(other, video, prompts[number], share.networks)
            write_numbers(share.file(CONTROL_FOLDER, number), found)


def compare(pipeline: Pipeline, share: Share, name: str) -> None:
    """Writes the numbers of the pipeline's transformer, one file a prompt, to the folder `name`."""
    config, prompts = share.config, share.prompts
    for numbers, on_step in share.batches(name, share.missing(name)):
        texts, teachers = [prompts[number] for number in numbers], []
        for number in numbers:
            with share.file(TEACHER, number).open("rb") as stream:
                teachers.append(dict(np.load(stream)))
        sources = [(config.seed, number) for number in numbers]
        latents, _ = pipeline.sample(texts, config, sources=sources, on_step=on_step)
        videos = pipeline.decode(latents)
        velocity = velocities(pipeline, config, texts, np.stack([teacher["way"] for teacher in teachers], axis=1))
        for row, (number, teacher) in enumerate(zip(numbers, teachers, strict=True)):
            found = video_numbers(videos[row], teacher["video"], prompts[number], share.networks)
            found |= velocity_numbers(velocity[:, row], teacher["velocity"])
            write_numbers(share.file(name, number), found)


def velocities(
    pipeline: Pipeline, config: ConfigDict, prompts: Sequence[str], trajectories_SxBxTxHxWxC: np.ndarray
) -> np.ndarray:
    """The transformer's velocity, guided as in sampling, at every x_t of trajectories: float32 [S, B, T, H, W, C]."""
    sampler = config.sampler
    schedule_rows = schedule(sampler.solver, sampler.steps, sampler.shift, sampler.timesteps)
    rows = pipeline.filled(len(prompts), config)
    text = pipeline.embed([prompts[row] for row in rows], config.text_length)
    negative_text = None if sampler.guidance == 1 else pipeline.embed([sampler.negative_prompt], config.text_length)
    timesteps = schedule_rows.timestep[evenly_spaced_steps(sampler.steps, len(trajectories_SxBxTxHxWxC))]
    guidance = sampler.guidance, sampler.guidance_batched
    per_step = [
        np.asarray(_velocity(pipeline.transformer, text, negative_text, x[rows], timestep, *guidance), np.float32)
        for x, timestep in zip(trajectories_SxBxTxHxWxC, timesteps, strict=True)
    ]
    found = np.stack(per_step)[:, : len(prompts)]
    check_finite(found, "fidelity: velocities by step and prompt")
    return found


@functools.partial(jax.jit, static_argnames=("guidance", "batched"))
def _velocity(transformer, text, negative_text, x, timestep, guidance, batched):
    return guided_velocity(transformer, text, negative_text, guidance, batched)(x, jnp.full(x.shape[0], timestep))
