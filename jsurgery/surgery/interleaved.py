"""Trajectories that the teacher samples while feature maps learn from its forwards: several, a step of each in turn."""

import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsurgery.data.shards import Records
from jsurgery.diffusion import Schedule, State, guided, initial_state, schedule, step_keys
from jsurgery.runtime.mesh import local_rows, put_rows, put_state
from jsurgery.surgery.trace import kept_steps
from jsurgery.wan.pipeline import initial_noise, sampling_step
from jsurgery.wan.transformer import WanTransformer


def turns(steps: int, slots: int) -> Iterator[tuple[int, int, int]]:
    """(slot, number of its batch of prompts, step of the sampler), endlessly.

    A round is one step of every slot. Slots begin a share of a trajectory apart, and anew when theirs ends, so that a
    round sees noise levels from all over the schedule.
    """
    numbers, batch = itertools.count(), {}
    for number in itertools.count():
        for slot in range(slots):
            waited = number - slot * steps // slots
            if waited >= 0:
                if waited % steps == 0:
                    batch[slot] = next(numbers)
                yield slot, batch[slot], waited % steps


def question(x: jax.Array, timesteps_B: jax.Array, text: jax.Array, blank: jax.Array | None) -> dict[str, jax.Array]:
    """What a teacher is asked of latents [B, ...]: each example with its prompt, beside it with the negative one."""
    beside = lambda one, other: one if blank is None else jnp.stack([one, other], 1).reshape(-1, *one.shape[1:])
    return {"latents": beside(x, x), "timestep": beside(timesteps_B, timesteps_B), "text": beside(text, blank)}


def answer(velocity: jax.Array, guidance: float) -> jax.Array:
    """The guided velocity [B, ...] of the velocities of a `question`."""
    if guidance == 1:
        return velocity
    pairs = velocity.reshape(-1, 2, *velocity.shape[1:])
    return guided(pairs[:, 0], pairs[:, 1], guidance)


class Trajectories:
    """Batches of training prompts on their way from noise to latents, by the solver of `trace`.

    Batch n holds the next `distill.batch` of the first `prompts` prompts; when these are through they come again, with
    other noise. The first time, prompt i has the noise that `trace` gives it.
    """

    def __init__(self, config: ConfigDict, texts: epath.Path, prompts: int, shape: tuple[int, ...], mesh: Mesh):
        self.config, self.texts, self.prompts = config, Records(texts), prompts
        self.shape, self.mesh, self.batch = shape, mesh, config.distill.batch
        self.rows, self.guidance = local_rows(mesh, self.batch), config.sampler.guidance
        self.schedule = schedule(config.trace.solver, config.sampler.steps, config.sampler.shift)

    def text(self, number: int) -> tuple[jax.Array, jax.Array | None]:
        """Embeddings [B, L, D] of a batch's prompts, and the negative prompt's as often unless guidance is 1."""
        embeddings = self._spread([(number * self.batch + row) % self.prompts for row in self.rows])
        return embeddings, None if self.guidance == 1 else self._spread([len(self.texts) - 1] * len(self.rows))

    def _spread(self, numbers: Sequence[int]) -> jax.Array:
        embeddings = np.stack([self.texts[number]["embedding"] for number in numbers])
        return put_rows(self.mesh, self.rows, self.batch, embeddings)

    def begin(self, number: int) -> State:
        """A batch's noise, whole on every device: so the state of a trajectory is kept between its steps."""
        times, prompts = np.divmod(number * self.batch + np.arange(self.batch), self.prompts)
        noise = initial_noise(self.config.seed, (prompts + times * self.config.trace.prompts).tolist(), self.shape)
        return put_state(self.mesh, jax.tree.map(np.asarray, initial_state(noise)))

    def step(self, number: int, position: int) -> tuple[Schedule, jax.Array | None]:
        """A row of the schedule, and the key of its fresh noise if it takes any."""
        keys = step_keys(self.schedule, jax.random.fold_in(jax.random.key(self.config.seed), number * self.batch))
        row = jax.tree.map(np.float32, self.schedule.row(position))
        return row, None if keys is None else keys[position]

    def questions(self, teacher: WanTransformer, count: int) -> list[dict[str, jax.Array]]:
        """What the first batch asks at `count` noise levels from first to last, maps apart."""
        state, (text, blank), asked = self.begin(0), self.text(0), []
        kept = set(kept_steps(len(self.schedule.sigma), count).tolist())
        for position in range(max(kept) + 1):
            row, key = self.step(0, position)
            if position in kept:
                timesteps = jnp.full(self.batch, row.timestep)
                asked.append(question(jnp.copy(state.x), timesteps, text, blank))
            state = sampling_step(teacher, text, blank, state, row, key, self.guidance, True)
        return asked
