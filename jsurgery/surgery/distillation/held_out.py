"""The errors of distilled feature maps on steps of held-out prompts. An interrupted run resumes within them."""

import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsurgery.attention.feature_maps import LearnedMaps
from jsurgery.attention.kinds.candidates import of_every_block
from jsurgery.errors import InputError
from jsurgery.runtime.mesh import batch_shards, global_batch, local_rows, to_host
from jsurgery.runtime.resumable_sums import ResumableSums
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, measure_heads
from jsurgery.surgery.plan_forward import plan_velocity, velocity_errors
from jsurgery.surgery.trace import TraceSteps
from jsurgery.wan.transformer import WanTransformer

SUMS = "held_out.json"  # in the stage's folder until errors.json is written
ATTENTION, VELOCITY = "errors", "velocity errors"


class HeldOut:
    """The traced steps of the held-out prompts, in batches of one step a batch shard of the mesh.

    Attributes:
      chosen: the numbers of the steps for each kind of error, by batch.

    Raises InputError if there are fewer steps than batch shards.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, traces: epath.Path):
        self.mesh, self.size = mesh, batch_shards(mesh)
        self.steps = TraceSteps(traces, range(config.trace.prompts - config.trace.holdout, config.trace.prompts))
        if len(self.steps) < self.size:
            raise InputError(
                f"config.trace.holdout: {len(self.steps)} steps; expected at least {self.size}, one a batch shard"
            )
        self.chosen = {ATTENTION: self._spread(config.distill.error_steps or len(self.steps))}
        if config.distill.velocity_steps:
            self.chosen[VELOCITY] = self._spread(config.distill.velocity_steps)

    def _spread(self, steps: int) -> list[list[int]]:
        """At most `steps` steps in whole batches, evenly spread."""
        count = max(1, min(steps, len(self.steps)) // self.size)
        numbers = np.linspace(0, len(self.steps) - 1, count * self.size).round().astype(int)
        return numbers.reshape(count, self.size).tolist()

    def batch(self, numbers: list[int]) -> dict[str, jax.Array]:
        """The transformer's inputs at these steps, sharded over the mesh."""
        rows = local_rows(self.mesh, self.size)
        steps = [self.steps[numbers[row]] for row in rows]
        return global_batch(self.mesh, rows, self.size, jax.tree.map(lambda *arrays: np.stack(arrays), *steps))


def held_out_errors(
    teacher: WanTransformer,
    held_out: HeldOut,
    initial: LearnedMaps,
    trained: LearnedMaps,
    spec: DistillSpec,
    sums: ResumableSums,
) -> dict[str, Any]:
    """The errors of the attention and, unless phi sees queries and keys before RoPE, of the velocity."""
    errors = attention_errors(teacher, held_out, initial, trained, spec, sums)
    if VELOCITY in held_out.chosen and spec.rope == "after":
        errors |= velocity_errors_of_blocks(teacher, held_out, trained, spec, sums)
    return errors


def attention_errors(
    teacher: WanTransformer,
    held_out: HeldOut,
    initial: LearnedMaps,
    trained: LearnedMaps,
    spec: DistillSpec,
    sums: ResumableSums,
) -> dict[str, Any]:
    """Relative L1 error of the attention output per block and rate, before and after training.

    Both come from one pass of the teacher over the held-out steps.
    """
    chosen = held_out.chosen[ATTENTION]

    def measure(number: int) -> dict[str, np.ndarray]:
        found = to_host(measure_heads(teacher, held_out.batch(chosen[number]), (initial, trained), spec))
        before, after = ({name: values.astype(np.float64) for name, values in of.items()} for of in found)
        return {
            "error": after["error"].sum(axis=2),
            "initial_error": before["error"].sum(axis=2),
            "size": after["size"].sum(axis=2),
            "share": after["share"].mean(axis=2),
            "teacher_share": after["teacher_share"].mean(axis=2),
        }

    total = sums.add_up(ATTENTION, len(chosen), measure)
    return {
        "rates": list(spec.rates),
        "errors": (total["error"] / total["size"]).tolist(),
        "initial_errors": (total["initial_error"] / total["size"]).tolist(),
        "softmax_share": (total["share"] / len(chosen)).tolist(),
        "teacher_softmax_share": (total["teacher_share"] / len(chosen)).tolist(),
        "samples": len(chosen) * held_out.size,
    }


def velocity_errors_of_blocks(
    teacher: WanTransformer, held_out: HeldOut, maps: LearnedMaps, spec: DistillSpec, sums: ResumableSums
) -> dict[str, Any]:
    """Relative squared error of the velocity with one block converted and all others softmax, per block and rate.

    Squared errors of blocks add up if the blocks' errors are independent. Of all errors tried, they predict best which
    of several plans of equal cost is better (`jsurgery ablate --table=objective`). The errors are means over the
    held-out steps. The teacher's own velocity is computed once for each batch of steps.
    """
    layers, chosen = teacher.config.num_layers, held_out.chosen[VELOCITY]
    blocks = np.arange(layers) if spec.blocks is None else np.array(spec.blocks)
    maps = of_every_block(maps, blocks.tolist(), layers)
    plans_BxRxL = np.zeros((len(blocks), len(spec.rates), layers), int)
    plans_BxRxL[np.arange(len(blocks)), :, blocks] = np.arange(1, len(spec.rates) + 1)

    @functools.lru_cache(maxsize=1)
    def inputs(number: int) -> tuple[dict[str, jax.Array], jax.Array]:
        batch = held_out.batch(chosen[number])
        return batch, plan_velocity(teacher, batch, maps, np.zeros(layers, int), spec)

    def measure(number: int) -> dict[str, np.ndarray]:
        of_batch, block = divmod(number, len(blocks))
        batch, velocity = inputs(of_batch)
        squared_BxR = np.zeros(plans_BxRxL.shape[:2])
        squared_BxR[block] = velocity_errors(teacher, batch, maps, plans_BxRxL[block], spec, velocity)["squared"]
        return {"squared": squared_BxR}

    total = sums.add_up(VELOCITY, len(chosen) * len(blocks), measure, save_every=len(blocks))
    squared_BxR = total["squared"] / len(chosen)
    return {"velocity_errors": squared_BxR.tolist(), "velocity_samples": len(chosen) * held_out.size}
