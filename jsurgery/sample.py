"""sample: prompts to video files with a model folder."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from jsurgery.config import check_text
from jsurgery.data.video_writer import SUFFIXES, check_suffix, read_settings, write_video
from jsurgery.errors import InputError
from jsurgery.io.fields import describe_changes
from jsurgery.io.files import read_object
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.load_config import load_config
from jsurgery.runtime.mesh import check_heads, make_mesh
from jsurgery.runtime.progress import Progress, say
from jsurgery.wan.checkpoint import read_config
from jsurgery.wan.model_folder import check_pipeline, model_path, pipeline_folder, transformer_folder
from jsurgery.wan.models import CONFIGS, SCHEDULERS
from jsurgery.wan.pipeline import load_pipeline
from jsurgery.wan.video_size import check_size


def sampling_config(name: str | None, overrides: dict[str, str]) -> ConfigDict:
    """The config of `name`; without one, the one for the model's size, with its scheduler's solver and shift."""
    overrides = {"trace.keep_steps": "1"} | overrides  # a rule of `trace` that would forbid few steps
    if name is None:
        folder = model_path(overrides.setdefault("model.path", "tiny_wan"))
        name = CONFIGS.get(read_config(transformer_folder(folder)).dim, "tiny")
        overrides = scheduler_settings(pipeline_folder(folder)) | overrides
    return load_config(name, overrides)


def scheduler_settings(folder: epath.Path) -> dict[str, str]:
    """Overrides of the sampler from scheduler/scheduler_config.json, where it names a solver that we have."""
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.exists():
        return {}
    fields = read_object(file, "the config of a diffusers scheduler as JSON")
    solver, shift = SCHEDULERS.get(str(fields.get("_class_name")), (None, None))
    if solver is None or shift is None:
        return {}
    return {"sampler.solver": solver, "sampler.shift": str(fields.get(shift, 1.0))}


@dataclasses.dataclass(frozen=True)
class VideoRequest:
    """A video to make: its noise depends on the seed and the number alone (`Pipeline.sample`)."""

    file: pathlib.Path
    prompt: str
    seed: int
    number: int
    label: str = "sample"  # of its progress


def sample_videos(config: ConfigDict, prompts: Sequence[str], output: str, single: bool) -> Iterator[pathlib.Path]:
    """Makes the video of every prompt and yields its file: `output` itself, or `output`/0000.mp4 and so on.

    Numbered files that are there already are kept. Everything that can be checked without the weights is checked first.
    Raises InputError where a kept file was made with other settings.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("--prompt: expected a text, found an empty one")
    for prompt in prompts:
        check_text("--prompt", prompt)
    folder = pathlib.Path(output)
    files = [folder] if single else [folder / f"{number:04d}.mp4" for number in range(len(prompts))]
    jobs = [
        VideoRequest(file, prompt, config.seed, number, "sample" if single else f"sample {number + 1}/{len(files)}")
        for number, (file, prompt) in enumerate(zip(files, prompts, strict=True))
    ]
    missing = unfinished(config, jobs, again=single)
    prepare_output(folder, single)
    yield from make_videos(config, missing)


def unfinished(config: ConfigDict, jobs: Sequence[VideoRequest], again: bool = False) -> list[VideoRequest]:
    """The jobs whose file is not there yet, or with `again` all of them.

    Raises InputError, having read no weights, for a video that the model cannot make and for a file that was made with
    other settings.
    """
    model = check_pipeline(config.model.path)
    check_size(model, config.video.frames, config.video.height, config.video.width)
    check_heads(make_mesh(config.mesh, jax.local_devices()), model.num_attention_heads, config.mesh.exchange)
    if again:
        return list(jobs)
    identity = transformer_identity(config)
    missing = [job for job in jobs if not has_matching_video(job.file, settings(config, job, identity))]
    if len(missing) < len(jobs):
        say(f"sample: {len(jobs) - len(missing)} of {len(jobs)} videos are finished already")
    return missing


def make_videos(config: ConfigDict, jobs: Sequence[VideoRequest]) -> Iterator[pathlib.Path]:
    """Makes one video after the other and yields its file."""
    if not jobs:
        return
    identity = transformer_identity(config)
    mesh = make_mesh(config.mesh, jax.local_devices())
    pipeline = load_pipeline(config.model.path, jnp.dtype(config.model.dtype), mesh, config.mesh.exchange)
    for job in jobs:
        progress = Progress(job.label, config.sampler.steps)
        latents = pipeline.sample_by_steps([job.prompt], config, seed=job.seed, first=job.number, on_step=progress.show)
        progress.show(config.sampler.steps, last=True)
        video = pipeline.decode(latents)[0]
        write_video(job.file, video, config.video.fps, settings(config, job, identity))
        yield job.file


def transformer_identity(config: ConfigDict) -> str:
    return folder_fingerprint(transformer_folder(model_path(config.model.path)))


def settings(config: ConfigDict, job: VideoRequest, identity: str) -> dict[str, Any]:
    """What the pixels of a video depend on, for its metadata."""
    sampler = config.sampler.to_dict()
    del sampler["guidance_batched"]
    return {
        "prompt": job.prompt,
        "number": job.number,
        "seed": job.seed,
        **sampler,
        **config.video.to_dict(),
        "text_length": config.text_length,
        "dtype": config.model.dtype,
        "model": model_path(config.model.path).name,
        "transformer": identity,
    }


def has_matching_video(file: pathlib.Path, wanted: dict[str, Any]) -> bool:
    """Whether a video is there. Raises InputError when it was made with other settings."""
    if not file.exists():
        return False
    found = read_settings(file)
    if found != wanted:
        raise InputError(f"{file}: made with other settings: {describe_changes(found, wanted)}; use another --output")
    return True


def prepare_output(output: pathlib.Path, single: bool) -> None:
    """Makes the folder of the output. Raises InputError where a file of that name cannot be written."""
    try:
        if single:
            check_suffix(output)
            if output.is_dir():
                raise InputError(f"--output={output}: expected a file, found a folder")
            output.parent.mkdir(parents=True, exist_ok=True)
        else:
            if output.suffix in SUFFIXES:
                raise InputError(f"--output={output}: expected a folder for the videos of --prompts_file, found a file")
            output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={output}: {error.strerror}") from None
