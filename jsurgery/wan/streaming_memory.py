"""The memory of a stream: what it carries from chunk to chunk, its phases, and the mesh that holds it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from jsurgery.errors import DoesNotFit, InputError
from jsurgery.runtime.mesh import AXES, LOGICAL, abstract_mesh, is_given, mesh_sizes
from jsurgery.runtime.mesh_choice import GIB, USABLE, can_be_made, check_memory, describe_mesh, with_mesh
from jsurgery.runtime.progress import say
from jsurgery.wan.memory import Phase, decoding_phase, sampling_phase, text_phase, vae_weights
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_sizes import ModelSizes
from jsurgery.wan.streaming import carried_shapes, forwards_per_step, latent_chunks, settled_after, streamed_kinds
from jsurgery.wan.video_size import latent_grid


def carried_by_step(config: ConfigDict, network: WanConfig) -> int:
    """The bytes that one step of the sampler carries from chunk to chunk, of all its forwards and blocks."""
    kinds, video = streamed_kinds(network, config.model.path), config.video
    forwards, batch = forwards_per_step(config)
    latents = latent_grid(video.frames, video.height, video.width, network.strides)
    frames, height, width = network.token_grid(latents)
    before = min(frames, settled_after(kinds))
    shapes = carried_shapes(network, kinds, height * width, batch, jnp.dtype(config.model.dtype), before)
    return forwards * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def describe_stream(config: ConfigDict, network: WanConfig) -> str:
    """The chunks of a stream and what is carried between them, in a line."""
    kinds = streamed_kinds(network, config.model.path)
    chunks = len(latent_chunks(network, kinds, config.video.frames))
    carried = config.sampler.steps * carried_by_step(config, network)
    forwards, batch = forwards_per_step(config)
    frames = "1 latent frame" if kinds[0].chunk == 1 else f"{kinds[0].chunk} latent frames"
    branches = "without guidance" if forwards * batch == 1 else f"{forwards * batch} guidance branches"
    return (
        f"{chunks} chunks of {frames}; {carried:,} bytes ({carried / GIB:.2f} GiB) are carried from one to the next: "
        f"{config.sampler.steps} steps, {branches}, {len(kinds)} blocks"
    )


def streaming_phases(config: ConfigDict, sizes: ModelSizes, mesh: Mesh | AbstractMesh, prompts: int) -> list[Phase]:
    """The phases of streaming videos of `prompts`, one after the other. A chunk's frames are decoded after it."""
    network, tensor = sizes.transformer, mesh.shape[LOGICAL["heads"]]
    kinds = streamed_kinds(network, config.model.path)
    chunk = one_chunk(config, network)
    sampling = sampling_phase(chunk, network, mesh, 1)
    decoding = decoding_phase(config, sizes, {})
    step = carried_by_step(config, network) // tensor
    held = dict(sampling.held) | {"carried": config.sampler.steps * step, "VAE": vae_weights(config, sizes.vae)}
    held |= decoding.held
    # A step's carried arrays before and after it, and the keys and values of a block's window.
    _, batch = forwards_per_step(config)
    _, height, width = network.token_grid(latent_grid(1, config.video.height, config.video.width, network.strides))
    window = (kinds[0].chunk + max(kind.overlap for kind in kinds)) * height * width
    itemsize = jnp.dtype(config.model.dtype).itemsize
    working = sampling.working + 2 * step + 2 * batch * window * network.dim // tensor * itemsize
    text = text_phase(sizes.text_encoder, config, prompts + 1)  # and the negative prompt
    return [text, Phase("streaming", held, max(working, decoding.working), sampling.program)]


def one_chunk(config: ConfigDict, network: WanConfig) -> ConfigDict:
    """The config with a video as long as a chunk, or as it is if that is shorter."""
    _, end = latent_chunks(network, streamed_kinds(network, config.model.path), config.video.frames)[0]
    with config.unlocked():
        copy = config.copy_and_resolve_references()
    copy.video.frames = (end - 1) * network.strides[0] + 1
    return copy.lock()


def on_streaming_mesh(
    config: ConfigDict,
    sizes: ModelSizes,
    devices: Sequence[Any] | int,
    capacity: int | None,
    tell: Callable[[str], None] = say,
) -> ConfigDict:
    """The config with the mesh of a stream: what it names, or the fewest devices that hold it, which share the heads.

    `devices` and `capacity` are those of `choose_mesh`. Raises DoesNotFit, with the numbers, where the devices have
    too little memory, and InputError for a mesh that is given with other axes than `tensor`.
    """
    heads, tensor = sizes.transformer.num_attention_heads, LOGICAL["heads"]
    count = devices if isinstance(devices, int) else len(devices)
    given = mesh_sizes(config.mesh)
    if other := [axis for axis in AXES if axis != tensor and given[axis] > 1]:
        raise InputError(
            f"config.mesh.{other[0]}: a stream divides heads alone, along {tensor}; found {given[other[0]]}"
        )
    choices = [size for size in range(1, count + 1) if heads % size == 0]
    found = []
    for size in [given[tensor]] if is_given(config.mesh) else choices:
        chosen = with_mesh(config, dict.fromkeys(AXES, 1) | {tensor: size})
        phases = streaming_phases(chosen, sizes, abstract_mesh(chosen.mesh), 1)
        found.append((max(phase.bytes for phase in phases), size))
        fits = capacity is None or found[-1][0] <= USABLE * capacity
        if fits and (is_given(config.mesh) or isinstance(devices, int) or can_be_made(chosen.mesh, devices)):
            if count > 1:
                tell(f"stream: {describe_mesh(mesh_sizes(chosen.mesh))} of {count} devices")
            return chosen
    needed, size = min(found)
    devices_text = "1 device" if size == 1 else f"{size} devices"
    check_memory("sample --stream", needed, capacity, f"at best, on {devices_text}; fewer steps carry less")
    raise DoesNotFit(f"sample --stream: {count} devices make up no mesh that holds it; name one by config.mesh")
