"""`sample --stream`: makes videos chunk after chunk, in memory that does not grow with their length."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.data.sprites import to_float
from jsurgery.data.video_writer import growing_mp4
from jsurgery.errors import InputError
from jsurgery.io.files import temporary_name
from jsurgery.runtime.mesh import make_mesh
from jsurgery.runtime.mesh_choice import device_memory
from jsurgery.runtime.progress import Progress, say
from jsurgery.sample import VideoRequest, prepare_output, settings, transformer_identity, unfinished, video_requests
from jsurgery.wan.checkpoint import read_config
from jsurgery.wan.model_folder import model_path, transformer_folder
from jsurgery.wan.model_sizes import find_sizes
from jsurgery.wan.pipeline import Pipeline, configured_pipeline
from jsurgery.wan.streaming import latent_chunks, stream_latents, streamed_kinds
from jsurgery.wan.streaming_memory import describe_stream, on_streaming_mesh
from jsurgery.wan.video_size import check_size


def stream_videos(
    config: ConfigDict, prompts: Sequence[str], output: str, single: bool, image: str | None = None
) -> Iterator[epath.Path]:
    """As `sample.sample_videos`, one video after the other, and each chunk after chunk.

    While a video is made, its file lies beside it, under a temporary name, and can be played (`growing_mp4`).
    Raises InputError for a model that cannot be streamed, and DoesNotFit where what is carried from chunk to chunk
    leaves no room.
    """
    check_stream(config, output if single else None)
    requests = video_requests(config, prompts, output, single, image)
    missing = unfinished(config, requests, again=single, place=lambda config, _: placed(config, lambda line: None))
    prepare_output(epath.Path(output), single)
    yield from make_streams(config, missing)


def check_stream(config: ConfigDict, output: str | None) -> None:
    """Raises InputError for settings that a stream does not have, for an `output` that is no mp4, and for a model."""
    if config.sampler.noise != "frame":
        raise InputError(f"config.sampler.noise: expected 'frame' for --stream, found {config.sampler.noise!r}")
    if output is not None and epath.Path(output).suffix != ".mp4":
        raise InputError(f"--output={output}: expected a name that ends in .mp4 for --stream")
    if not config.model.path:
        raise InputError("config.model.path: (empty): expected the folder of a converted model for --stream")
    network = read_config(transformer_folder(model_path(config.model.path)))
    streamed_kinds(network, config.model.path)
    check_size(network, config.video.frames, config.video.height, config.video.width)


def placed(config: ConfigDict, tell: Callable[[str], None] = say) -> ConfigDict:
    """The config with a mesh of this process's devices for a stream, of which one is made at a time."""
    devices = jax.local_devices()
    return on_streaming_mesh(config, find_sizes(config, ""), devices, device_memory(devices[0]), tell)


def make_streams(config: ConfigDict, requests: Sequence[VideoRequest]) -> Iterator[epath.Path]:
    """Makes the videos, and yields each file."""
    if not requests:
        return
    identity, config = transformer_identity(config), placed(config)
    say(f"stream: {describe_stream(config, find_sizes(config, '').transformer)}")
    pipeline = configured_pipeline(config, make_mesh(config.mesh, jax.local_devices()))
    words = [request.prompt for request in requests] + [config.sampler.negative_prompt]
    pipeline.embedder.unpadded(words, config.text_length)
    size = config.video.height, config.video.width
    for request in requests:
        growing = temporary_name(request.file.name, request.file.suffix)
        say(f"{request.label}: {growing} can be played as it grows; it becomes {request.file}")
        pieces = stream_frames(pipeline, config, request)
        first = next(pieces)  # before there is a file
        with growing_mp4(request.file, size, config.video.fps, settings(config, request, identity)) as append:
            for frames in itertools.chain([first], pieces):
                append(frames)
        yield request.file


def stream_frames(pipeline: Pipeline, config: ConfigDict, request: VideoRequest) -> Iterator[np.ndarray]:
    """The frames of a video as they are finished, uint8 [F, H, W, 3]: those of every latent frame in turn."""
    network, sampler = pipeline.transformer.config, config.sampler
    chunks = len(latent_chunks(network, streamed_kinds(network, config.model.path), config.video.frames))
    progress = Progress(f"{request.label}, chunks", chunks)

    def on_step(chunk: int, done: int) -> None:
        progress.show(chunk + 1 if done == sampler.steps else chunk + done / sampler.steps)

    image = request.image
    latents = stream_latents(
        pipeline.transformer,
        config,
        pipeline.embed([request.prompt], config.text_length),
        None if sampler.guidance == 1 else pipeline.embed([sampler.negative_prompt], config.text_length),
        source=(request.seed, request.number),
        given=None if image is None else pipeline.encode(to_float(image.pixels)[None, None]),
        on_step=on_step,
    )
    yield from pipeline.decode_as_they_come(latents)
    progress.show(chunks, last=True)
