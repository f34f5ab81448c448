"""The bytes that phases of a command hold on each device, by arithmetic from a config, a model's sizes and a mesh.

What is `held` stays on the device through a phase: it is counted exactly, from shapes and shardings. `working` is what
the phase's largest program needs beside it: an estimate, by formulas that `jsurgery compile` checks.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.diffusion import velocities_per_step
from jsurgery.rates import Rate
from jsurgery.runtime.mesh import LOGICAL, batch_shards, parameter_shardings
from jsurgery.runtime.mesh_choice import choose_mesh, device_memory
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.cost import added_parameters
from jsurgery.wan.low_rank import add_low_rank, trained_with_low_rank
from jsurgery.wan.model_config import TextEncoderConfig, VaeConfig, WanConfig
from jsurgery.wan.model_sizes import ModelSizes
from jsurgery.wan.prompt_embedder import BATCH, PASS
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.vae import WanVae
from jsurgery.wan.vae_cost import kept_bytes
from jsurgery.wan.video_size import latent_grid, num_tokens


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a command during which the same things lie on the devices.

    Attributes:
      name: what is done, such as "sampling".
      held: {what: bytes a device}.
      working: bytes a device of the largest program's own arrays.
      program: the name of that program in `estimate.programs`.
    """

    name: str
    held: Mapping[str, int]
    working: int
    program: str

    @property
    def bytes(self) -> int:
        return sum(self.held.values()) + self.working


def device_bytes(shapes: Any, shardings: Any) -> int:
    """The bytes that a device holds of a tree of arrays or shapes."""
    sizes = jax.tree.map(
        lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize, shapes, shardings
    )
    return sum(jax.tree.leaves(sizes))


def abstract_transformer(config: ConfigDict, network: WanConfig, *, inference: bool) -> WanTransformer:
    """The transformer with shapes for parameters, as `load_transformer` makes it."""
    return _abstract_transformer(network, config.model.dtype, inference, remat=config.model.remat)


def _abstract_transformer(network: WanConfig, dtype: str, inference: bool, **options: str) -> WanTransformer:
    model = abstract_module(WanTransformer, network, dtype=jnp.dtype(dtype), **options)
    if inference:
        model.store_in_compute_dtype()
    return model


def weights(config: ConfigDict, network: WanConfig, mesh: Mesh | AbstractMesh, *, inference: bool) -> int:
    """The bytes of a transformer's weights on a device."""
    return _weights(network, config.model.dtype, mesh, inference)


@functools.lru_cache
def _weights(network: WanConfig, dtype: str, mesh: Mesh | AbstractMesh, inference: bool) -> int:
    state = nnx.state(_abstract_transformer(network, dtype, inference))
    return device_bytes(state, parameter_shardings(mesh, state))


def low_rank_weights(config: ConfigDict, network: WanConfig, mesh: Mesh | AbstractMesh) -> int:
    """The bytes a device of what fine-tuning with a `lora_rank` trains: low-rank changes and feature maps."""
    model = abstract_transformer(config, network, inference=True)
    add_low_rank(model, config.finetune.lora_rank)
    trained = nnx.state(model, trained_with_low_rank)
    return device_bytes(trained, parameter_shardings(mesh, trained))


def parameter_bytes(config: ConfigDict, network: WanConfig) -> int:
    """The bytes of a transformer's parameters as training keeps them, in float32."""
    state = nnx.state(abstract_transformer(config, network, inference=False))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def hybrid_network(config: ConfigDict, network: WanConfig, rates: tuple[Rate, ...]) -> WanConfig:
    """The network with these rates, one for each block."""
    return dataclasses.replace(network, hybrid=HybridConfig.of(config, rates))


def latents_bytes(config: ConfigDict, network: WanConfig, itemsize: int = 4) -> int:
    """The bytes of a clip's latents."""
    video = config.video
    return (
        math.prod(latent_grid(video.frames, video.height, video.width, network.strides))
        * network.in_channels
        * itemsize
    )


def text_phase(encoder: TextEncoderConfig, config: ConfigDict, prompts: int) -> Phase:
    """Embedding of prompts, layer by layer (`PromptEmbedder`). Prompts are taken to be as long as they may be."""
    width = jnp.dtype(config.model.dtype).itemsize
    inner = encoder.num_heads * encoder.d_kv
    layer = 4 * encoder.d_model * inner + 3 * encoder.d_model * encoder.d_ff
    states = min(prompts, PASS) * config.text_length * encoder.d_model
    batch = min(prompts, BATCH) * config.text_length
    working = batch * (2 * encoder.d_ff + 6 * encoder.d_model) + 2 * batch * config.text_length * encoder.num_heads
    held = {"two layers of the text encoder": 2 * layer * width, "states of the prompts": states * width}
    return Phase("text encoder", held, working * width, "text")


def sampling_phase(
    config: ConfigDict,
    network: WanConfig,
    mesh: Mesh | AbstractMesh,
    batch: int,
    *,
    program: str = "sample",
) -> Phase:
    """Sampling of `batch` prompts at once."""
    latents, text = latents_bytes(config, network), config.text_length * network.text_dim * 4
    guided = velocities_per_step(config.sampler.guidance)
    at_once = guided if config.sampler.guidance_batched else 1
    states = {"weights": weights(config, network, mesh, inference=True)}
    states["state of the sampler"] = batch * (4 * latents + text) + (guided - 1) * text
    working = forward_bytes(config, network, mesh, at_once * batch) + 4 * at_once * batch * latents
    return Phase("sampling", states, working, program)


def tokens_of(config: ConfigDict, network: WanConfig) -> int:
    """The tokens of a clip."""
    return num_tokens(config.video.frames, config.video.height, config.video.width, network)


def tokens_on_device(config: ConfigDict, network: WanConfig, mesh: Mesh | AbstractMesh, batch: int) -> int:
    """The tokens of a batch that a device computes."""
    return math.ceil(batch / batch_shards(mesh)) * math.ceil(
        tokens_of(config, network) / mesh.shape[LOGICAL["sequence"]]
    )


def forward_bytes(config: ConfigDict, network: WanConfig, mesh: Mesh | AbstractMesh, batch: int) -> int:
    """The arrays of a forward pass at its largest, without weights: a block's tokens, queries, keys, values and so on.

    The feed-forward layer's input and hidden tokens, or the attention's, whichever are more. Under `fsdp` also the
    weights of a block, gathered.
    """
    width, tensor = jnp.dtype(config.model.dtype).itemsize, mesh.shape[LOGICAL["heads"]]
    tokens = tokens_on_device(config, network, mesh, batch)
    shards = mesh.shape[LOGICAL["sequence"]]
    attention = 3 * network.dim + 4 * network.dim // tensor + (2 * network.dim // tensor * shards if shards > 1 else 0)
    feed_forward = 3 * network.dim + 2 * network.ffn_dim // tensor
    return width * tokens * max(attention, feed_forward) + gathered_block(network, mesh, width)


def backward_bytes(config: ConfigDict, network: WanConfig, mesh: Mesh | AbstractMesh, batch: int) -> int:
    """The arrays of a forward and backward pass, without weights and gradients.

    These are the inputs of all blocks, what the backward pass of one block keeps (without `remat`, of all blocks), and
    copies of the feature maps of all blocks. The factors are those of programs compiled for v5e and v6e, at 12,600 and
    32,760 tokens.
    """
    width, tensor = jnp.dtype(config.model.dtype).itemsize, mesh.shape[LOGICAL["heads"]]
    tokens = tokens_on_device(config, network, mesh, batch)
    one_block = tokens * width * (28 * network.dim + 6 * network.ffn_dim // tensor)
    inputs = network.num_layers * tokens * width * network.dim
    blocks = 1 if config.model.remat == "blocks" else network.num_layers
    hybrid, maps = network.hybrid, 0
    if hybrid is not None and hybrid.linear_branch:
        maps = 7 * 4 * added_parameters(network, hybrid.feature_map, [2] * network.num_layers) // tensor
    return inputs + blocks * one_block + maps + gathered_block(network, mesh, width)


def gathered_block(network: WanConfig, mesh: Mesh | AbstractMesh, width: int) -> int:
    """The weights of a block that a device gathers under `fsdp`, while those of the next one arrive."""
    if mesh.shape[LOGICAL["embed"]] == 1:
        return 0
    return 2 * width * (8 * network.dim**2 + 2 * network.dim * network.ffn_dim) // mesh.shape[LOGICAL["heads"]]


def vae_weights(config: ConfigDict, vae: VaeConfig) -> int:
    """The bytes of the VAE's weights, which are whole on every device."""
    return vae_itemsize(config) * vae_parameters(vae)


@functools.lru_cache(16)
def vae_parameters(vae: VaeConfig) -> int:
    """The number of the VAE's parameters."""
    state = nnx.state(abstract_module(WanVae, vae))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def vae_itemsize(config: ConfigDict) -> int:
    """The bytes of a number in the VAE."""
    return jnp.dtype(config.model.vae_dtype).itemsize


def chunk_bytes(config: ConfigDict, vae: VaeConfig, dim: int) -> int:
    """The VAE's own arrays while it computes a chunk: those of some fifty frames of its first width, by compiling."""
    pixels = config.video.height * config.video.width // (vae.patch_size or 1) ** 2
    return vae_itemsize(config) * pixels * 52 * dim


def encoding_phase(config: ConfigDict, sizes: ModelSizes) -> Phase:
    """Encoding of one clip on a device, four frames at a time (`WanVae.encode_in_chunks`)."""
    vae = sizes.vae
    kept, _ = kept_bytes(vae, config.video.height, config.video.width, vae_itemsize(config))
    held = {"VAE": vae_weights(config, vae), "frames between chunks": kept}
    return Phase("encoding", held, chunk_bytes(config, vae, vae.base_dim), "encode")


def decoding_phase(config: ConfigDict, sizes: ModelSizes, held: Mapping[str, int]) -> Phase:
    """Decoding of one clip on a device, a latent frame at a time (`WanVae.decode_in_chunks`)."""
    vae = sizes.vae
    _, kept = kept_bytes(vae, config.video.height, config.video.width, vae_itemsize(config))
    working = chunk_bytes(config, vae, vae.decoder_base_dim or vae.base_dim)
    return Phase("decoding", dict(held) | {"frames between chunks": kept}, working, "decode")


def sampling_phases(
    config: ConfigDict,
    sizes: ModelSizes,
    mesh: Mesh | AbstractMesh,
    batch: int,
    prompts: int,
    *,
    program: str = "sample",
) -> list[Phase]:
    """The phases of sampling videos of `prompts`, of which `batch` are sampled at once, and of decoding them.

    The VAE stays after the first video.
    """
    sampling = sampling_phase(config, sizes.transformer, mesh, batch, program=program)
    held = dict(sampling.held) | {"VAE": vae_weights(config, sizes.vae)}
    text = text_phase(sizes.text_encoder, config, prompts + 1)  # and the negative prompt
    return [text, dataclasses.replace(sampling, held=held), decoding_phase(config, sizes, held)]


def on_sampling_mesh(
    command: str,
    config: ConfigDict,
    sizes: ModelSizes,
    batch: int,
    devices: Sequence[Any] | int | None = None,
    capacity: int | None = None,
    **options: Any,
) -> ConfigDict:
    """The config of a command that samples, with the mesh that it names or that `choose_mesh` finds.

    `devices` are by default those of this process, and `capacity` the memory that the first of them reports. Raises
    DoesNotFit, with the numbers, where a device has too little memory.
    """
    if devices is None:
        devices = jax.local_devices()
        capacity = device_memory(devices[0])
    peak = lambda mesh: max(phase.bytes for phase in sampling_phases(config, sizes, mesh, batch, batch))
    heads = sizes.transformer.num_attention_heads
    options |= {"rates": sizes.transformer.rates}
    return choose_mesh(command, config, batch, heads, peak, devices, capacity, **options)
