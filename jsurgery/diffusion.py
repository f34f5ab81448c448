"""Flow matching: noise levels, solvers and guidance.

x_t = (1 - sigma) x_0 + sigma * noise, velocity = noise - x_0, timestep = 1000 * sigma.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)


def shift_sigma(sigma: Array, shift: float) -> Array:
    """Moves noise levels in [0, 1] towards high noise (shift > 1)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sampling_sigmas(steps: int, shift: float) -> np.ndarray:
    """`steps + 1` noise levels from 1 to 0, float32."""
    return np.asarray(shift_sigma(np.linspace(1, 0, steps + 1), shift), np.float32)


def add_noise(latents: jax.Array, noise: jax.Array, sigma_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x_t, velocity) for latents [B, ...] at noise levels [B]."""
    sigma = sigma_B.reshape(-1, *(1,) * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise, noise - latents


def guided(velocity_2B: jax.Array, guidance: float) -> jax.Array:
    """Classifier-free guidance on a batch [conditional; unconditional]."""
    conditional, unconditional = jnp.split(velocity_2B, 2)
    return unconditional + guidance * (conditional - unconditional)


def solver_step(
    x: jax.Array, velocity: jax.Array, sigma: jax.Array, next_sigma: jax.Array, noise: jax.Array, solver: str
) -> jax.Array:
    """One step from `sigma` to `next_sigma`.

    "euler" is deterministic. "euler_ancestral" goes down to sigma_d = next_sigma^2 / sigma and renoises up to
    next_sigma; a = 1 - sigma scales the data, so that x keeps the variance that the model expects.
    """
    if solver == "euler":
        return x + (next_sigma - sigma) * velocity
    down = next_sigma**2 / sigma
    data = x - sigma * velocity
    scale = (1 - next_sigma) / (1 - down)
    renoise = jnp.sqrt(jnp.maximum(next_sigma**2 - (down * scale) ** 2, 0.0))
    return scale * (down / sigma * x + (1 - down / sigma) * data) + renoise * noise


def sample(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    *,
    steps: int,
    shift: float,
    solver: str,
    key: jax.Array,
    record: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Integrates from noise [B, ...] to latents. `velocity(x, timesteps [B])` includes guidance.

    Returns (latents, trajectory): trajectory [steps, B, ...] holds x before every step when `record`, else None.
    """
    sigmas = jnp.asarray(sampling_sigmas(steps, shift))

    def step(x, inputs):
        sigma, next_sigma, key = inputs
        v = velocity(x, jnp.full(x.shape[0], 1000 * sigma))
        new = solver_step(x, v, sigma, next_sigma, jax.random.normal(key, x.shape, x.dtype), solver)
        return new, x if record else None

    return jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:], jax.random.split(key, steps)))
