"""distill: trains the feature maps of every block at every rate in one pass of the teacher."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.attention.feature_maps import LearnedMaps
from jsurgery.attention.kinds.candidates import learning
from jsurgery.io.files import write_json
from jsurgery.runtime import processes
from jsurgery.runtime.loop import run_steps
from jsurgery.runtime.mesh import check_heads, make_mesh, put_state, to_host
from jsurgery.runtime.resumable_sums import ResumableSums
from jsurgery.surgery.distillation.held_out import SUMS, HeldOut, held_out_errors
from jsurgery.surgery.distillation.replay import Replay
from jsurgery.surgery.distillation.saved_maps import INITIAL, TRAINED, save_maps
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, measure_heads
from jsurgery.surgery.distillation.update import initial_maps, make_optimizer
from jsurgery.surgery.distillation.while_sampling import WhileSampling
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
    check_heads(mesh, teacher.config.num_attention_heads, config.mesh.exchange, spec.rates)
    teacher.shard(mesh, config.mesh.exchange)
    held_out = HeldOut(config, mesh, traces)
    if settings.mode == "sampling":
        learner = WhileSampling(config, teacher, mesh, traces, spec, folder)
    else:
        learner = Replay(config, teacher, mesh, traces, spec)

    maps = put_state(mesh, initial_maps(config, teacher))
    if settings.calibrate:
        maps = calibrate(teacher, learner.calibration(), maps, spec)
    initial = jax.tree.map(np.array, to_host(maps))  # copies: an update overwrites the arrays on the devices
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
    fresh = [put_state(mesh, {"maps": maps, "opt_state": opt_state} | learner.initial_trajectories())]
    del maps, opt_state
    maps = run_steps(  # `pop`, so that a resumed run does not keep the fresh state on the devices
        "distill", config, fresh.pop(), update, steps=settings.steps, checkpoints=folder / "checkpoints",
        metrics=folder, format_metrics=format_metrics, likely_cause=likely_cause, profile=profile,
    )["maps"]  # fmt: skip
    trained = to_host(maps)
    _, digest = processes.on_first(lambda: save_maps(folder / TRAINED, trained, spec.rates, blocks))
    sums = ResumableSums(folder / SUMS, "distill", {"maps": digest, "steps": held_out.chosen})
    errors = held_out_errors(teacher, held_out, put_state(mesh, initial), maps, spec, sums)
    processes.on_first(lambda: write_json(folder / "errors.json", {"blocks": list(blocks)} | errors))
    sums.remove()


def calibrate(teacher: WanTransformer, batches: list[dict], maps: LearnedMaps, spec: DistillSpec) -> LearnedMaps:
    """Scales the key maps so that each head's linear keys have the same mean mass as in the teacher's attention."""
    if maps.key is None:
        return maps
    # The same maps twice: the held-out errors compare two sets of maps, and so run the program compiled here.
    statistics = [measure_heads(teacher, batch, (maps, maps), spec)[0] for batch in batches]
    mapped = np.array(learning(spec.rates, "feature_maps"))
    mass, teacher_mass = (sum(each[name][:, mapped] for each in statistics) for name in ("mass", "teacher_mass"))
    log_scale = jnp.log(jnp.maximum(teacher_mass, EPSILON)) - jnp.log(jnp.maximum(mass, EPSILON))
    # A linear key may score 88 above the stabiliser, and its mass is then infinite in float32.
    log_scale = jnp.clip(log_scale, -LARGEST_LOG_SCALE, LARGEST_LOG_SCALE)
    return maps._replace(key=dataclasses.replace(maps.key, log_scale=maps.key.log_scale + log_scale))
