"""The programs of commands, lowered from shapes alone: no array is made, and no device is needed.

Each is the function that the command itself runs, with the shapes and shardings that it gets there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from jsurgery.diffusion import State, schedule, velocities_per_step
from jsurgery.runtime.mesh import batch_shards, check_batch, parameter_shardings, sharding
from jsurgery.runtime.optimizer import adamw, initial_train_state
from jsurgery.surgery import finetune
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, measure_heads
from jsurgery.surgery.distillation.update import initial_maps, make_optimizer, make_update
from jsurgery.surgery.distillation.while_sampling import make_sampling_update
from jsurgery.surgery.phases import planned_forward, planned_rates
from jsurgery.surgery.plan_forward import plan_velocity
from jsurgery.train import transformer as training
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.cost import distillation_flops, model_flops, workload
from jsurgery.wan.guidance import sampling_step
from jsurgery.wan.low_rank import add_low_rank
from jsurgery.wan.memory import abstract_transformer, hybrid_network
from jsurgery.wan.model_config import VaeConfig, WanConfig
from jsurgery.wan.model_sizes import ModelSizes
from jsurgery.wan.prompt_embedder import BATCH, run_layer
from jsurgery.wan.text_encoder import Block, mask_bias
from jsurgery.wan.torch_layout import mirrored_shapes
from jsurgery.wan.vae import WanVae, decode_chunk, encode_chunk
from jsurgery.wan.video_size import latent_grid


def lowered(program: str, config: ConfigDict, sizes: ModelSizes, mesh: Mesh) -> Any:
    """The lowered program (`jax.stages.Lowered`) of this name, on a mesh."""
    return PROGRAMS[program](config, sizes, mesh)


def trained_sizes(config: ConfigDict) -> ModelSizes:
    """The sizes of the models that `train` trains; the VAE's, which training here does not read, are Wan2.1's."""
    return ModelSizes("trained", *training.model_configs(config.train, config.train.vocabulary), VaeConfig())


def abstract_model(
    config: ConfigDict, network: WanConfig, mesh: Mesh, *, inference: bool
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's graph definition, and its parameters as shapes with shardings."""
    model = abstract_transformer(config, network, inference=inference)
    model.set_mesh(mesh, config.mesh.exchange)
    graph, params = nnx.split(model)
    return graph, with_shardings(params, parameter_shardings(mesh, params))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings. `shardings` is one sharding for all leaves, or a tree with one for each."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    struct = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(struct, shapes, shardings)


def inputs(config: ConfigDict, network: WanConfig, where: NamedSharding, batch: int) -> tuple[Any, Any, Any]:
    """Shapes of a batch: latents [B, T, H, W, C], text embeddings [B, L, text_dim], timesteps [B]."""
    video = config.video
    grid = latent_grid(video.frames, video.height, video.width, network.strides)
    shapes = (
        jax.ShapeDtypeStruct((batch, *grid, network.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((batch, config.text_length, network.text_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.float32),
    )
    return with_shardings(shapes, where)


def spread_inputs(config: ConfigDict, network: WanConfig, mesh: Mesh, batch: int) -> tuple[Any, Any, Any]:
    """`inputs` with the rows of the batch spread over the mesh. Raises DoesNotFit if it does not divide them."""
    check_batch(mesh, batch)
    return inputs(config, network, sharding(mesh, "batch"), batch)


def schedule_row(config: ConfigDict, mesh: Mesh) -> Any:
    """Shapes of one row of the sampler's schedule, on every device."""
    sampler = config.sampler
    row = jax.tree.map(np.asarray, schedule(sampler.solver, sampler.steps, sampler.shift, sampler.timesteps).row(0))
    return with_shardings(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), row), sharding(mesh))


def random_key(mesh: Mesh) -> Any:
    return with_shardings(jax.eval_shape(lambda: jax.random.key(0)), sharding(mesh))


def lowered_sample(config: ConfigDict, sizes: ModelSizes, mesh: Mesh) -> Any:
    """A step of the hybrid model's sampler, on a batch of `evaluate`."""
    rates = planned_rates(config, sizes.transformer.num_layers)
    network = hybrid_network(config, sizes.transformer, rates)
    return _lowered_step(config, network, mesh, config.evaluate.batch, config.sampler.solver)


def lowered_trace(config: ConfigDict, sizes: ModelSizes, mesh: Mesh) -> Any:
    """A step of the teacher's sampler, on a batch of `trace`."""
    return _lowered_step(config, sizes.transformer, mesh, config.trace.batch, config.trace.solver)


def _lowered_step(config: ConfigDict, network: WanConfig, mesh: Mesh, batch: int, solver: str) -> Any:
    model, sampler = nnx.merge(*abstract_model(config, network, mesh, inference=True)), config.sampler
    check_batch(mesh, batch)
    latents, text, _ = inputs(config, network, sharding(mesh), batch)
    negative_text = None if sampler.guidance == 1 else text.update(shape=(1, *text.shape[1:]))
    state, row = State(*[latents] * 4), schedule_row(config, mesh)
    key = random_key(mesh) if solver == "euler_ancestral" else None
    return sampling_step.lower(model, text, negative_text, state, row, key, sampler.guidance, sampler.guidance_batched)


def lowered_distill(config: ConfigDict, sizes: ModelSizes, mesh: Mesh) -> Any:
    network, sampler = sizes.transformer, config.sampler
    graph, params = abstract_model(config, network, mesh, inference=True)
    optimizer, spec = make_optimizer(config), DistillSpec.of(config)
    maps = abstract_maps(config, network, mesh)
    state = {"maps": maps, "opt_state": jax.eval_shape(optimizer.init, maps)}
    state = with_shardings(state, parameter_shardings(mesh, state))
    latents, text, timesteps = spread_inputs(config, network, mesh, config.distill.batch)
    if config.distill.mode == "traces":
        batch = {"latents": latents, "text": text, "timestep": timesteps}
        return make_update(optimizer, graph, spec).lower(state, params, batch)
    whole = sharding(mesh)
    update = make_sampling_update(optimizer, graph, spec, sampler.guidance, whole)
    negative_text = None if sampler.guidance == 1 else text
    trajectory = State(*[with_shardings(latents, whole)] * 4)
    return update.lower(state, params, trajectory, text, negative_text, schedule_row(config, mesh), random_key(mesh))


def abstract_maps(config: ConfigDict, network: WanConfig, mesh: Mesh) -> Any:
    """The shapes of all feature maps of a distillation, sharded."""
    maps = jax.eval_shape(lambda: initial_maps(config, abstract_transformer(config, network, inference=True)))
    return with_shardings(maps, parameter_shardings(mesh, maps))


def held_out_inputs(config: ConfigDict, network: WanConfig, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The teacher, a batch of held-out steps and the feature maps, as the errors' programs take them."""
    model = nnx.merge(*abstract_model(config, network, mesh, inference=True))
    latents, text, timesteps = spread_inputs(config, network, mesh, batch_shards(mesh))
    batch = {"latents": latents, "text": text, "timestep": timesteps}
    return model, batch, abstract_maps(config, network, mesh)


def lowered_attention_errors(config: ConfigDict, sizes: ModelSizes, mesh: Mesh) -> Any:
    model, batch, maps = held_out_inputs(config, sizes.transformer, mesh)
    return measure_heads.lower(model, batch, (maps, maps), DistillSpec.of(config))


def lowered_velocity_errors(config: ConfigDict, sizes: ModelSizes, mesh: Mesh) -> Any:
    plan = np.zeros(sizes.transformer.num_layers, int)
    return plan_velocity.lower(*held_out_inputs(config, sizes.transformer, mesh), plan, DistillSpec.of(config))


def lowered_finetune(config: ConfigDict, sizes: ModelSizes, mesh: Mesh) -> Any:
    network = sizes.transformer
    hybrid = hybrid_network(config, network, planned_rates(config, network.num_layers))
    rank = config.finetune.lora_rank
    student = abstract_transformer(config, hybrid, inference=rank > 0)
    if rank:
        add_low_rank(student, rank)
    student.set_mesh(mesh, config.mesh.exchange)
    graph, *parts = finetune.split_trained(student, rank)
    params, frozen = (part and with_shardings(part, parameter_shardings(mesh, part)) for part in parts)
    teacher_graph, teacher_params = graph, None
    if config.finetune.teacher_weight > 0:
        teacher_graph, teacher_params = abstract_model(config, network, mesh, inference=True)
    optimizer = adamw(config.finetune)
    state = jax.eval_shape(lambda params: initial_train_state(params, optimizer, config.finetune.ema), params)
    latents, text, _ = spread_inputs(config, network, mesh, config.finetune.batch)
    update = finetune.make_update(config, optimizer, graph, teacher_graph)
    state = with_shardings(state, parameter_shardings(mesh, state))
    return update.lower(state, teacher_params, {"latents": latents, "text": text}, random_key(mesh), frozen)


def lowered_train(config: ConfigDict, sizes: ModelSizes, mesh: Mesh) -> Any:
    train, dtype = config.train, jnp.dtype(config.model.dtype)
    build = lambda: training.TransformerWithTextEncoder(
        sizes.transformer, sizes.text_encoder, dtype=dtype, rngs=nnx.Rngs(0)
    )
    teacher = nnx.eval_shape(build)
    teacher.transformer.set_mesh(mesh, config.mesh.exchange)
    graph, params = nnx.split(teacher)
    optimizer = training.make_optimizer(train)
    params = with_shardings(params, parameter_shardings(mesh, params))
    state = jax.eval_shape(lambda params: initial_train_state(params, optimizer, train.ema), params)
    latents, _, _ = spread_inputs(config, sizes.transformer, mesh, train.batch)
    words = lambda count: jax.ShapeDtypeStruct((count, config.text_length), jnp.int32)
    texts = {"token_ids": words(train.batch), "mask": words(train.batch)}
    negative = {"blank_ids": words(1), "blank_mask": words(1)}
    batch = {"latents": latents}
    batch |= with_shardings(texts, sharding(mesh, "batch")) | with_shardings(negative, sharding(mesh))
    state = with_shardings(state, parameter_shardings(mesh, state))
    return training.make_update(config, optimizer, graph).lower(state, batch, random_key(mesh))


def lowered_text(config: ConfigDict, sizes: ModelSizes, mesh: Mesh) -> Any:
    """One layer of the text encoder on a full batch of prompts of full length, on one device."""
    encoder, dtype, where = sizes.text_encoder, jnp.dtype(config.model.dtype), one_device(mesh)
    shapes = mirrored_shapes(abstract_module(Block, encoder))
    layer = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    states = jax.ShapeDtypeStruct((BATCH, config.text_length, encoder.d_model), dtype)
    bias = jax.eval_shape(mask_bias, jax.ShapeDtypeStruct((BATCH, config.text_length), jnp.bool_))
    layer, states, bias = with_shardings((layer, states, bias), where)
    return run_layer.lower(encoder, dtype, layer, states, bias)


def lowered_decode(config: ConfigDict, sizes: ModelSizes, mesh: Mesh) -> Any:
    """The VAE's decoder on a latent frame of one clip, past the first, on one device."""
    _, height, width = latent_grid(config.video.frames, config.video.height, config.video.width, sizes.vae.strides)
    return _lowered_chunk(decode_chunk, config, sizes, one_device(mesh), (1, height, width, sizes.vae.z_dim), 1)


def lowered_encode(config: ConfigDict, sizes: ModelSizes, mesh: Mesh) -> Any:
    """The VAE's encoder on four frames of one clip, past the first, on one device."""
    first = (1, config.video.height, config.video.width, 3)
    return _lowered_chunk(encode_chunk, config, sizes, one_device(mesh), first, 4)


def _lowered_chunk(
    run_chunk: Any, config: ConfigDict, sizes: ModelSizes, where: NamedSharding, first: tuple[int, ...], frames: int
) -> Any:
    graph, state = nnx.split(abstract_module(WanVae, sizes.vae))
    state = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(config.model.vae_dtype)), state)
    chunk = lambda count: jax.ShapeDtypeStruct((1, count, *first[1:]), jnp.float32)
    run = functools.partial(run_chunk, graph)
    kept = jax.eval_shape(run, state, chunk(1), None)[1]
    kept = jax.eval_shape(run, state, chunk(frames), kept)[1]
    state, x, kept = with_shardings((state, chunk(frames), kept), where)
    return run_chunk.lower(graph, state, x, kept)


def one_device(mesh: Mesh) -> NamedSharding:
    """An array whole on the first device of a mesh."""
    return sharding(Mesh(mesh.devices.reshape(-1)[:1].reshape((1,) * mesh.devices.ndim), mesh.axis_names))


PROGRAMS: dict[str, Callable[[ConfigDict, ModelSizes, Mesh], Any]] = {
    "text": lowered_text,
    "trace": lowered_trace,
    "sample": lowered_sample,
    "distill": lowered_distill,
    "attention_errors": lowered_attention_errors,
    "velocity_errors": lowered_velocity_errors,
    "finetune": lowered_finetune,
    "encode": lowered_encode,
    "decode": lowered_decode,
    "train": lowered_train,
}


def step_flops(config: ConfigDict, network: WanConfig, stage: str) -> float:
    """FLOPs of one step on all devices together, by the cost model, including what remat recomputes."""
    work = dataclasses.replace(workload(config, network), config=network)
    if stage == "distill":
        velocities = velocities_per_step(config.sampler.guidance) if config.distill.mode == "sampling" else 1
        return config.distill.batch * velocities * distillation_flops(work, config.hybrid.rates)
    if stage == "train":
        return 3 * config.train.batch * model_flops(work, (1,) * network.num_layers)
    forward = planned_forward(config, work)[0]
    if stage == "sample":
        return config.evaluate.batch * forward * velocities_per_step(config.sampler.guidance)
    times = 3 + (config.model.remat != "none")
    if config.finetune.teacher_weight > 0:
        times += model_flops(work, (1,) * network.num_layers) / forward
    return config.finetune.batch * forward * times
