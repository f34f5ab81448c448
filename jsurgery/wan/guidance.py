"""Classifier-free guidance: a prompt's and the negative prompt's velocities in one forward."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jsurgery.diffusion import State, Velocity, guided, solver_step
from jsurgery.wan.transformer import WanTransformer


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


@functools.partial(nnx.jit, static_argnames=("guidance", "batched"))
def sampling_step(transformer, text, blank, state: State, row, key, guidance: float, batched: bool):
    """The next state of a solver from `state` by a row of its schedule."""
    return solver_step(guided_velocity(transformer, text, blank, guidance, batched), state, row, key)


def guided_velocity(
    transformer: WanTransformer, text: jax.Array, blank: jax.Array | None, guidance: float, batched: bool
) -> Velocity:
    """The velocity (x, timesteps) of text [B, L, D] guided away from `blank` [1, L, D]; float32.

    `batched` runs both branches as one batch of 2 B, else one after the other. Without `blank` there is one branch.
    """
    if blank is None:
        return lambda x, timesteps: transformer(x, timesteps, text).astype(jnp.float32)
    blank = jnp.broadcast_to(blank, text.shape)

    def velocity(x, timesteps):
        if batched:
            both = transformer(jnp.tile(x, (2, 1, 1, 1, 1)), jnp.tile(timesteps, 2), jnp.concatenate([text, blank]))
            conditional, unconditional = jnp.split(both, 2)
        else:
            conditional, unconditional = (transformer(x, timesteps, words) for words in (text, blank))
        return guided(conditional.astype(jnp.float32), unconditional.astype(jnp.float32), guidance)

    return velocity
