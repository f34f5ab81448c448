"""The phases of every stage of the surgery, and the mesh that a stage computes on.

The stages themselves and every estimate (`--dry_run`, `jsurgery compile --stage=all`) read this one declaration.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from jsurgery.attention.kinds.registry import kind_of, parse_block_budget, plan_of_budget
from jsurgery.diffusion import velocities_per_step
from jsurgery.errors import InputError
from jsurgery.rates import Rate
from jsurgery.runtime.mesh import LOGICAL, batch_shards, by_heads, parameter_shardings
from jsurgery.runtime.mesh_choice import choose_mesh, device_memory
from jsurgery.surgery.distillation.update import initial_maps
from jsurgery.surgery.plan import block_costs, budget_cost
from jsurgery.wan import memory
from jsurgery.wan.cost import Workload, core_flops, model_bytes, model_flops
from jsurgery.wan.memory import Phase, device_bytes
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_sizes import ModelSizes

AnyMesh = Mesh | AbstractMesh
COMPUTING = ("trace", "distill", "finetune", "evaluation")  # the stages that compute on a mesh


def phases_of(stage: str, config: ConfigDict, sizes: ModelSizes, mesh: AnyMesh) -> list[Phase]:
    """The phases of a stage on a mesh, in order: of one in COMPUTING, or of the command "sample"."""
    return PHASES[stage](config, sizes, mesh)


def stage_batch(stage: str, config: ConfigDict) -> int:
    """The examples that a stage computes at once."""
    batches = {
        "trace": config.trace.batch,
        "distill": config.distill.batch,
        "finetune": config.finetune.batch // config.finetune.accumulate,
        "evaluation": config.evaluate.batch,
        "sample": config.evaluate.batch,
    }
    return batches[stage]


def on_mesh(
    stage: str,
    config: ConfigDict,
    sizes: ModelSizes,
    devices: Sequence[Any] | int | None = None,
    capacity: int | None = None,
    **options: Any,
) -> ConfigDict:
    """The config of a stage with its mesh: the one that the config names, or one chosen by `choose_mesh`.

    `devices` are by default those of all processes, and `capacity` the memory that one of this process's reports.
    Raises DoesNotFit, with the numbers, where a device has too little memory.
    """
    if devices is None:
        devices = jax.devices()
        capacity = device_memory(jax.local_devices()[0])  # another process's devices do not tell
    peak = lambda mesh: max(phase.bytes for phase in phases_of(stage, config, sizes, mesh))
    heads = sizes.transformer.num_attention_heads
    rates = () if stage == "trace" else config.hybrid.rates
    options |= {"rates": sizes.transformer.rates if stage == "sample" else rates}
    return choose_mesh(stage, config, stage_batch(stage, config), heads, peak, devices, capacity, **options)


def planned_rates(config: ConfigDict, blocks: int) -> tuple[Rate, ...]:
    """The kinds of a plan for a budget like "15R2": the first 15 blocks at rate 2. Its cost is that of any such plan.

    Raises InputError for a budget that is no such name or converts more blocks than there are.
    """
    named = parse_block_budget(str(config.plan.budget))
    if named is None:
        raise InputError(f"config.plan.budget: to compile, expected a name like '15R2', found {config.plan.budget!r}")
    if (plan := plan_of_budget(named, blocks)) is None:
        count = sum(count for count, _ in named)
        raise InputError(f"config.plan.budget: {config.plan.budget} converts {count} blocks, the model has {blocks}")
    return plan


def planned_forward(config: ConfigDict, work: Workload) -> tuple[float, float]:
    """(FLOPs, least bytes of memory traffic) of one forward pass of the hybrid model that the budget allows.

    A numeric budget names no plan: the FLOPs are then those of a plan that uses all of it, and the bytes those of
    converting every block, which no plan exceeds.
    """
    blocks = work.config.num_layers
    if parse_block_budget(str(config.plan.budget)) is not None:
        rates = planned_rates(config, blocks)
        return model_flops(work, rates), model_bytes(work, rates)
    costs, softmax = block_costs(config, work.config), (1,) * blocks
    saved = 1 - min(1.0, budget_cost(config.plan.budget, costs) / costs.teacher)
    flops = model_flops(work, softmax) - saved * blocks * core_flops(work, 1)
    return flops, model_bytes(work, (config.hybrid.rates[0],) * blocks)


def largest_hybrid(config: ConfigDict, network: WanConfig) -> WanConfig:
    """The network with as many converted blocks as the budget may give: all of them unless it names a number."""
    rates = (config.hybrid.rates[0],) * network.num_layers
    if parse_block_budget(str(config.plan.budget)) is not None:
        rates = planned_rates(config, network.num_layers)
    return memory.hybrid_network(config, network, rates)


def trace_phases(config: ConfigDict, sizes: ModelSizes, mesh: AnyMesh) -> list[Phase]:
    """The decoding is that of the first frame, for the report."""
    return memory.sampling_phases(config, sizes, mesh, config.trace.batch, config.trace.prompts, program="trace")


def distill_phases(config: ConfigDict, sizes: ModelSizes, mesh: AnyMesh) -> list[Phase]:
    network, settings = sizes.transformer, config.distill
    teacher = memory.abstract_transformer(config, network, inference=True)
    maps = jax.eval_shape(lambda: initial_maps(config, teacher))
    one_copy = device_bytes(maps, parameter_shardings(mesh, maps))
    weights = {"weights": memory.weights(config, network, mesh, inference=True)}
    held = weights | {"feature maps and their moments": 3 * one_copy}
    velocities = 1
    if settings.mode == "sampling":
        velocities = velocities_per_step(config.sampler.guidance)
        states = 4 * settings.trajectories * settings.batch
        held |= {"trajectories": states * memory.latents_bytes(config, network)}
    branches = sum(kind_of(rate).has_softmax for rate in {1, *config.hybrid.rates})

    def working(batch: int) -> int:
        """A forward of the teacher, with the softmax branch of every rate and full softmax in float32. Kinds that
        exchange sequence for heads also have q, k and v in 16 bits and full softmax in another order."""
        tokens = memory.tokens_on_device(config, network, mesh, batch)
        channels = 4 * branches + (10 if by_heads(config.hybrid.rates) else 0)
        branches_bytes = channels * tokens * network.dim // mesh.shape[LOGICAL["heads"]]
        return memory.forward_bytes(config, network, mesh, batch) + branches_bytes

    phases = [Phase("distillation", held, working(velocities * settings.batch) + 2 * one_copy, "distill")]
    held = weights | {"initial and trained feature maps": 2 * one_copy}
    # The compiler copies both sets of maps into the layout of its kernels.
    phases.append(Phase("attention errors", held, working(batch_shards(mesh)) + 2 * one_copy, "attention_errors"))
    forward = memory.forward_bytes(config, network, mesh, batch_shards(mesh))
    if settings.velocity_steps:
        phases.append(Phase("velocity errors", held, forward, "velocity_errors"))
    return phases


def finetune_phases(config: ConfigDict, sizes: ModelSizes, mesh: AnyMesh) -> list[Phase]:
    settings, network = config.finetune, largest_hybrid(config, sizes.transformer)
    params = memory.weights(config, network, mesh, inference=False)
    held, copies = {"parameters and their moments": 3 * params}, params
    # Gradients, and the weights once more in 16 bits.
    copies += params // 2 if config.model.dtype == "bfloat16" else 0
    if settings.lora_rank:
        params = copies = memory.low_rank_weights(config, network, mesh)
        held = {"frozen weights": memory.weights(config, network, mesh, inference=True)}
        held["low-rank changes, feature maps and their moments"] = 3 * params
    if settings.ema:
        held |= {"averaged parameters": params}
    if settings.teacher_weight > 0:
        held |= {"teacher": memory.weights(config, sizes.transformer, mesh, inference=True)}
    batch = stage_batch("finetune", config)
    return [Phase("fine-tuning", held, copies + memory.backward_bytes(config, network, mesh, batch), "finetune")]


def evaluation_phases(config: ConfigDict, sizes: ModelSizes, mesh: AnyMesh) -> list[Phase]:
    hybrid = dataclasses.replace(sizes, transformer=largest_hybrid(config, sizes.transformer))
    return memory.sampling_phases(config, hybrid, mesh, config.evaluate.batch, config.evaluate.prompts)


PHASES: dict[str, Callable[[ConfigDict, ModelSizes, AnyMesh], list[Phase]]] = {
    "trace": trace_phases,
    "distill": distill_phases,
    "finetune": finetune_phases,
    "evaluation": evaluation_phases,
    "sample": evaluation_phases,
}
