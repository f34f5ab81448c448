"""The steps of distillation: over the traces of the teacher, or inside the forwards by which it samples."""

import functools
import itertools
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from jsurgery.data.latents import Rows
from jsurgery.diffusion import solver_step
from jsurgery.runtime.guard import rows_with_faults
from jsurgery.runtime.mesh import local_rows, put_rows, sharding
from jsurgery.surgery.interleaved import Trajectories, answer, question, turns
from jsurgery.surgery.trace import TraceSteps
from jsurgery.surgery.update import make_optimizer, make_update, stepped
from jsurgery.surgery.visits import Setup, learn
from jsurgery.wan.pipeline import latent_grid
from jsurgery.wan.transformer import WanTransformer

CALIBRATION_BATCHES = 8


@functools.lru_cache(maxsize=8)
def make_sampling_update(
    optimizer: optax.GradientTransformation, graph: nnx.GraphDef, setup: Setup, guidance: float, where: NamedSharding
) -> Any:
    """The same step inside a step of the sampler: (state, teacher's parameters, trajectory, text, negative text, row of
    the schedule, key) -> (state, trajectory, losses). The trajectory's state is kept `where`."""

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def update(state, teacher_params, trajectory, text, blank, row, key):
        teacher, learnt = nnx.merge(graph, teacher_params), []

        def velocity(x, timesteps_B):
            asked = question(x, timesteps_B, text, blank)
            velocity, *found = learn(teacher, asked, state["maps"], setup, whole=True)
            learnt.append(found)
            return answer(velocity.astype(jnp.float32), guidance)

        trajectory = jax.lax.with_sharding_constraint(solver_step(velocity, trajectory, row, key), where)
        ((losses, gradients),) = learnt
        state, losses = stepped(optimizer, state, losses, gradients)
        return state, trajectory, losses

    return update


class Replay:
    """Learning from what `trace` left, in shuffled batches; the step of a run says which is the next."""

    def __init__(self, config: ConfigDict, teacher: WanTransformer, mesh: Mesh, traces: epath.Path, setup: Setup):
        settings, prompts = config.distill, range(config.trace.prompts - config.trace.holdout)
        self.mesh, self.size, self.repeats = mesh, settings.batch, settings.updates_per_batch
        self.rows = local_rows(mesh, self.size)
        steps = grain.MapDataset.source(TraceSteps(traces, prompts)).shuffle(seed=config.seed).repeat()
        rows = grain.MapDataset.source(Rows(steps, self.size, self.rows))
        self.data = rows.batch(len(self.rows), drop_remainder=True)
        graph, self.teacher_params = nnx.split(teacher)
        self.update = make_update(make_optimizer(config), graph, setup)

    def batch(self, index: int) -> dict[str, jax.Array]:
        return put_rows(self.mesh, self.rows, self.size, self.data[index])

    def calibration(self) -> list[dict[str, jax.Array]]:
        return [self.batch(index) for index in range(CALIBRATION_BATCHES)]

    def under_way(self) -> dict[str, Any]:
        """What a run keeps beside maps and moments."""
        return {}

    def __call__(self, state: dict[str, Any], step: int) -> tuple[dict[str, Any], jax.Array]:
        # Algorithm 1's U updates on a batch run the teacher again: its forward is the cheaper part of a step.
        return self.update(state, self.teacher_params, self.batch(step // self.repeats))

    def source(self, step: int) -> str:
        """What a step learns from, and whether that is finite."""
        batch = step // self.repeats
        bad = rows_with_faults(self.data[batch], self.rows)
        return f"batch {batch}" + (f", whose examples {', '.join(map(str, bad))} are not finite" if bad else "")


class Sampling:
    """Learning inside the forwards by which the teacher samples `distill.trajectories` batches of prompts in turn."""

    def __init__(self, config: ConfigDict, teacher: WanTransformer, mesh: Mesh, traces: epath.Path, setup: Setup):
        settings, sampler, video = config.distill, config.sampler, config.video
        shape = *latent_grid(video.frames, video.height, video.width), teacher.config.in_channels
        prompts = config.trace.prompts - config.trace.holdout
        self.teacher, self.slots = teacher, settings.trajectories
        self.trajectories = Trajectories(config, traces / "text", prompts, shape, mesh)
        self.turns = list(itertools.islice(turns(sampler.steps, self.slots), settings.steps))
        graph, self.teacher_params = nnx.split(teacher)
        self.update = make_sampling_update(make_optimizer(config), graph, setup, sampler.guidance, sharding(mesh))

    def calibration(self) -> list[dict[str, jax.Array]]:
        return self.trajectories.questions(self.teacher, CALIBRATION_BATCHES)

    def under_way(self) -> dict[str, Any]:
        """The trajectories, as far as they have come."""
        return {"trajectories": [self.trajectories.begin(slot) for slot in range(self.slots)]}

    def __call__(self, state: dict[str, Any], step: int) -> tuple[dict[str, Any], jax.Array]:
        slot, number, position = self.turns[step]
        learnt, trajectories = {name: state[name] for name in ("maps", "opt_state")}, list(state["trajectories"])
        trajectory = trajectories[slot] if position else self.trajectories.begin(number)
        asked = *self.trajectories.text(number), *self.trajectories.step(number, position)
        learnt, trajectories[slot], losses = self.update(learnt, self.teacher_params, trajectory, *asked)
        return learnt | {"trajectories": trajectories}, losses

    def source(self, step: int) -> str:
        """What a step learns from."""
        _, number, position = self.turns[step]
        return f"batch {number} of prompts at step {position} of the sampler"


MODES = {"traces": Replay, "sampling": Sampling}
