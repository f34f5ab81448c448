"""Distillation while sampling: the order of batches, trajectories equal to the sampler's, and trained maps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from jsurgery.config import base
from jsurgery.data.shards import Records, array_text, shard_path, text_array, write_shard
from jsurgery.diffusion import initial_noise, sample
from jsurgery.errors import InputError
from jsurgery.io.safetensors import read_tensors
from jsurgery.load_config import load_config
from jsurgery.runtime.mesh import make_mesh, sharding
from jsurgery.surgery.distillation.distill import distill
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.surgery.distillation.update import initial_maps, make_optimizer
from jsurgery.surgery.distillation.while_sampling import Trajectories, make_sampling_update, own_clips, round_robin
from jsurgery.surgery.trace import TraceSteps, trace
from jsurgery.wan.guidance import guided_velocity
from jsurgery.wan.pipeline import load_pipeline

RATES = (2, 8)
LATENTS, TEXT = (2, 4, 4, 3), (3, 6)


@pytest.mark.parametrize(("steps", "slots"), [(5, 3), (4, 4), (3, 5), (6, 1)])
def test_batches_take_all_steps_in_order_and_slots_are_at_different_steps(steps, slots):
    found = round_robin(steps, slots)
    taken = [next(found) for _ in range(6 * steps * slots)]
    whole = [[position for _, number, position in taken if number == batch] for batch in range(3 * slots)]
    assert whole == [list(range(steps))] * (3 * slots)
    assert all(len({slot for slot, number, _ in taken if number == batch}) == 1 for batch in range(3 * slots))
    begun = next(i for i in range(len(taken) // 2, len(taken)) if taken[i][0] == 0)  # by now all slots are in use
    later = taken[begun : begun + steps * slots]
    at_once = [{position for _, _, position in later[i : i + slots]} for i in range(0, len(later), slots)]
    assert all(len(positions) == min(steps, slots) for positions in at_once)


def small_config(**changes):
    config = base()
    config.hybrid.rates, config.text_length = RATES, TEXT[0]
    config.video.frames, config.video.height, config.video.width = 5, 32, 32
    config.sampler.steps, config.sampler.guidance = 4, 3.0
    config.trace.prompts, config.trace.holdout, config.trace.keep_steps = 4, 1, 2
    config.distill.mode, config.distill.trajectories, config.distill.batch = "sampling", 2, 2
    config.distill.steps, config.distill.learning_rate = 60, 1e-2
    config.checkpoint.every = 30
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """The texts of four prompts and of the negative prompt, and two steps of the last prompt."""
    folder, rng = epath.Path(tmp_path_factory.mktemp("trace")), np.random.default_rng(3)
    texts = [{"embedding": rng.normal(size=TEXT).astype(np.float32), "prompt": text_array(str(i))} for i in range(5)]
    steps = [
        {
            "latents": rng.normal(size=LATENTS).astype(np.float16),
            "timestep": np.float32(timestep),
            "conditional": np.bool_(timestep > 500),
            "prompt": np.int32(3),
        }
        for timestep in (900, 300)
    ]
    write_shard(shard_path(folder / "text", 0), texts)
    write_shard(shard_path(folder / "steps", 0), steps)
    return folder


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("blocks", ["", "0"])
def test_trajectories_equal_those_of_the_sampler_while_maps_are_trained(teacher, traces, guidance, blocks):
    """Also if only the maps of the first block are trained, since the velocity needs all blocks."""
    config = small_config(**{"sampler.guidance": guidance, "distill.blocks": blocks})
    mesh = make_mesh(config.mesh)
    trajectories = Trajectories(config, traces / "text", 3, LATENTS, mesh)
    graph, params = nnx.split(teacher)
    optimizer = make_optimizer(config)
    update = make_sampling_update(optimizer, graph, DistillSpec.of(config), guidance, sharding(mesh))
    maps = initial_maps(config, teacher)
    state, at = {"maps": jax.tree.map(jnp.copy, maps), "opt_state": optimizer.init(maps)}, trajectories.begin(1)
    text, blank = trajectories.text(1)
    for position in range(4):
        state, at, losses = update(state, params, at, text, blank, *trajectories.step(1, position))
        assert losses.shape == (1 if blocks else 2, len(RATES)) and np.isfinite(losses).all()

    texts = Records(traces / "text")
    words = np.stack([texts[i]["embedding"] for i in (2, 0)])  # prompt 2, and prompt 0 for the second time
    negative = None if guidance == 1 else texts[4]["embedding"][None]
    noise = jnp.concatenate([initial_noise(0, [2], LATENTS), initial_noise(0, [4], LATENTS)])
    velocity = guided_velocity(teacher, words, negative, guidance, True)
    expected, _ = jax.jit(
        lambda noise: sample(
            velocity, noise, steps=4, shift=3.0, solver="euler_ancestral", key=jax.random.fold_in(jax.random.key(0), 2)
        )
    )(noise)
    np.testing.assert_allclose(at.x, expected, rtol=2e-4, atol=2e-4)
    assert np.abs(at.x - noise).max() > 0.1
    moved = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), state["maps"], maps)
    assert all(change > 0 for change in jax.tree.leaves(moved))


@pytest.fixture(scope="module")
def distilled(teacher, traces, tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("distill"))
    distill(small_config(), teacher, traces, folder)
    return folder


def test_the_ends_of_trajectories_are_clips_to_fine_tune_on(teacher, traces, distilled):
    """60 steps, 4 a trajectory, in two slots: 14 batches of 2 end. Each clip is what the sampler makes of its noise."""
    clips, texts = Records(distilled / "clips"), Records(traces / "text")
    assert len(clips) == own_clips(small_config()) == 28
    words = np.stack([texts[i]["embedding"] for i in (0, 1)])
    velocity = guided_velocity(teacher, words, texts[4]["embedding"][None], 3.0, True)
    expected, _ = jax.jit(
        lambda noise: sample(
            velocity, noise, steps=4, shift=3.0, solver="euler_ancestral", key=jax.random.fold_in(jax.random.key(0), 0)
        )
    )(initial_noise(0, [0, 1], LATENTS))
    for number in (0, 1):
        clip = clips[number]
        np.testing.assert_allclose(clip["latents"], expected[number], rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(clip["text"], texts[number]["embedding"], atol=2e-3)
        assert array_text(clip["caption"]) == str(number)
    assert own_clips(small_config(**{"distill.mode": "traces"})) == 3
    assert own_clips(small_config(**{"distill.steps": 3})) == 0


def test_errors_of_the_held_out_prompt_fall(distilled):
    report = json.loads((distilled / "errors.json").read_text())
    assert report["samples"] == 2
    assert (np.mean(report["errors"], axis=0) < 0.95 * np.mean(report["initial_errors"], axis=0)).all()


def test_resumed_distillation_equals_uninterrupted_distillation(teacher, traces, distilled, tmp_path):
    folder = epath.Path(tmp_path)
    distill(small_config(**{"distill.steps": 30}), teacher, traces, folder)
    distill(small_config(), teacher, traces, folder)
    resumed, straight = (read_tensors(at / "feature_maps.safetensors") for at in (folder, distilled))
    assert all(np.array_equal(resumed[name], straight[name]) for name in straight)


def test_mode_sampling_traces_only_held_out_prompts(tiny_pipeline, tmp_path):
    fields = {
        "model.path": str(tiny_pipeline), "video.frames": "5", "video.height": "32", "video.width": "48",
        "sampler.steps": "2", "trace.prompts": "4", "trace.holdout": "2", "trace.keep_steps": "2", "trace.batch": "1",
    }  # fmt: skip
    pipeline, found = load_pipeline(str(tiny_pipeline)), {}
    for mode in ("traces", "sampling"):
        trace(load_config("tiny", fields | {"distill.mode": mode}), pipeline, epath.Path(tmp_path / mode))
        found[mode] = TraceSteps(epath.Path(tmp_path / mode), range(2, 4))
    assert [len(Records(tmp_path / mode / "steps")) for mode in found] == [8, 4]
    assert len(found["traces"]) == len(found["sampling"]) == 4
    for index in range(4):
        for name, values in found["traces"][index].items():
            np.testing.assert_array_equal(values, found["sampling"][index][name])


def test_mode_sampling_refuses_updates_per_batch():
    with pytest.raises(InputError, match="config.distill.updates_per_batch: .* expected 1, found 2"):
        load_config("tiny", {"distill.mode": "sampling", "distill.updates_per_batch": "2"})


ON_A_MESH = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from etils import epath
from flax import nnx
from ml_collections import ConfigDict
from jsurgery.config import base
from jsurgery.runtime.mesh import AXES, make_mesh, put_state, sharding
from jsurgery.surgery.distillation.distill import initial_maps
from jsurgery.surgery.distillation.replay import make_optimizer
from jsurgery.surgery.distillation.while_sampling import make_sampling_update
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.surgery.distillation.while_sampling import Trajectories
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer

config = base()
config.hybrid.rates = (2, 8)
config.sampler.steps, config.trace.keep_steps, config.distill.batch = 4, 4, 2
config.distill.mode = "sampling"
network = WanConfig(num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=6,
                    freq_dim=16, ffn_dim=32, num_layers=2)

def found(sizes):
    mesh = make_mesh(ConfigDict(dict(zip(AXES, sizes))))
    teacher = WanTransformer(network, rngs=nnx.Rngs(0))
    teacher.shard(mesh)
    trajectories = Trajectories(config, epath.Path(sys.argv[1]) / "text", 3, (2, 6, 4, 3), mesh)
    optimizer, (graph, params) = make_optimizer(config), nnx.split(teacher)
    update = make_sampling_update(optimizer, graph, DistillSpec.of(config), config.sampler.guidance, sharding(mesh))
    maps = initial_maps(config, teacher)
    state = put_state(mesh, {"maps": maps, "opt_state": optimizer.init(maps)})
    at, values = trajectories.begin(0), [trajectories.calibration_batches(teacher, 3)[2]["latents"]]
    for position in range(2):
        state, at, losses = update(state, params, at, *trajectories.text(0), *trajectories.step(0, position))
        values += [jnp.copy(at.x), losses]
    return jax.device_get(values)

expected = found((1, 1, 1, 1))
for sizes in json.loads(sys.argv[2]):
    pairs = zip(found(sizes), expected)
    print(json.dumps(max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)), flush=True)
"""


def test_results_on_meshes_equal_those_on_one_device(on_fake_devices, traces):
    found = on_fake_devices(ON_A_MESH, str(traces), json.dumps([(2, 1, 1, 1), (1, 2, 2, 2)]))
    assert len(found) == 2 and max(found) < 2e-5, found
