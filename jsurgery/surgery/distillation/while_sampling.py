"""Distillation without traces: feature maps learn from the forwards by which the teacher samples.

Several trajectories are sampled at once, one step of each in turn.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from jsurgery.data.latents import clip_record
from jsurgery.data.shards import Record, Records, array_text
from jsurgery.diffusion import (
    Schedule,
    State,
    evenly_spaced_steps,
    initial_noise,
    initial_state,
    schedule,
    solver_step,
    step_keys,
)
from jsurgery.runtime import processes
from jsurgery.runtime.mesh import global_batch, local_rows, put_state, sharding, to_host
from jsurgery.surgery.distillation.replay import CALIBRATION_BATCHES
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, loss_gradients
from jsurgery.surgery.distillation.update import apply_gradients, make_optimizer
from jsurgery.surgery.trace import padded_embedding, write_clips
from jsurgery.wan.guidance import guidance_batch, guide, sampling_step
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.video_size import latent_grid


def round_robin(steps: int, slots: int) -> Iterator[tuple[int, int, int]]:
    """Yields (slot, number of its batch of prompts, step of the sampler), endlessly.

    A round is one step of every slot. The slots start 1/slots of a trajectory apart, so that a round covers noise
    levels from the whole schedule. A slot whose trajectory ends starts the next one.
    """
    numbers, batch = itertools.count(), {}
    for number in itertools.count():
        for slot in range(slots):
            waited = number - slot * steps // slots
            if waited >= 0:
                if waited % steps == 0:
                    batch[slot] = next(numbers)
                yield slot, batch[slot], waited % steps


def own_clips(config: ConfigDict) -> int:
    """The clips that trajectories of training prompts end at, which fine-tuning reads if it is given no other data."""
    if config.distill.mode == "traces":
        return config.trace.prompts - config.trace.holdout
    turns = itertools.islice(round_robin(config.sampler.steps, config.distill.trajectories), config.distill.steps)
    return config.distill.batch * sum(position + 1 == config.sampler.steps for _, _, position in turns)


class Trajectories:
    """Batches of training prompts that the solver of `trace` samples.

    Batch n holds the next `distill.batch` of the first `prompts` prompts. After the last prompt the first one follows
    again, with other noise. In the first round prompt i has the noise that `trace` gives it.
    """

    def __init__(self, config: ConfigDict, texts: epath.Path, prompts: int, shape: tuple[int, ...], mesh: Mesh):
        self.config, self.texts, self.prompts = config, Records(texts), prompts
        self.shape, self.mesh, self.batch = shape, mesh, config.distill.batch
        self.rows, self.guidance = local_rows(mesh, self.batch), config.sampler.guidance
        self.schedule = schedule(
            config.trace.solver, config.sampler.steps, config.sampler.shift, config.sampler.timesteps
        )

    def text(self, number: int) -> tuple[jax.Array, jax.Array | None]:
        """Embeddings [B, L, D] of a batch's prompts, and the negative prompt's as often unless guidance is 1."""
        embeddings = self._spread([(number * self.batch + row) % self.prompts for row in self.rows])
        return embeddings, None if self.guidance == 1 else self._spread([len(self.texts) - 1] * len(self.rows))

    def _spread(self, numbers: Sequence[int]) -> jax.Array:
        embeddings = np.stack([padded_embedding(self.texts[number]) for number in numbers])
        return global_batch(self.mesh, self.rows, self.batch, embeddings)

    def clips(self, number: int, latents_BxTxHxWxC: np.ndarray) -> list[Record]:
        """The records of the clips at which the trajectories of a batch end."""
        texts = [self.texts[(number * self.batch + row) % self.prompts] for row in range(self.batch)]
        return [
            clip_record(latents, text["embedding"], array_text(text["prompt"]))
            for latents, text in zip(latents_BxTxHxWxC, texts, strict=True)
        ]

    def begin(self, number: int) -> State:
        """The noise of a batch, replicated on every device, as the state of a trajectory is between its steps."""
        times, prompts = np.divmod(number * self.batch + np.arange(self.batch), self.prompts)
        numbers = (prompts + times * self.config.trace.prompts).tolist()
        frames = (0, self.shape[0]) if self.config.sampler.noise == "frame" else None
        noise = initial_noise(self.config.seed, numbers, self.shape, frames)
        return put_state(self.mesh, jax.tree.map(np.asarray, initial_state(noise)))

    def step(self, number: int, position: int) -> tuple[Schedule, jax.Array | None]:
        """A row of the schedule, and the random key of its noise if the solver adds any."""
        keys = step_keys(self.schedule, jax.random.fold_in(jax.random.key(self.config.seed), number * self.batch))
        row = jax.tree.map(np.float32, self.schedule.row(position))
        return row, None if keys is None else keys[position]

    def calibration_batches(self, teacher: WanTransformer, count: int) -> list[dict[str, jax.Array]]:
        """The transformer's inputs for the first batch of prompts, at `count` noise levels from first to last."""
        state, (text, negative_text), batches = self.begin(0), self.text(0), []
        kept = set(evenly_spaced_steps(len(self.schedule.sigma), count).tolist())
        for position in range(max(kept) + 1):
            row, key = self.step(0, position)
            if position in kept:
                timesteps = jnp.full(self.batch, row.timestep)
                batches.append(guidance_batch(jnp.copy(state.x), timesteps, text, negative_text, in_pairs=True))
            state = sampling_step(teacher, text, negative_text, state, row, key, self.guidance, True)
        return batches


@functools.lru_cache(maxsize=8)
def make_sampling_update(
    optimizer: optax.GradientTransformation,
    graph: nnx.GraphDef,
    spec: DistillSpec,
    guidance: float,
    where: NamedSharding,
) -> Any:
    """An update of the maps inside a step of the sampler, overwriting state and trajectory.

    (state, parameters of the teacher, trajectory, text, negative text, row of the schedule, key) -> (state, trajectory,
    losses). The trajectory has the sharding `where`.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def update(state, teacher_params, trajectory, text, negative_text, row, key):
        teacher, learned = nnx.merge(graph, teacher_params), []

        def velocity(x, timesteps_B):
            batch = guidance_batch(x, timesteps_B, text, negative_text, in_pairs=True)
            velocity, losses, gradients = loss_gradients(teacher, batch, state["maps"], spec, all_blocks=True)
            learned.append((losses, gradients))
            velocity = velocity.astype(jnp.float32)
            return velocity if negative_text is None else guide(velocity, guidance, in_pairs=True)

        trajectory = jax.lax.with_sharding_constraint(solver_step(velocity, trajectory, row, key), where)
        ((losses, gradients),) = learned
        state, losses = apply_gradients(optimizer, state, losses, gradients, spec.rates)
        return state, trajectory, losses

    return update


class WhileSampling:
    """Trains inside the forwards by which the teacher samples `distill.trajectories` batches of prompts in turn."""

    def __init__(
        self,
        config: ConfigDict,
        teacher: WanTransformer,
        mesh: Mesh,
        traces: epath.Path,
        spec: DistillSpec,
        folder: epath.Path,
    ):
        """`folder` gets the clips at which trajectories end, as those of `trace`."""
        settings, sampler, video = config.distill, config.sampler, config.video
        grid = latent_grid(video.frames, video.height, video.width, teacher.config.strides)
        shape = *grid, teacher.config.in_channels
        prompts = config.trace.prompts - config.trace.holdout
        self.teacher, self.slots, self.folder = teacher, settings.trajectories, folder
        self.trajectories = Trajectories(config, traces / "text", prompts, shape, mesh)
        self.turns = list(itertools.islice(round_robin(sampler.steps, self.slots), settings.steps))
        graph, self.teacher_params = nnx.split(teacher)
        self.update = make_sampling_update(make_optimizer(config), graph, spec, sampler.guidance, sharding(mesh))

    def calibration(self) -> list[dict[str, jax.Array]]:
        return self.trajectories.calibration_batches(self.teacher, CALIBRATION_BATCHES)

    def initial_trajectories(self) -> dict[str, Any]:
        """Further state of a run, beside maps and optimiser state: the trajectories."""
        return {"trajectories": [self.trajectories.begin(slot) for slot in range(self.slots)]}

    def __call__(self, state: dict[str, Any], step: int) -> tuple[dict[str, Any], jax.Array]:
        slot, number, position = self.turns[step]
        map_state, trajectories = {name: state[name] for name in ("maps", "opt_state")}, list(state["trajectories"])
        trajectory = trajectories[slot] if position else self.trajectories.begin(number)
        inputs = *self.trajectories.text(number), *self.trajectories.step(number, position)
        map_state, trajectories[slot], losses = self.update(map_state, self.teacher_params, trajectory, *inputs)
        if position + 1 == self.trajectories.config.sampler.steps:
            latents = to_host(trajectories[slot].x)
            processes.on_first(lambda: write_clips(self.folder, number, self.trajectories.clips(number, latents)))
        return map_state | {"trajectories": trajectories}, losses

    def describe_batch(self, step: int) -> str:
        """The batch and sampler step of a step, for a message."""
        _, number, position = self.turns[step]
        return f"batch {number} of prompts at step {position} of the sampler"
