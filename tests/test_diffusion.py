"""Solvers against closed forms and against diffusers' schedulers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler
from diffusers.schedulers import scheduling_flow_match_lcm

from jsurgery.diffusion import (
    add_noise,
    guided,
    initial_noise,
    initial_state,
    noise_levels,
    sample,
    sampling_sigmas,
    schedule,
    solver_step,
    step_keys,
)

UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(("steps", "shift"), [(50, 5.0), (7, 3.0), (1, 1.0)])
def test_sigmas_are_those_of_wan(steps, shift):
    even = 1 - np.arange(steps) / steps
    expected = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even] + [0.0]
    np.testing.assert_allclose(sampling_sigmas(steps, shift), expected, rtol=1e-6)


def test_noisy_latents_and_their_velocity():
    rng = np.random.default_rng(0)
    latents, noise = rng.normal(size=(2, 3, 1, 4, 4, 5))
    noisy, velocity = add_noise(latents, noise, np.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(noisy, [latents[0], 0.75 * latents[1] + 0.25 * noise[1], noise[2]], atol=1e-6)
    np.testing.assert_allclose(velocity, noise - latents, atol=1e-6)


def test_guidance_extrapolates_from_the_unconditional_to_the_conditional_velocity():
    conditional, unconditional = jnp.array([3.0, 5.0]), jnp.array([1.0, 1.0])
    np.testing.assert_allclose(guided(conditional, unconditional, 1.0), conditional)
    np.testing.assert_allclose(guided(conditional, unconditional, 0.0), unconditional)
    np.testing.assert_allclose(guided(conditional, unconditional, 5.0), [11.0, 21.0])


def curved_velocity(x, timesteps):
    """A velocity that is nonlinear in x, with the timestep in the units of a Wan transformer."""
    return jnp.cos(3 * x) + timesteps[0] / 1000 * x


def trajectory_of_diffusers(scheduler, noise, steps):
    """x before every step and after the last step."""
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    x, path = torch.tensor(noise), []
    for timestep in scheduler.timesteps:
        path.append(x.numpy())
        velocity = np.array(curved_velocity(x.numpy(), np.array([timestep.item()], np.float32)))
        x = scheduler.step(torch.tensor(velocity), timestep, x, return_dict=False)[0]
    return np.stack([*path, x.numpy()])


def trajectory_of(rows, noise):
    state = initial_state(jnp.asarray(noise))
    path = [state.x]
    for i in range(len(rows.sigma)):
        state = solver_step(curved_velocity, state, rows.row(i))
        path.append(state.x)
    return np.stack(path)


def distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def toy_noise():
    return np.random.default_rng(0).normal(size=(2, 1, 3, 3, 4)).astype(np.float32)


@pytest.mark.parametrize(("steps", "shift"), [(20, 3.0), (20, 5.0), (50, 1.0), (3, 3.0), (2, 8.0), (1, 3.0)])
def test_noise_levels_are_those_of_diffusers(steps, shift):
    for solver, scheduler in (
        ("euler", FlowMatchEulerDiscreteScheduler(shift=shift)),
        ("lcm", FlowMatchLCMScheduler(shift=shift)),
        ("unipc", UniPCMultistepScheduler(**UNIPC, flow_shift=shift)),
    ):
        scheduler.set_timesteps(steps)
        sigmas, timesteps = noise_levels(solver, steps, shift)
        np.testing.assert_allclose(sigmas, scheduler.sigmas, atol=2e-7)
        np.testing.assert_allclose(timesteps, scheduler.timesteps, rtol=2e-7)


@pytest.mark.parametrize(("steps", "shift"), [(20, 3.0), (20, 5.0), (4, 8.0), (3, 3.0), (2, 1.0), (1, 3.0)])
def test_unipc_equals_diffusers(steps, shift, toy_noise):
    expected = trajectory_of_diffusers(UniPCMultistepScheduler(**UNIPC, flow_shift=shift), toy_noise, steps)
    assert distance(trajectory_of(schedule("unipc", steps, shift), toy_noise), expected) < 1e-5


def test_control_unipc_with_other_settings_or_coefficients_differs(toy_noise):
    rows = schedule("unipc", 20, 3.0)
    found = trajectory_of(rows, toy_noise)
    for other in (
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_type": "bh1"},
        {"disable_corrector": [7]},
        {"flow_shift": 3.1},
    ):
        scheduler = UniPCMultistepScheduler(**UNIPC | {"flow_shift": 3.0} | other)
        expected = trajectory_of_diffusers(scheduler, toy_noise, 20)
        assert distance(found[:-1], expected[:-1]) > 1e-4, other  # without the last step, where bh1 gives NaN
    expected = trajectory_of_diffusers(UniPCMultistepScheduler(**UNIPC, flow_shift=3.0), toy_noise, 20)
    for field in ("corrector", "predictor"):
        for column in range(getattr(rows, field).shape[1]):
            perturbed = getattr(rows, field).copy()
            perturbed[9, column] += 1e-3
            assert distance(trajectory_of(rows._replace(**{field: perturbed}), toy_noise), expected) > 5e-5, field


@pytest.mark.parametrize(("steps", "shift"), [(20, 3.0), (20, 5.0), (9, 1.0), (1, 3.0)])
def test_euler_equals_diffusers(steps, shift, toy_noise):
    expected = trajectory_of_diffusers(FlowMatchEulerDiscreteScheduler(shift=shift), toy_noise, steps)
    assert distance(trajectory_of(schedule("euler", steps, shift), toy_noise), expected) < 1e-5


@pytest.mark.parametrize(
    ("steps", "shift", "given"), [(4, 3.0, ()), (8, 5.0, ()), (1, 1.0, ()), (3, 8.0, (1000.0, 757.0, 522.0))]
)
def test_lcm_equals_diffusers_with_the_same_noise(monkeypatch, steps, shift, given, toy_noise):
    drawn = np.random.default_rng(1).normal(size=(steps, *toy_noise.shape)).astype(np.float32)
    scheduler = FlowMatchLCMScheduler(shift=1.0 if given else shift)
    if given:  # diffusers shifts what it is given
        scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, sigmas=[t / 1000 for t in given])
    noises = iter(drawn)
    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", lambda *_, **__: torch.tensor(next(noises)))
    expected = trajectory_of_diffusers(scheduler, toy_noise, steps)
    rows, state, path = schedule("lcm", steps, shift, given), initial_state(jnp.asarray(toy_noise)), [toy_noise]
    for i in range(steps):
        state = solver_step(curved_velocity, state, rows.row(i))
        state = state._replace(x=state.x + rows.renoise[i] * drawn[i])
        path.append(np.asarray(state.x))
    assert distance(np.stack(path), expected) < 1e-5
    if steps > 1:
        assert rows.renoise[0] > 0.5 and rows.renoise[-1] == 0
        euler = trajectory_of(schedule("euler", steps, shift, given), toy_noise)
        assert distance(euler, expected) > 1e-2, "the control"


def test_given_timesteps_are_the_noise_levels_of_every_solver(toy_noise):
    given = (1000.0, 937.5, 2500 / 3, 625.0)
    for solver in ("euler", "euler_ancestral", "lcm", "unipc"):
        rows = schedule(solver, 4, 3.0, given)
        np.testing.assert_allclose(rows.timestep, given)
        np.testing.assert_allclose(rows.sigma, np.array(given) / 1000, atol=2e-6)
        assert np.isfinite(trajectory_of(rows, toy_noise)).all()
    # lightx2v's are even steps with a shift of 5.
    np.testing.assert_allclose(schedule("euler_ancestral", 4, 5.0).timestep, given, rtol=1e-6)


def test_control_euler_with_other_settings_or_coefficients_differs(toy_noise):
    expected = trajectory_of_diffusers(FlowMatchEulerDiscreteScheduler(shift=3.0), toy_noise, 20)
    rows = schedule("euler", 20, 3.0)
    perturbed = rows.predictor.copy()
    perturbed[9, 0] += 1e-3
    assert distance(trajectory_of(rows._replace(predictor=perturbed), toy_noise), expected) > 1e-4
    assert distance(trajectory_of(schedule("unipc", 20, 3.0), toy_noise), expected) > 1e-3
    assert distance(trajectory_of(schedule("euler", 20, 3.1), toy_noise), expected) > 1e-3


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_the_compiled_loop_takes_the_same_steps_and_records_them(solver, toy_noise):
    key = jax.random.key(0)
    latents, trajectory = sample(curved_velocity, toy_noise, steps=6, shift=3.0, solver=solver, key=key, record=True)
    expected = trajectory_of(schedule(solver, 6, 3.0), toy_noise)
    np.testing.assert_allclose(trajectory, expected[:-1], atol=2e-6)
    np.testing.assert_allclose(latents, expected[-1], atol=2e-6)


def moments(solver, steps, data_mean, data_variance):
    """(mean, variance) of x after each step, found and expected, for Gaussian data and its exact velocity.

    A step is affine in x, so that two evaluations give its coefficients, and adds fresh noise of a known scale.
    """
    mean, variance, found, expected = 0.0, 1.0, [], []
    with jax.enable_x64(True):
        rows = schedule(solver, steps, 3.0)
        for i, (sigma, next_sigma) in enumerate(zip(rows.sigma, [*rows.sigma[1:], 0.0], strict=True)):

            def velocity(x, timesteps, sigma=sigma):
                residual = (x - (1 - sigma) * data_mean) / ((1 - sigma) ** 2 * data_variance + sigma**2)
                return sigma * residual - data_mean - (1 - sigma) * data_variance * residual

            row = rows.row(i)
            constant, one = solver_step(velocity, initial_state(jnp.array([0.0, 1.0])), row).x
            slope = one - constant
            mean, variance = slope * mean + constant, slope**2 * variance + row.renoise**2
            found.append((mean, variance))
            expected.append(((1 - next_sigma) * data_mean, (1 - next_sigma) ** 2 * data_variance + next_sigma**2))
    return np.array(found), np.array(expected)


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral"])
def test_data_with_zero_variance_are_sampled_exactly(solver):
    found, expected = moments(solver, 6, 0.7, 0.0)
    np.testing.assert_allclose(found, expected, atol=1e-7)  # as sigmas are float32


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral"])
def test_errors_of_moments_of_gaussian_data_are_of_first_order(solver):
    """Twice the number of steps halves the errors."""
    errors = [np.abs(np.subtract(*moments(solver, steps, 0.7, 0.25))).max() for steps in (100, 200, 400)]
    assert errors[0] < 0.05
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 2, rtol=0.15)


def test_ancestral_steps_draw_fresh_noise():
    noise = jnp.zeros((2, 1, 4, 4, 3))
    velocity = lambda x, timesteps: x
    run = lambda solver, seed: sample(velocity, noise, steps=4, shift=3.0, solver=solver, key=jax.random.key(seed))[0]
    assert np.array_equal(run("euler", 0), run("euler", 1))
    assert np.array_equal(run("euler_ancestral", 0), run("euler_ancestral", 0))
    assert not np.array_equal(run("euler_ancestral", 0), run("euler_ancestral", 1))


def test_fresh_noise_has_the_scale_of_the_schedule():
    rows = schedule("euler_ancestral", 4, 3.0)
    row = rows.row(1)
    state = initial_state(jnp.zeros((1, 100_000)))
    drawn = solver_step(lambda x, timesteps: x, state, row, jax.random.key(0)).x
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [0, row.renoise], atol=0.01)
    assert row.renoise > 0.3


def test_noise_of_a_frame_does_not_depend_on_the_others():
    """Of frames 3 and 4 of a video of 6: the initial noise, and the fresh noise of every step."""
    shape, rows = (6, 8, 8, 4), schedule("lcm", 3, 3.0)
    whole, part = (initial_noise(1, [5, 6], shape, frames) for frames in ((0, 6), (3, 5)))
    assert np.array_equal(whole[:, 3:5], part) and whole.shape == (2, *shape)
    keys = step_keys(rows, jnp.stack([jax.random.key(5), jax.random.key(6)]))
    fresh = lambda x, i, first: solver_step(lambda x, _: 0 * x, initial_state(0 * x), rows.row(i), keys[i], first).x
    steps = [fresh(whole, i, 0) for i in range(2)]
    for i, drawn in enumerate(steps):
        assert np.array_equal(drawn[:, 3:5], fresh(part, i, 3))
        assert drawn.std() == pytest.approx(rows.renoise[i], rel=0.05)

    frames = np.concatenate([np.asarray(each).reshape(12, -1) for each in (whole, *steps)])  # 2 videos, 3 draws
    assert whole.std() == pytest.approx(1, rel=0.05)
    assert np.abs(np.corrcoef(frames) - np.eye(36)).max() < 0.3, "two frames have the same noise"
    assert not np.array_equal(initial_noise(1, [5], shape), initial_noise(1, [5], shape, (0, 6)))
