"""Sampling on the bundled model against diffusers' WanPipeline, and equivalent ways to take the same steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, WanPipeline
from diffusers.schedulers import scheduling_flow_match_lcm
from flax import nnx

from jsurgery.diffusion import initial_noise, initial_state, sample, schedule, step_keys
from jsurgery.errors import InputError
from jsurgery.load_config import load_config
from jsurgery.wan import pipeline as pipeline_module
from jsurgery.wan.guidance import guided_velocity, sampling_step
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_folder import BUNDLED
from jsurgery.wan.models import BY_KIND
from jsurgery.wan.pipeline import load_pipeline
from jsurgery.wan.video_size import check_size

PROMPT = "a red circle moves left over a grey background"
NEGATIVE = "a blue square"
SMALL = {"video.frames": "5", "video.height": "64", "video.width": "48", "sampler.solver": "unipc"}


def small(**fields):
    named = {f"sampler.{name}": str(value) for name, value in fields.items()}
    return load_config("tiny", SMALL | {"trace.keep_steps": "1", "sampler.negative_prompt": NEGATIVE} | named)


@pytest.fixture(scope="module")
def ours():
    return load_pipeline("tiny_wan")


@pytest.fixture(scope="module")
def theirs():
    pipeline = WanPipeline.from_pretrained(BUNDLED["tiny_wan"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_diffusers_loads_the_bundled_folder(theirs):
    assert {name for name, part in theirs.components.items() if part is None} <= {"transformer_2"}
    scheduler = theirs.scheduler.config
    assert (scheduler.prediction_type, scheduler.use_flow_sigmas, scheduler.flow_shift) == (
        "flow_prediction",
        True,
        3.0,
    )


def test_the_pipeline_module_exports_model_path():
    """The code on published model cards imports it from there."""
    assert pipeline_module.model_path("tiny_wan") == BUNDLED["tiny_wan"]


def latents_of_diffusers(pipeline, config, noise_BxTxHxWxC, negative=NEGATIVE):
    sampler, video = config.sampler, config.video
    latents = pipeline(
        PROMPT,
        negative_prompt=negative,
        height=video.height,
        width=video.width,
        num_frames=video.frames,
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance,
        latents=torch.tensor(np.asarray(noise_BxTxHxWxC)).permute(0, 4, 1, 2, 3),
        output_type="latent",
        max_sequence_length=config.text_length,
    ).frames
    return latents.permute(0, 2, 3, 4, 1).numpy()


def distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_unipc_with_guidance_equals_diffusers(ours, theirs):
    config = small(steps=20, guidance=5.0)
    noise = initial_noise(7, [0], ours.latent_shape(5, 64, 48))
    expected = latents_of_diffusers(theirs, config, noise)
    found = ours.sample([PROMPT], config, seed=7)[0]
    assert found.shape == expected.shape and distance(found, expected) < 1e-3
    video = ours.decode(found)[0]
    decoded = theirs.vae.decode(unnormalised(theirs.vae, expected), return_dict=False)[0].detach()
    decoded = np.round((decoded[0].permute(1, 2, 3, 0).clamp(-1, 1).numpy() + 1) * 127.5)
    assert video.shape == (5, 64, 48, 3) and np.abs(video - decoded).max() <= 1


def unnormalised(vae, latents_BxTxHxWxC):
    mean, std = np.array(vae.config.latents_mean), np.array(vae.config.latents_std)
    return torch.tensor((latents_BxTxHxWxC * std + mean).astype(np.float32)).permute(0, 4, 1, 2, 3)


def test_control_another_prompt_shift_guidance_or_noise_differs(ours, theirs):
    """With fewer steps than the test above; the unchanged settings must equal diffusers."""
    config = small(steps=4, guidance=5.0)
    expected = latents_of_diffusers(theirs, config, initial_noise(7, [0], ours.latent_shape(5, 64, 48)))
    end = lambda prompt, config, seed=7: ours.sample([prompt], config, seed=seed)[0]
    assert distance(end(PROMPT, config), expected) < 1e-3
    assert distance(end(PROMPT, small(steps=4, negative_prompt="")), expected) > 5e-3
    assert distance(end(NEGATIVE, config), expected) > 5e-3
    assert distance(end(PROMPT, small(steps=4, shift=5.0)), expected) > 5e-3
    assert distance(end(PROMPT, small(steps=4, guidance=4.0)), expected) > 5e-3
    assert distance(end(PROMPT, config, seed=8), expected) > 5e-3


def test_euler_without_guidance_equals_diffusers(ours, theirs):
    config = small(steps=6, guidance=1.0, solver="euler")
    noise = initial_noise(7, [0], ours.latent_shape(5, 64, 48))
    unipc = theirs.scheduler
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=config.sampler.shift)
    expected = latents_of_diffusers(theirs, config, noise)
    theirs.scheduler = unipc
    assert distance(ours.sample([PROMPT], config, seed=7)[0], expected) < 1e-3


@pytest.mark.parametrize(
    "model", [None, "fastwan2.1-1.3b", "lightx2v-14b"], ids=["consistency", "FastWan's steps", "lightx2v's steps"]
)
def test_few_steps_equal_diffusers_with_its_consistency_scheduler(monkeypatch, ours, theirs, model):
    """The solver adds noise, which both get from our keys."""
    fields = {"steps": 4, "shift": 3.0, "guidance": 1.0, "solver": "lcm"}
    if model is not None:
        defaults = BY_KIND[model].defaults
        fields = {name: defaults[f"sampler.{name}"] for name in ("steps", "timesteps", "shift", "guidance", "solver")}
    config = small(**fields)
    noise = initial_noise(7, [0], ours.latent_shape(5, 64, 48))
    rows = schedule("lcm", config.sampler.steps, config.sampler.shift, config.sampler.timesteps)
    keys = step_keys(rows, jax.random.fold_in(jax.random.key(7), 0))
    drawn = iter([np.asarray(jax.random.normal(key, noise.shape)) for key in keys])
    draw = lambda *_, **__: torch.tensor(next(drawn)).permute(0, 4, 1, 2, 3)
    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", draw)
    scheduler = FlowMatchLCMScheduler(shift=1.0 if config.sampler.timesteps else config.sampler.shift)
    if config.sampler.timesteps:  # the pipeline has no argument for them
        sigmas = [timestep / 1000 for timestep in config.sampler.timesteps]
        set_timesteps = scheduler.set_timesteps
        monkeypatch.setattr(scheduler, "set_timesteps", lambda steps, device=None: set_timesteps(steps, device, sigmas))
    monkeypatch.setattr(theirs, "scheduler", scheduler)
    expected = latents_of_diffusers(theirs, config, noise)
    assert distance(ours.sample([PROMPT], config, seed=7)[0], expected) < 1e-3
    euler = ours.sample([PROMPT], small(**fields | {"solver": "euler"}), seed=7)[0]
    assert distance(euler, expected) > 1e-2, "the control"


@pytest.mark.parametrize("solver", ["euler_ancestral", "unipc"])
def test_compiled_steps_equal_one_compiled_loop(ours, solver):
    config = small(steps=3, solver=solver)
    done = []
    latents, trajectory = ours.sample([PROMPT, NEGATIVE], config, seed=1, first=4, record=range(3), on_step=done.append)
    text, negative_text, noise = ours._inputs([PROMPT, NEGATIVE], config, [(1, 4), (1, 5)])
    key = jax.random.fold_in(jax.random.key(1), 4)
    velocity = guided_velocity(ours.transformer, text, negative_text, config.sampler.guidance, batched=True)
    loop = lambda noise: sample(velocity, noise, steps=3, shift=3.0, solver=solver, key=key, record=True)
    expected, states = jax.jit(loop)(noise)
    np.testing.assert_allclose(latents, expected, atol=2e-4)
    np.testing.assert_allclose(trajectory, states, atol=2e-4)
    assert done == [1, 2, 3] and ours.sample([PROMPT], config, seed=1)[1] is None


def test_noise_depends_on_the_number_of_the_prompt(ours):
    pair = ours.sample([PROMPT, NEGATIVE], small(steps=2), seed=1, first=4)[0]
    assert distance(ours.sample([NEGATIVE], small(steps=2), seed=1, first=5)[0][0], pair[1]) < 1e-3
    assert distance(ours.sample([NEGATIVE], small(steps=2), seed=1, first=4)[0][0], pair[1]) > 1e-1


def test_batched_and_sequential_guidance_are_equal(ours):
    end = lambda batched: ours.sample([PROMPT, NEGATIVE], small(steps=3, guidance_batched=batched), seed=0)[0]
    np.testing.assert_allclose(end(False), end(True), atol=2e-4)


def test_guidance_evaluates_only_the_branches_it_needs(ours):
    """Batch sizes of the transformer: 2 B at once, B twice, or with guidance 1 B once."""
    text, blank = jnp.ones((3, 16, 64)), jnp.zeros((1, 16, 64))

    def run_guided(blank, guidance, batched):
        rows = []

        def transformer(x, timesteps, words):
            assert len(x) == len(timesteps) == len(words)
            rows.append(len(words))
            return x * words.mean((1, 2))[:, None, None, None, None]

        velocity = guided_velocity(transformer, text, blank, guidance, batched)
        return rows, velocity(jnp.full((3, 1, 2, 2, 4), 2.0), jnp.zeros(3))

    for blank_or_none, guidance, batched, rows, value in (
        (blank, 5.0, True, [6], 10.0),
        (blank, 5.0, False, [3, 3], 10.0),
        (None, 1.0, True, [3], 2.0),
    ):
        found, velocity = run_guided(blank_or_none, guidance, batched)
        assert found == rows
        np.testing.assert_allclose(velocity, np.full((3, 1, 2, 2, 4), value), rtol=1e-6)
    configs = small(steps=2, guidance=1.0), small(steps=2, guidance=1.0, negative_prompt="")
    assert np.array_equal(*(ours.sample([PROMPT], config, seed=0)[0] for config in configs))


def test_a_sampling_step_returns_no_weights(ours):
    """A returned model would be a copy of all weights at every step, and twice their memory."""
    config = small(steps=2)
    text, negative_text, noise = ours._inputs([PROMPT], config, [(0, 0)])
    row = schedule("unipc", 2, 3.0).row(0)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(ours.transformer)))

    def output_bytes(step, **options):
        lowered = step.lower(ours.transformer, text, negative_text, initial_state(noise), row, None, **options)
        return lowered.compile().memory_analysis().output_size_in_bytes

    assert output_bytes(sampling_step, guidance=5.0, batched=False) < 5 * noise.nbytes < weights / 10
    control = nnx.jit(lambda model, *inputs: sampling_step.__wrapped__(model, *inputs, 5.0, False))
    assert output_bytes(control) > weights


def test_impossible_video_sizes_are_refused():
    check_size(WanConfig(), 81, 480, 832)
    with pytest.raises(InputError, match="time axis has 21 positions"):
        check_size(WanConfig(rope_max_seq_len=20), 81, 64, 64)
    with pytest.raises(InputError, match="height: expected a multiple of 32, found 48"):
        check_size(dataclasses.replace(WanConfig(), patch_size=(1, 4, 4)), 5, 48, 64)
