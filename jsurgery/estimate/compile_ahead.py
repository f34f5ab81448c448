"""compile: compiles one step of a stage for a TPU topology, without TPUs. Reports its memory and its collectives.

All numbers are the compiler's estimates, not measurements.
"""

import dataclasses
import functools
import math
import re
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.diffusion import State, schedule, velocities_per_step
from jsurgery.errors import DoesNotFit, InputError
from jsurgery.estimate.chips import GIB, Chip, parse_topology
from jsurgery.estimate.hlo import collectives, largest_buffers
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report, peak_bytes
from jsurgery.rates import Rate, parse_block_budget
from jsurgery.runtime.mesh import AXES, check_batch, make_mesh, parameter_shardings, sharding
from jsurgery.runtime.optimizer import adamw, initial_train_state
from jsurgery.runtime.progress import say
from jsurgery.surgery import finetune
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.surgery.distillation.update import initial_maps, make_optimizer, make_update
from jsurgery.surgery.distillation.while_sampling import make_sampling_update
from jsurgery.train import transformer as training
from jsurgery.wan.cost import distillation_flops, model_flops, workload
from jsurgery.wan.guidance import sampling_step
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.models import find_sizes
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.video_size import latent_grid
from pallas_kernels import estimate

SHOWN_BUFFERS = 8


def compile_stage(
    config: ConfigDict, config_name: str, stage: str, topology: str, *, slices: int = 1, report: str | None = None
) -> None:
    """Compiles one step of a stage for a topology like "v5e:4x4"; prints memory, FLOPs, collectives and compile time.

    `report` names a JSON file for the same numbers. Raises DoesNotFit where the mesh has another number of devices than
    the topology, or where the program needs more than a chip's memory; then the largest buffers are printed first.
    Raises InputError for an unknown topology and for a budget that does not name a plan.
    """
    check_report(report)
    network = trained_sizes(config) if stage == "train" else find_sizes(config, config_name).transformer
    chip, devices = chip_and_devices(topology, slices)
    mesh_devices = math.prod(config.mesh[axis] for axis in AXES)
    if mesh_devices != len(devices):
        sizes = " x ".join(f"{axis} {config.mesh[axis]}" for axis in AXES)
        raise DoesNotFit(f"config.mesh: {sizes} = {mesh_devices} devices, {topology} has {len(devices)}")
    mesh = make_mesh(config.mesh, devices)
    say(f"compile: {stage} on {topology}")
    start = time.perf_counter()
    program = lowered(config, network, stage, mesh)
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = program.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            status, _, complaint = str(error).partition(": ")
            if status != "RESOURCE_EXHAUSTED":
                raise
            print(buffers_as_text(folder), flush=True)
            raise DoesNotFit(f"{stage} on {topology}: {complaint}") from None
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    parts = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}
    flops = step_flops(config, network, stage) / len(devices)
    result = {
        "stage": stage,
        "topology": topology,
        "slices": slices,
        "mesh": {axis: config.mesh[axis] for axis in AXES},
        "memory_bytes": parts | {"peak": parts["argument"] + parts["output"] + parts["temp"] - parts["alias"]},
        "capacity_bytes": chip.memory,
        "flops_per_device": flops,
        "least_seconds": flops / chip.flops,
        "collectives": collectives(compiled.as_text()),
        "compile_seconds": seconds,
        "compile_peak_bytes": peak_bytes(),
        "source": "static estimate of the TPU compiler; FLOPs by jsurgery's cost model",
    }
    print(as_text(result), flush=True)
    if report is not None:
        write_json(epath.Path(report), result)


def chip_and_devices(topology: str, slices: int) -> tuple[Chip, Sequence[Any]]:
    """The chip and the devices of a topology. Raises InputError where libtpu does not know the topology."""
    chip, _ = parse_topology(topology)
    single = {"chips_per_host_bounds": [1, 1, 1]} if re.fullmatch(r"\w+:1(x1)*", topology) else {}
    try:
        options = single | ({"num_slices": slices} if slices > 1 else {})
        return chip, estimate.topology(topology, **options)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        message = str(error).strip().splitlines()[0]
        raise InputError(f"--topology={topology}: libtpu (the `tpu` extra) does not know it: {message}") from None


def lowered(config: ConfigDict, network: WanConfig, stage: str, mesh: Mesh) -> Any:
    """The lowered step (`jax.stages.Lowered`) of a stage; no array is made."""
    stages = {
        "distill": lowered_distill,
        "finetune": lowered_finetune,
        "sample": lowered_sample,
        "train": lowered_train,
    }
    return stages[stage](config, network, mesh)


def trained_sizes(config: ConfigDict) -> WanConfig:
    """The sizes of the transformer that `train` trains."""
    return training.model_configs(config.train, config.train.vocabulary)[0]


def planned_rates(config: ConfigDict, blocks: int) -> tuple[Rate, ...]:
    """The rates of a plan for a budget like "15R2": the first 15 blocks at rate 2. Its cost is that of any such plan.

    Raises InputError for a budget that is no such name or converts more blocks than there are.
    """
    named = parse_block_budget(str(config.plan.budget))
    if named is None:
        raise InputError(f"config.plan.budget: to compile, expected a name like '15R2', found {config.plan.budget!r}")
    count, rate = named
    if count > blocks:
        raise InputError(f"config.plan.budget: {config.plan.budget} converts {count} blocks, the model has {blocks}")
    return (rate,) * count + (1,) * (blocks - count)


def abstract_model(config: ConfigDict, network: WanConfig, mesh: Mesh) -> tuple[nnx.GraphDef, Any]:
    """The model's graph definition, and its parameters as shapes with shardings."""
    build = lambda: WanTransformer(
        network, dtype=jnp.dtype(config.model.dtype), remat=config.model.remat, rngs=nnx.Rngs(0)
    )
    model = nnx.eval_shape(build)
    model.set_mesh(mesh, config.mesh.exchange)
    graph, params = nnx.split(model)
    return graph, with_shardings(params, parameter_shardings(mesh, params))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings. `shardings` is one sharding for all leaves, or a tree with one for each."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    struct = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(struct, shapes, shardings)


def inputs(config: ConfigDict, network: WanConfig, mesh: Mesh, batch: int) -> tuple[Any, Any, Any]:
    """Shapes of a batch: latents [B, T, H, W, C], text embeddings [B, L, text_dim], timesteps [B]; sharded by rows."""
    check_batch(mesh, batch)
    video = config.video
    grid = latent_grid(video.frames, video.height, video.width)
    shapes = (
        jax.ShapeDtypeStruct((batch, *grid, network.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((batch, config.text_length, network.text_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.float32),
    )
    return with_shardings(shapes, sharding(mesh, "batch"))


def lowered_distill(config: ConfigDict, network: WanConfig, mesh: Mesh) -> Any:
    graph, params = abstract_model(config, network, mesh)
    teacher: Any = nnx.merge(graph, params)
    optimizer = make_optimizer(config)
    maps = jax.eval_shape(lambda: initial_maps(config, teacher))
    state = {"maps": maps, "opt_state": jax.eval_shape(optimizer.init, maps)}
    latents, text, timesteps = inputs(config, network, mesh, config.distill.batch)
    batch = {"latents": latents, "text": text, "timestep": timesteps}
    state, spec = with_shardings(state, parameter_shardings(mesh, state)), DistillSpec.of(config)
    if config.distill.mode == "traces":
        return make_update(optimizer, graph, spec).lower(state, params, batch)
    whole, sampler = sharding(mesh), config.sampler
    update = make_sampling_update(optimizer, graph, spec, sampler.guidance, whole)
    negative_text = None if sampler.guidance == 1 else text
    key = with_shardings(jax.eval_shape(lambda: jax.random.key(0)), whole)
    trajectory = State(*[with_shardings(latents, whole)] * 4)
    return update.lower(state, params, trajectory, text, negative_text, schedule_row(config, mesh), key)


def lowered_finetune(config: ConfigDict, network: WanConfig, mesh: Mesh) -> Any:
    hybrid = HybridConfig.of(config, planned_rates(config, network.num_layers))
    graph, params = abstract_model(config, dataclasses.replace(network, hybrid=hybrid), mesh)
    teacher_graph, teacher_params = graph, None
    if config.finetune.teacher_weight > 0:
        teacher_graph, teacher_params = abstract_model(config, network, mesh)
    optimizer = adamw(config.finetune)
    state = jax.eval_shape(lambda params: initial_train_state(params, optimizer, config.finetune.ema), params)
    latents, text, _ = inputs(config, network, mesh, config.finetune.batch)
    key = with_shardings(jax.eval_shape(lambda: jax.random.key(0)), sharding(mesh))
    update = finetune.make_update(config, optimizer, graph, teacher_graph)
    state = with_shardings(state, parameter_shardings(mesh, state))
    return update.lower(state, teacher_params, {"latents": latents, "text": text}, key)


def lowered_sample(config: ConfigDict, network: WanConfig, mesh: Mesh) -> Any:
    hybrid = HybridConfig.of(config, planned_rates(config, network.num_layers))
    graph, params = abstract_model(config, dataclasses.replace(network, hybrid=hybrid), mesh)
    latents, text, _ = inputs(config, network, mesh, config.evaluate.batch)
    negative_text = jax.ShapeDtypeStruct((1, *text.shape[1:]), text.dtype, sharding=sharding(mesh))
    sampler, row = config.sampler, schedule_row(config, mesh)

    @functools.partial(jax.jit, donate_argnums=3)
    def step(params, text, negative_text, state, row):
        model = nnx.merge(graph, params)
        return sampling_step(model, text, negative_text, state, row, None, sampler.guidance, sampler.guidance_batched)

    return step.lower(params, text, negative_text, State(*[latents] * 4), row)


def schedule_row(config: ConfigDict, mesh: Mesh) -> Any:
    """Shapes of one row of the sampler's schedule, on every device."""
    sampler = config.sampler
    row = jax.tree.map(np.asarray, schedule(sampler.solver, sampler.steps, sampler.shift).row(0))
    return with_shardings(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), row), sharding(mesh))


def lowered_train(config: ConfigDict, network: WanConfig, mesh: Mesh) -> Any:
    train, dtype = config.train, jnp.dtype(config.model.dtype)
    _, text_encoder = training.model_configs(train, train.vocabulary)
    build = lambda: training.TransformerWithTextEncoder(network, text_encoder, dtype=dtype, rngs=nnx.Rngs(0))
    teacher = nnx.eval_shape(build)
    teacher.transformer.set_mesh(mesh, config.mesh.exchange)
    graph, params = nnx.split(teacher)
    optimizer = training.make_optimizer(train)
    state = jax.eval_shape(lambda params: initial_train_state(params, optimizer, train.ema), params)
    latents, _, _ = inputs(config, network, mesh, train.batch)
    words = lambda count: jax.ShapeDtypeStruct((count, config.text_length), jnp.int32)
    texts = {"token_ids": words(train.batch), "mask": words(train.batch)}
    negative = {"blank_ids": words(1), "blank_mask": words(1)}
    batch = {"latents": latents}
    batch |= with_shardings(texts, sharding(mesh, "batch")) | with_shardings(negative, sharding(mesh))
    key = with_shardings(jax.eval_shape(lambda: jax.random.key(0)), sharding(mesh))
    state = with_shardings(state, parameter_shardings(mesh, state))
    return training.make_update(config, optimizer, graph).lower(state, batch, key)


def step_flops(config: ConfigDict, network: WanConfig, stage: str) -> float:
    """FLOPs of one step on all devices together, by the cost model, including what remat recomputes."""
    work = dataclasses.replace(workload(config, network), config=network)
    if stage == "distill":
        velocities = velocities_per_step(config.sampler.guidance) if config.distill.mode == "sampling" else 1
        return config.distill.batch * velocities * distillation_flops(work, config.hybrid.rates)
    if stage == "train":
        return 3 * config.train.batch * model_flops(work, (1,) * network.num_layers)
    forward = model_flops(work, planned_rates(config, network.num_layers))
    if stage == "sample":
        return config.evaluate.batch * forward * velocities_per_step(config.sampler.guidance)
    times = 3 + (config.model.remat != "none")
    if config.finetune.teacher_weight > 0:
        times += model_flops(work, (1,) * network.num_layers) / forward
    return config.finetune.batch * forward * times


def buffers_as_text(folder: str) -> str:
    """The largest buffers of a device, from the report that the compiler leaves of a program that does not fit."""
    reports = [path.read_text() for path in epath.Path(folder).glob("*memory-usage-report.txt")]
    buffers = largest_buffers(max(reports, key=len, default=""), SHOWN_BUFFERS)
    rows = [f"  {size / GIB:8.2f} GiB  {shapes}" for size, shapes in buffers]
    return "\n".join(["the largest buffers of a device, and the values that share each:", *rows])


def as_text(result: dict[str, Any]) -> str:
    """The lines that the command prints."""
    memory, moved = result["memory_bytes"], result["collectives"]
    lines = [
        f"{result['stage']} on {result['topology']}: static estimate of the TPU compiler, FLOPs by the cost model",
        f"memory a device: {memory['peak'] / GIB:.2f} of {result['capacity_bytes'] / GIB:.0f} GiB (arguments "
        f"{memory['argument'] / GIB:.2f}, temporary {memory['temp'] / GIB:.2f}, reused {memory['alias'] / GIB:.2f})",
        f"FLOPs a device: {result['flops_per_device'] / 1e12:.3g} T, at the peak rate {result['least_seconds']:.3g} s",
        *(f"{kind}: {each['count']} a step, {each['bytes'] / GIB:.4g} GiB" for kind, each in moved.items()),
        f"compiled in {result['compile_seconds']:.0f} s and {result['compile_peak_bytes'] / GIB:.1f} GiB",
    ]
    return "\n".join(lines)
