"""Solvers against closed forms and against diffusers' flow-matching scheduler."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from jsurgery.diffusion import add_noise, guided, sample, sampling_sigmas, solver_step


@pytest.mark.parametrize(("steps", "shift"), [(50, 5.0), (7, 3.0), (1, 1.0)])
def test_sigmas_are_those_of_wan(steps, shift):
    even = 1 - np.arange(steps) / steps
    expected = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even] + [0.0]
    np.testing.assert_allclose(sampling_sigmas(steps, shift), expected, rtol=1e-6)


def test_noise_and_velocity():
    rng = np.random.default_rng(0)
    latents, noise = rng.normal(size=(2, 3, 1, 4, 4, 5))
    noisy, velocity = add_noise(latents, noise, np.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(noisy, [latents[0], 0.75 * latents[1] + 0.25 * noise[1], noise[2]], atol=1e-6)
    np.testing.assert_allclose(velocity, noise - latents, atol=1e-6)


def test_guidance_runs_from_the_unconditional_half_past_the_conditional_one():
    both = jnp.array([[3.0], [5.0], [1.0], [1.0]])
    np.testing.assert_allclose(guided(both, 1.0), both[:2])
    np.testing.assert_allclose(guided(both, 0.0), both[2:])
    np.testing.assert_allclose(guided(both, 5.0), [[11.0], [21.0]])


def curved_velocity(x, timesteps):
    return np.cos(3 * x) + timesteps[0] / 1000 * x


def test_euler_is_that_of_diffusers():
    noise = np.random.default_rng(0).normal(size=(2, 1, 3, 3, 4)).astype(np.float32)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sampling_sigmas(9, 3.0)[:-1].tolist())
    expected, path = torch.tensor(noise), []
    for timestep in scheduler.timesteps:
        path.append(expected.numpy())
        velocity = curved_velocity(expected.numpy(), [timestep.item()])
        expected = scheduler.step(torch.tensor(velocity), timestep, expected, return_dict=False)[0]

    velocity = lambda x, timesteps: jnp.cos(3 * x) + timesteps[0] / 1000 * x
    key = jax.random.key(0)
    latents, trajectory = sample(velocity, noise, steps=9, shift=3.0, solver="euler", key=key, record=True)
    np.testing.assert_allclose(latents, expected, atol=2e-6)
    np.testing.assert_allclose(trajectory, path, atol=2e-6)


def moments(solver, steps, data_mean, data_variance):
    """Mean and variance after each step, and those that they should be, for Gaussian data and its exact velocity.

    Every step is then affine in x and in the fresh noise: three evaluations give its coefficients.
    """
    mean, variance, found, expected = 0.0, 1.0, [], []
    with jax.enable_x64(True):
        sigmas = sampling_sigmas(steps, 3.0).astype(np.float64)
        for sigma, next_sigma in itertools.pairwise(sigmas):
            x, noise = np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0])
            total = (1 - sigma) ** 2 * data_variance + sigma**2
            residual = (x - (1 - sigma) * data_mean) / total
            velocity = sigma * residual - data_mean - (1 - sigma) * data_variance * residual
            after = np.asarray(solver_step(x, velocity, sigma, next_sigma, noise, solver))
            constant, slope, spread = after[0], after[1] - after[0], after[2] - after[0]
            mean, variance = slope * mean + constant, slope**2 * variance + spread**2
            found.append((mean, variance))
            expected.append(((1 - next_sigma) * data_mean, (1 - next_sigma) ** 2 * data_variance + next_sigma**2))
    return np.array(found), np.array(expected)


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral"])
def test_a_single_point_of_data_is_solved_exactly(solver):
    found, expected = moments(solver, 6, 0.7, 0.0)
    np.testing.assert_allclose(found, expected, atol=1e-7)  # 1e-7: sigmas are float32


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral"])
def test_gaussian_data_keep_their_moments_as_steps_get_smaller(solver):
    """A first-order solver: twice the steps, half the error, at every noise level on the way."""
    errors = [np.abs(np.subtract(*moments(solver, steps, 0.7, 0.25))).max() for steps in (100, 200, 400)]
    assert errors[0] < 0.05
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 2, rtol=0.15)


def test_ancestral_steps_draw_fresh_noise():
    noise = jnp.zeros((2, 1, 4, 4, 3))
    velocity = lambda x, _: x
    run = lambda solver, seed: sample(velocity, noise, steps=4, shift=3.0, solver=solver, key=jax.random.key(seed))[0]
    assert np.array_equal(run("euler", 0), run("euler", 1))
    assert np.array_equal(run("euler_ancestral", 0), run("euler_ancestral", 0))
    assert not np.array_equal(run("euler_ancestral", 0), run("euler_ancestral", 1))
