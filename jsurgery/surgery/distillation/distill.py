"""distill: trains the feature maps of every block at every rate in one pass of the teacher."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsurgery.errors import InputError
from jsurgery.io.files import write_json
from jsurgery.runtime import processes
from jsurgery.runtime.loop import run_steps
from jsurgery.runtime.mesh import batch_shards, global_batch, local_rows, make_mesh, put_state, to_host
from jsurgery.runtime.progress import Progress
from jsurgery.surgery.distillation.replay import Replay
from jsurgery.surgery.distillation.saved_maps import INITIAL, TRAINED, FeatureMapPair, save_maps
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, measure_heads
from jsurgery.surgery.distillation.update import initial_maps, make_optimizer
from jsurgery.surgery.distillation.while_sampling import WhileSampling
from jsurgery.surgery.plan_forward import velocity_errors
from jsurgery.surgery.trace import TraceSteps
from jsurgery.wan.transformer import WanTransformer
from pallas_kernels.reference import EPSILON

LARGEST_LOG_SCALE = 20.0


def distill(
    config: ConfigDict,
    teacher: WanTransformer,
    traces: epath.Path,
    folder: epath.Path,
    *,
    rope: str = "after",
    profile: epath.Path | None = None,
) -> None:
    """Writes `initial.safetensors` (calibrated only), `feature_maps.safetensors` and `errors.json` to `folder`.

    errors.json names the distilled blocks: all, or those of `config.distill.blocks`. With `rope` "before", phi sees
    queries and keys before RoPE. That is for measurements: no model can use such maps, and velocity errors are left
    out. `profile` gets the trace of `config.profile` steps.
    """
    settings, spec = config.distill, dataclasses.replace(DistillSpec.of(config), rope=rope)
    blocks = spec.blocks or range(teacher.config.num_layers)
    mesh = make_mesh(config.mesh)
    teacher.shard(mesh, config.mesh.exchange)
    held_out = TraceSteps(traces, range(config.trace.prompts - config.trace.holdout, config.trace.prompts))
    if settings.mode == "sampling":
        learner = WhileSampling(config, teacher, mesh, traces, spec, folder)
    else:
        learner = Replay(config, teacher, mesh, traces, spec)

    maps = put_state(mesh, initial_maps(config, teacher))
    if settings.calibrate:
        maps = calibrate(teacher, learner.calibration(), maps, spec)
    initial = to_host(maps)
    processes.on_first(lambda: save_maps(folder / INITIAL, initial, spec.rates, blocks))

    def update(state: dict[str, Any], step: int) -> tuple[dict[str, Any], jax.Array, None]:
        return *learner(state, step), None

    def format_metrics(losses: np.ndarray) -> tuple[dict[str, Any], str]:
        by_rate = losses.mean(axis=0)
        return {f"loss_{rate}": by_rate[i] for i, rate in enumerate(spec.rates)}, f"loss {by_rate.mean():.4f}"

    def likely_cause(step: int, losses: np.ndarray, *_: Any) -> str:
        bad = [f"block {blocks[i]} at rate {spec.rates[j]}" for i, j in np.argwhere(~np.isfinite(losses))]
        return f"the loss or its gradient is not finite in {bad[0]}, {len(bad)} in all: {learner.describe_batch(step)}"

    opt_state = make_optimizer(config).init(maps)  # type: ignore[arg-type]
    fresh = {"maps": jax.tree.map(jnp.copy, maps), "opt_state": opt_state} | learner.initial_trajectories()
    state = run_steps(
        "distill", config, put_state(mesh, fresh), update, steps=settings.steps, checkpoints=folder / "checkpoints",
        metrics=folder, format_metrics=format_metrics, likely_cause=likely_cause, profile=profile,
    )  # fmt: skip
    trained = to_host(state["maps"])
    processes.on_first(lambda: save_maps(folder / TRAINED, trained, spec.rates, blocks))
    errors = held_out_errors(teacher, mesh, held_out, maps, state["maps"], spec)
    if settings.velocity_steps and rope == "after":
        errors |= velocity_errors_of_blocks(teacher, mesh, held_out, state["maps"], spec, settings.velocity_steps)
    processes.on_first(lambda: write_json(folder / "errors.json", {"blocks": list(blocks)} | errors))


def calibrate(teacher: WanTransformer, batches: list[dict], maps: FeatureMapPair, spec: DistillSpec) -> FeatureMapPair:
    """Scales the key maps so that each head's linear keys have the same mean mass as in the teacher's attention."""
    statistics = [measure_heads(teacher, batch, maps, spec) for batch in batches]
    mass, teacher_mass = (sum(each[name] for each in statistics) for name in ("mass", "teacher_mass"))
    log_scale = jnp.log(jnp.maximum(teacher_mass, EPSILON)) - jnp.log(jnp.maximum(mass, EPSILON))
    # A linear key may score 88 above the stabiliser, and its mass is then infinite in float32.
    log_scale = jnp.clip(log_scale, -LARGEST_LOG_SCALE, LARGEST_LOG_SCALE)
    return maps[0], dataclasses.replace(maps[1], log_scale=maps[1].log_scale + log_scale)


def held_out_errors(
    teacher: WanTransformer,
    mesh: Mesh,
    held_out: TraceSteps,
    initial: FeatureMapPair,
    trained: FeatureMapPair,
    spec: DistillSpec,
) -> dict[str, Any]:
    """Relative L1 error of the attention output per block and rate over held-out steps, before and after training.

    Steps are taken in batches of one example a batch shard of the mesh; a last, incomplete batch is left out.
    """
    size = batch_shards(mesh)
    batches = len(held_out) // size
    if not batches:
        raise InputError(f"config.trace.holdout: {len(held_out)} steps; expected at least {size}, one a batch shard")

    def totals(maps, name):
        statistics, progress = [], Progress(name, batches)
        for number in progress.over(range(batches)):
            batch = held_out_batch(mesh, held_out, range(number * size, (number + 1) * size))
            statistics.append(to_host(measure_heads(teacher, batch, maps, spec)))
        return jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float64), *statistics)

    before, after = totals(initial, "errors (initial)"), totals(trained, "errors")
    errors = lambda stats: (stats["error"].sum(axis=(0, 3)) / stats["size"].sum(axis=(0, 3))).tolist()
    return {
        "rates": list(spec.rates),
        "errors": errors(after),
        "initial_errors": errors(before),
        "softmax_share": after["share"].mean(axis=(0, 3)).tolist(),
        "teacher_softmax_share": after["teacher_share"].mean(axis=(0, 3)).tolist(),
        "samples": batches * size,
    }


def velocity_errors_of_blocks(
    teacher: WanTransformer, mesh: Mesh, held_out: TraceSteps, maps: FeatureMapPair, spec: DistillSpec, steps: int
) -> dict[str, Any]:
    """Relative squared error of the velocity with one block converted and all others softmax, per block and rate.

    Squared errors of blocks add up if the blocks' errors are independent. Of all errors tried, they predict best which
    of several plans of equal cost is better (`jsurgery ablate --table=objective`). The errors are means over `steps`
    held-out steps, evenly spread.
    """
    size, layers = batch_shards(mesh), teacher.config.num_layers
    blocks = np.arange(layers) if spec.blocks is None else np.array(spec.blocks)
    # A block that was not distilled gets the maps of another block, which no plan uses.
    slots = np.searchsorted(blocks, np.arange(layers)).clip(max=len(blocks) - 1)
    maps = jax.tree.map(lambda leaf: leaf[slots], maps)
    count = max(1, min(steps, len(held_out)) // size)
    chosen = np.linspace(0, len(held_out) - 1, count * size).round().astype(int).reshape(count, size)
    plans_BxRxL = np.zeros((len(blocks), len(spec.rates), layers), int)
    plans_BxRxL[np.arange(len(blocks)), :, blocks] = np.arange(1, len(spec.rates) + 1)
    squared, progress = [], Progress("velocity errors", count * len(blocks))
    for number in progress.over(range(count * len(blocks))):
        batch = held_out_batch(mesh, held_out, chosen[number // len(blocks)])
        plans_RxL = jnp.asarray(plans_BxRxL[number % len(blocks)])
        squared.append(to_host(velocity_errors(teacher, batch, maps, plans_RxL, spec))["squared"])
    errors_BxR = np.mean(np.asarray(squared, np.float64).reshape(count, len(blocks), -1), axis=0)
    return {"velocity_errors": errors_BxR.tolist(), "velocity_samples": count * size}


def held_out_batch(mesh: Mesh, held_out: TraceSteps, numbers: Sequence[int]) -> dict[str, jax.Array]:
    """A batch of held-out steps, sharded over the mesh."""
    rows = local_rows(mesh, len(numbers))
    steps = [held_out[numbers[row]] for row in rows]
    return global_batch(mesh, rows, len(numbers), jax.tree.map(lambda *arrays: np.stack(arrays), *steps))
