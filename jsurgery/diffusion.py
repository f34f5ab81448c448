"""Flow matching: noise levels, solvers and guidance.

x_t = (1 - sigma) x_0 + sigma * noise, velocity = noise - x_0, timestep = 1000 * sigma.

All solvers here take the same step with different coefficients. The velocity predicts the data as x - sigma * velocity.
The next x is a linear combination of x, of the latest data predictions and, for some solvers, of fresh noise.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)
Velocity = Callable[[jax.Array, jax.Array], jax.Array]

LEAST_SIGMA = 0.001  # the lowest noise level of the 1000 training timesteps
INITIAL = 2**32 - 1  # folded into a video's key for its frames' initial noise; its steps have numbers from 0 on


def shift_sigma(sigma: Array, shift: float) -> Array:
    """Moves noise levels in [0, 1] towards high noise (shift > 1)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sampling_sigmas(steps: int, shift: float) -> np.ndarray:
    """The `steps + 1` noise levels of "euler_ancestral", from 1 to 0, float32."""
    return np.asarray(shift_sigma(np.linspace(1, 0, steps + 1), shift), np.float32)


def add_noise(latents: jax.Array, noise: jax.Array, sigma_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x_t, velocity) for latents [B, ...] at noise levels [B]."""
    sigma = sigma_B.reshape(-1, *(1,) * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise, noise - latents


def add_noise_at_random_levels(
    latents: jax.Array, key: jax.Array, shift: float, timesteps: Sequence[float] = ()
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x_t, timesteps [B], velocity) for latents [B, ...] at random noise levels.

    Before the shift, each of B equal parts of [0, 1] has one level. With `timesteps`, each example has one of these.
    """
    size = latents.shape[0]
    key_level, key_noise = jax.random.split(key)
    if timesteps:
        sigma_B = jax.random.choice(key_level, jnp.asarray(timesteps), (size,)) / 1000
    else:
        sigma_B = shift_sigma((jnp.arange(size) + jax.random.uniform(key_level, (size,))) / size, shift)
    noisy, velocity = add_noise(latents, jax.random.normal(key_noise, latents.shape), sigma_B)
    return noisy, 1000 * sigma_B, velocity


def velocities_per_step(guidance: float) -> int:
    """Velocities that a sampling step computes: the prompt's and, unless guidance is 1, the negative prompt's."""
    return 1 if guidance == 1 else 2


def guided(conditional: jax.Array, unconditional: jax.Array, guidance: float) -> jax.Array:
    """Classifier-free guidance: 0 is the unconditional velocity, 1 the conditional one."""
    return unconditional + guidance * (conditional - unconditional)


class Schedule(NamedTuple):
    """A solver's steps, one row each: NumPy float64 [steps, ...].

    Attributes:
      sigma: the noise level of x before the step.
      timestep: the timestep that the model receives for it.
      corrector: [steps, 5], coefficients of x, the last step's corrected x, and the data predictions of two steps ago,
        of the last step and of this step. They give the corrected x.
      predictor: [steps, 3], coefficients of the corrected x and the data predictions of the last and this step. They
        give the next x.
      renoise: the coefficient of fresh noise in the next x.
    """

    sigma: Any
    timestep: Any
    corrector: Any
    predictor: Any
    renoise: Any

    def row(self, step: int) -> "Schedule":
        """The coefficients of one step."""
        return Schedule(*(column[step] for column in self))


class State(NamedTuple):
    """A solver's state between two steps: x, and the past values that its coefficients refer to, all [B, ...]."""

    x: jax.Array
    previous_x: jax.Array
    older_data: jax.Array
    last_data: jax.Array


def schedule(solver: str, steps: int, shift: float, timesteps: Sequence[float] = ()) -> Schedule:
    """The steps of "euler", "euler_ancestral", "lcm" or "unipc" from noise to data.

    "euler" has the noise levels of diffusers' FlowMatchEulerDiscreteScheduler, "lcm" those of its
    FlowMatchLCMScheduler, and "unipc" the different ones of its UniPCMultistepScheduler (with flow sigmas). Where
    `timesteps` are given, the noise levels are theirs.
    """
    sigmas, timesteps_of_steps = noise_levels(solver, steps, shift, timesteps)
    sigma, ratio = sigmas[:-1], sigmas[1:] / sigmas[:-1]
    corrector = np.tile([1.0, 0.0, 0.0, 0.0, 0.0], (steps, 1))
    predictor = np.stack([ratio, np.zeros(steps), 1 - ratio], axis=1)
    renoise = np.zeros(steps)
    if solver == "euler_ancestral":
        predictor, renoise = ancestral_coefficients(sigmas)
    elif solver == "lcm":  # the data prediction, with fresh noise of the next level
        predictor, renoise = np.stack([0 * sigma, 0 * sigma, 1 - sigmas[1:]], axis=1), sigmas[1:]
    elif solver == "unipc":
        corrector, predictor = unipc_coefficients(sigmas)
    return Schedule(sigma, timesteps_of_steps, corrector, predictor, renoise)


def noise_levels(solver: str, steps: int, shift: float, given: Sequence[float] = ()) -> tuple[np.ndarray, np.ndarray]:
    """A solver's noise levels [steps + 1], of which the last is 0, and timesteps [steps].

    These are the `given` ones, or without any spread by the solver and moved by `shift`.
    """
    if len(given):
        timesteps = np.asarray(given, np.float64)
        sigma = np.minimum(timesteps / 1000, 1 - 1e-6) if solver == "unipc" else timesteps / 1000
    elif solver == "unipc":
        sigma = shift_sigma(np.linspace(1, LEAST_SIGMA, steps + 1)[:-1], shift)
        sigma[0] -= 1e-6  # pure noise has no finite log-SNR
        timesteps = np.floor(1000 * sigma)
    elif solver in ("euler", "lcm"):
        first, last = shift_sigma(np.array([1, LEAST_SIGMA]), shift)  # diffusers shifts the last level twice
        sigma = shift_sigma(np.linspace(first, last, steps), shift)
        timesteps = 1000 * sigma
    else:
        sigma = sampling_sigmas(steps, shift)[:-1]
        timesteps = 1000 * sigma
    return np.append(sigma, 0).astype(np.float32).astype(np.float64), timesteps.astype(np.float64)


def ancestral_coefficients(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predictor and renoise of Euler ancestral: a step down to next^2 / sigma, then fresh noise up to `next`.

    The result is scaled so that the data in x has its factor 1 - next, as the model expects.
    """
    sigma, following = sigmas[:-1], sigmas[1:]
    down = following**2 / sigma
    scale = (1 - following) / (1 - down)
    predictor = np.stack([scale * down / sigma, np.zeros_like(sigma), scale * (1 - down / sigma)], axis=1)
    return predictor, np.sqrt(np.maximum(following**2 - (down * scale) ** 2, 0.0))


def unipc_coefficients(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corrector and predictor of UniPC-2 with B_2(h) on data predictions (Zhao et al., arXiv 2302.04867).

    Once the velocity at x is known, the corrector computes x anew over the interval that the last predictor crossed.
    The first interval has only one data prediction and is of order 1. So is the last predictor, because the log-SNR at
    its end is infinite.
    """
    steps = len(sigmas) - 1
    log_snr = np.log((1 - sigmas[:-1]) / sigmas[:-1])
    ratio = sigmas[1:] / sigmas[:-1]  # the weight of x; the data has 1 - ratio, as in Euler's step
    corrector, predictor = np.zeros((steps, 5)), np.zeros((steps, 3))
    corrector[0, 0] = 1
    for i in range(1, steps):
        h = log_snr[i] - log_snr[i - 1]
        older, new = 0.0, 0.5
        if i > 1:
            r = (log_snr[i - 2] - log_snr[i - 1]) / h
            first = -1 / np.expm1(-h) - 1 / h
            second = -1 / np.expm1(-h) - 2 * first / h
            rho = (first - second) / (1 - r)
            older, new = rho / r, first - rho
        data = 1 - ratio[i - 1]
        corrector[i] = 0, ratio[i - 1], data * older, data * (1 - older - new), data * new
    for i in range(steps):
        last = 0.0
        if 0 < i < steps - 1:
            last = 0.5 * (log_snr[i + 1] - log_snr[i]) / (log_snr[i - 1] - log_snr[i])
        predictor[i] = ratio[i], (1 - ratio[i]) * last, (1 - ratio[i]) * (1 - last)
    return corrector, predictor


def initial_state(noise: jax.Array) -> State:
    """The state before the first step, whose x is `noise`."""
    zeros = jnp.zeros_like(noise)
    return State(noise, zeros, zeros, zeros)


def solver_step(
    velocity: Velocity,
    state: State,
    row: Schedule,
    key: jax.Array | None = None,
    first_frame: int | jax.Array | None = None,
) -> State:
    """The state after one step, by a row of a schedule.

    `key` draws fresh noise: one key for the batch, or [B], one for each of its rows; None for a solver without noise.
    With the number of x's `first_frame` in its video, it draws every frame by itself, of keys [B].
    """
    data = state.x - row.sigma * velocity(state.x, jnp.full(state.x.shape[0], row.timestep))
    terms = (state.x, state.previous_x, state.older_data, state.last_data, data)
    corrected = sum((row.corrector[i] * term for i, term in enumerate(terms)), start=jnp.zeros_like(data))
    x = row.predictor[0] * corrected + row.predictor[1] * state.last_data + row.predictor[2] * data
    if key is not None:
        draw = lambda key, x: jax.random.normal(key, x.shape, x.dtype)
        if first_frame is not None:
            draw = lambda key, x: noise_by_frame(key, first_frame, x.shape, x.dtype)
        x += row.renoise * (jax.vmap(draw) if key.ndim else draw)(key, x)
    return State(x, corrected, state.last_data, data)


def step_keys(rows: Schedule, key: jax.Array) -> jax.Array | None:
    """A key for every step, or None for a solver without fresh noise. Of keys [B], each step gets as many."""
    if not np.any(rows.renoise):
        return None
    split = lambda key: jax.random.split(key, len(rows.renoise))
    return jax.vmap(split, out_axes=1)(key) if key.ndim else split(key)


def sample(
    velocity: Velocity,
    noise: jax.Array,
    *,
    steps: int,
    shift: float,
    solver: str,
    key: jax.Array,
    record: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Integrates from noise [B, ...] to latents. `velocity(x, timesteps [B])` includes guidance.

    Returns (latents, trajectory). With `record` the trajectory [steps, B, ...] holds x before every step, else None.
    """
    rows = schedule(solver, steps, shift)

    def step(state, inputs):
        return solver_step(velocity, state, *inputs), state.x if record else None

    state, trajectory = jax.lax.scan(
        step, initial_state(noise), (jax.tree.map(jnp.asarray, rows), step_keys(rows, key))
    )
    return state.x, trajectory


def evenly_spaced_steps(steps: int, keep: int) -> np.ndarray:
    """The indices of `keep` steps of the sampler, evenly spread. The first and noisiest step is always among them."""
    return np.round(np.linspace(0, steps - 1, keep)).astype(int) if keep > 1 else np.array([0])


def initial_noise(
    seed: int, numbers: Sequence[int], shape: tuple[int, ...], frames: tuple[int, int] | None = None
) -> jax.Array:
    """Unit normal noise [B, *shape]. Row b depends on the seed and on `numbers[b]`, the prompt's number, alone.

    Args:
        seed, numbers: what the noise depends on.
        shape: (T, H, W, C), of the latents of a video.
        frames: the first of the video's latent frames that is drawn, and one past the last, as T of `shape`; every
            frame is drawn by itself. None: a video is drawn at once, which gives other noise.
    """
    key = jax.random.key(seed)
    keys = [jax.random.fold_in(key, number) for number in numbers]
    if frames is None:
        return jnp.stack([jax.random.normal(each, shape) for each in keys])
    first, end = frames
    draw = lambda each: noise_by_frame(jax.random.fold_in(each, INITIAL), first, (end - first, *shape[1:]))
    return jnp.stack([draw(each) for each in keys])


def noise_by_frame(
    key: jax.Array, first: int | jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> jax.Array:
    """Unit normal noise of `shape` = (T, ...), of frames from number `first` on. A frame depends on key and number."""
    draw = lambda number: jax.random.normal(jax.random.fold_in(key, number), shape[1:], dtype)
    return jax.vmap(draw)(first + jnp.arange(shape[0]))
