"""The command `sample`: makes a video file from every prompt."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.config import check_text, recorded_section
from jsurgery.data.image_reader import GivenImage, read_image
from jsurgery.data.sprites import to_float
from jsurgery.data.video_writer import SUFFIXES, check_suffix, read_settings, write_video
from jsurgery.errors import InputError
from jsurgery.io.fields import describe_changes
from jsurgery.io.files import check_writable
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.load_config import load_config
from jsurgery.runtime.mesh import batch_shards, check_heads, make_mesh
from jsurgery.runtime.mesh_choice import sampling_batch
from jsurgery.runtime.progress import Progress, say
from jsurgery.wan.checkpoint import read_config
from jsurgery.wan.lora import check_loras, describe_loras, loras_of
from jsurgery.wan.memory import on_sampling_mesh
from jsurgery.wan.model_folder import check_pipeline, model_path, pipeline_folder, transformer_folder
from jsurgery.wan.model_sizes import find_sizes
from jsurgery.wan.models import takes_image
from jsurgery.wan.pipeline import batched, configured_pipeline
from jsurgery.wan.schedulers import say_replaced, scheduler_settings
from jsurgery.wan.tell_model import makers_settings, say_model, tell_model
from jsurgery.wan.video_size import check_size


def sampling_config(name: str | None, overrides: dict[str, str]) -> ConfigDict:
    """The config `name`; by default the config for the model, with the settings that its makers sample with.

    Of these, the solver and the shift are those of the folder's scheduler, unless the model takes few steps.
    """
    overrides = {"trace.keep_steps": "1"} | overrides  # else a rule for `trace` would forbid few steps
    if name is not None:
        return load_config(name, overrides)
    path = overrides.setdefault("model.path", "tiny_wan")
    base = pipeline_folder(model_path(path))  # first, since it names what a folder of another kind needs
    scheduler_settings(base)
    told = tell_model(path, overrides.get("model.kind", ""))
    say_model(path, told)
    settings, remarks = makers_settings(told.model, base, overrides)
    config = load_config(told.model.config, settings | overrides)
    if not {"sampler.solver", "sampler.shift"} <= overrides.keys():
        say_replaced(base, remarks, config.sampler.solver, config.sampler.shift)
    return config


@dataclasses.dataclass(frozen=True)
class VideoRequest:
    """A video to make. Its noise depends only on the seed and the number (`Pipeline.sample`)."""

    file: epath.Path
    prompt: str
    seed: int
    number: int
    label: str = "sample"  # of the progress line
    image: GivenImage | None = None  # the first frame


def sample_videos(
    config: ConfigDict, prompts: Sequence[str], output: str, single: bool, image: str | None = None
) -> Iterator[epath.Path]:
    """Makes the video of every prompt and yields its file: `output` itself, or `output`/0000.mp4 and so on.

    With the file of an `image`, all videos begin with it. Existing numbered files are kept. Everything that can be
    checked without the weights is checked first.
    Raises InputError if an existing file was made with other settings.
    """
    requests = video_requests(config, prompts, output, single, image)
    missing = unfinished(config, requests, again=single)
    prepare_output(epath.Path(output), single)
    yield from make_videos(config, missing)


def video_requests(
    config: ConfigDict, prompts: Sequence[str], output: str, single: bool, image: str | None = None
) -> list[VideoRequest]:
    """The videos that `sample_videos` is to make. Raises InputError for a bad prompt or image."""
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("--prompt: expected a text, found an empty one")
    for prompt in prompts:
        check_text("--prompt", prompt)
    given = None if image is None else first_frame(config, image)
    folder = epath.Path(output)
    files = [folder] if single else [folder / f"{number:04d}.mp4" for number in range(len(prompts))]
    return [
        VideoRequest(
            file, prompt, config.seed, number, "sample" if single else f"sample {number + 1}/{len(files)}", given
        )
        for number, (file, prompt) in enumerate(zip(files, prompts, strict=True))
    ]


def first_frame(config: ConfigDict, file: str) -> GivenImage:
    """The image in a file, in the size of `config.video`. Reads no weights.

    Raises InputError for a file that is no image, and for a model that makes videos from text alone.
    """
    path, video = config.model.path, config.video
    network = read_config(transformer_folder(model_path(path)))
    if not takes_image(network.in_channels):
        raise InputError(f"--image={file}: {path} makes videos from text alone; expected a Wan2.2 TI2V 5B")
    check_size(network, video.frames, video.height, video.width)
    return read_image(file, video.height, video.width)


def unfinished(
    config: ConfigDict,
    requests: Sequence[VideoRequest],
    again: bool = False,
    place: Callable[[ConfigDict, int], ConfigDict] | None = None,
) -> list[VideoRequest]:
    """The requests whose file does not exist yet; with `again`, all of them. Reads no weights.

    `place` gives a config for so many videos its mesh, by default `on_mesh`.

    Raises InputError for a video that the model cannot make, and for an existing file made with other settings.
    """
    model = check_pipeline(config.model.path)
    check_loras(model, loras_of(config))
    check_size(model, config.video.frames, config.video.height, config.video.width)
    config = (place or on_mesh)(config, len(requests))
    mesh = make_mesh(config.mesh, jax.local_devices())
    check_heads(mesh, model.num_attention_heads, config.mesh.exchange, model.rates)
    if again:
        return list(requests)
    identity = transformer_identity(config)
    missing = [
        request for request in requests if not has_matching_video(request.file, settings(config, request, identity))
    ]
    if len(missing) < len(requests):
        say(f"sample: {len(requests) - len(missing)} of {len(requests)} videos are finished already")
    return missing


def make_videos(config: ConfigDict, requests: Sequence[VideoRequest]) -> Iterator[epath.Path]:
    """Makes the videos, at once as many as keep the whole mesh busy, and yields each file."""
    if not requests:
        return
    identity, config = transformer_identity(config), on_mesh(config, len(requests))
    mesh = make_mesh(config.mesh, jax.local_devices())
    pipeline = configured_pipeline(config, mesh)
    words = [request.prompt for request in requests] + [config.sampler.negative_prompt]
    pipeline.embedder.unpadded(words, config.text_length)
    images = {request.image.sha256: request.image for request in requests if request.image is not None}
    first_frames = {name: pipeline.encode(to_float(image.pixels)[None, None]) for name, image in images.items()}
    whole = Progress("videos", len(requests))
    for first, batch in batched(requests, batch_shards(mesh)):
        label = batch[0].label if len(batch) == 1 else f"{batch[0].label} to {batch[-1].label}"
        progress = Progress(label, config.sampler.steps)
        given = [first_frames[request.image.sha256] for request in batch if request.image is not None]
        latents, _ = pipeline.sample(
            [request.prompt for request in batch],
            config,
            sources=[(request.seed, request.number) for request in batch],
            given=np.concatenate(given) if given else None,
            on_step=progress.show,
        )
        progress.show(config.sampler.steps, last=True)
        for request, video in zip(batch, pipeline.decode(latents), strict=True):
            write_video(request.file, video, config.video.fps, settings(config, request, identity))
            yield request.file
        whole.show(first + len(batch))


def on_mesh(config: ConfigDict, videos: int) -> ConfigDict:
    """The config with a mesh of this process's devices, on which as many videos are sampled at once as pays."""
    batch = sampling_batch(videos, jax.local_device_count())
    return on_sampling_mesh("sample", config, find_sizes(config, ""), batch)


def transformer_identity(config: ConfigDict) -> str:
    return folder_fingerprint(transformer_folder(model_path(config.model.path)))


def settings(config: ConfigDict, request: VideoRequest, identity: str) -> dict[str, Any]:
    """The settings that a video's pixels depend on, for its metadata."""
    loras = describe_loras(loras_of(config))
    return {
        "prompt": request.prompt,
        "number": request.number,
        "seed": request.seed,
        **{name: listed(value) for name, value in recorded_section(config, "sampler", ["guidance_batched"]).items()},
        **recorded_section(config, "video"),
        "text_length": config.text_length,
        "dtype": config.model.dtype,
        "model": model_path(config.model.path).name,
        "transformer": identity,
        **({} if request.image is None else {"image": request.image.sha256}),
    } | ({"loras": loras} if loras else {})


def listed(value: Any) -> Any:
    """A value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def has_matching_video(file: epath.Path, expected: dict[str, Any]) -> bool:
    """Whether the video exists. Raises InputError if it was made with other settings than `expected`."""
    if not file.exists():
        return False
    recorded = read_settings(file)
    if recorded != expected:
        raise InputError(
            f"{file}: made with other settings: {describe_changes(recorded, expected)}; use another --output"
        )
    return True


def prepare_output(output: epath.Path, single: bool) -> None:
    """Creates the output's folder. Raises InputError if videos cannot be written to that path."""
    if single:
        check_suffix(output)
    elif output.suffix in SUFFIXES:
        raise InputError(f"--output={output}: expected a folder for the videos of --prompts_file, found a file")
    check_writable(output if single else output / "0000.mp4", "--output")
