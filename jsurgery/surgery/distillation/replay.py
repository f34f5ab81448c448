"""Distillation from traces: the teacher replays its traced steps in shuffled batches."""

from typing import Any

import grain
import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsurgery.data.latents import LocalRows
from jsurgery.runtime.guard import rows_with_faults
from jsurgery.runtime.mesh import global_batch, local_rows
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.surgery.distillation.update import make_optimizer, make_update
from jsurgery.surgery.trace import TraceSteps
from jsurgery.wan.transformer import WanTransformer

CALIBRATION_BATCHES = 8


class Replay:
    """Trains on the steps that `trace` kept, in shuffled batches. The number of the step selects the batch."""

    def __init__(self, config: ConfigDict, teacher: WanTransformer, mesh: Mesh, traces: epath.Path, spec: DistillSpec):
        settings, prompts = config.distill, range(config.trace.prompts - config.trace.holdout)
        self.mesh, self.size, self.repeats = mesh, settings.batch, settings.updates_per_batch
        self.rows = local_rows(mesh, self.size)
        steps = grain.MapDataset.source(TraceSteps(traces, prompts)).shuffle(seed=config.seed).repeat()
        rows = grain.MapDataset.source(LocalRows(steps, self.size, self.rows))
        self.data = rows.batch(len(self.rows), drop_remainder=True)
        graph, self.teacher_params = nnx.split(teacher)
        self.update = make_update(make_optimizer(config), graph, spec)

    def batch(self, index: int) -> dict[str, jax.Array]:
        return global_batch(self.mesh, self.rows, self.size, self.data[index])

    def calibration(self) -> list[dict[str, jax.Array]]:
        return [self.batch(index) for index in range(CALIBRATION_BATCHES)]

    def initial_trajectories(self) -> dict[str, Any]:
        """Further state of a run, beside maps and optimiser state: none here."""
        return {}

    def __call__(self, state: dict[str, Any], step: int) -> tuple[dict[str, Any], jax.Array]:
        # Each of Algorithm 1's U updates on a batch runs the teacher again, which is the cheaper part of a step.
        return self.update(state, self.teacher_params, self.batch(step // self.repeats))

    def describe_batch(self, step: int) -> str:
        """The batch of a step, and which of its examples are not finite, for a message."""
        batch = step // self.repeats
        bad = rows_with_faults(self.data[batch], self.rows)
        return f"batch {batch}" + (f", whose examples {', '.join(map(str, bad))} are not finite" if bad else "")
