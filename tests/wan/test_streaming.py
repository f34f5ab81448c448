"""Sampling chunk after chunk against sampling the whole video at once, and the memory that it takes."""

import dataclasses
import gc

import jax
import numpy as np
import pytest

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.attention.rope import rope_tables
from jsurgery.errors import DoesNotFit, InputError
from jsurgery.load_config import load_config
from jsurgery.runtime.mesh import abstract_mesh
from jsurgery.wan import streaming
from jsurgery.wan.model_config import VaeConfig, WanConfig
from jsurgery.wan.model_sizes import ModelSizes, TextEncoderConfig
from jsurgery.wan.pipeline import Pipeline
from jsurgery.wan.streaming import stream_latents, streamed_kinds
from jsurgery.wan.streaming_memory import carried_by_step, describe_stream, on_streaming_mesh, streaming_phases
from tests.conftest import TINY_TRANSFORMER

SIZE = {"video.height": "32", "video.width": "48", "text_length": "3", "trace.keep_steps": "1", "model.path": "a_model"}
SOURCE = 3, 7  # the seed and the number of the prompt


def words(prompts, length):
    """Embeddings that depend on the prompts' lengths alone."""
    draw = lambda prompt: np.random.default_rng(len(prompt)).normal(size=(length, TINY_TRANSFORMER.text_dim))
    return np.stack([draw(prompt) for prompt in prompts]).astype(np.float32)


def network(rates, **fields):
    return dataclasses.replace(TINY_TRANSFORMER, num_layers=len(rates), hybrid=HybridConfig(rates, **fields))


@pytest.fixture(scope="module")
def build(random_transformer):
    return lambda rates, **fields: random_transformer(network(rates, **fields))


def config_of(latent_frames, **sampler):
    fields = {f"sampler.{name}": str(value) for name, value in sampler.items()}
    frames = {"video.frames": str(4 * latent_frames - 3), "sampler.noise": "frame"}
    return load_config("tiny", SIZE | frames | fields)


def whole(transformer, config, given=None):
    pipeline = Pipeline(words, transformer, lambda: None)
    return np.asarray(pipeline.sample(["a prompt"], config, sources=[SOURCE], given=given)[0])


def chunks(transformer, config, given=None, **options):
    text, negative = (words([prompt], 3) for prompt in ("a prompt", config.sampler.negative_prompt))
    negative = None if config.sampler.guidance == 1 else negative
    yield from stream_latents(transformer, config, text, negative, source=SOURCE, given=given, **options)


def forget_programs():
    for program in (streaming.first_step, streaming.steady_step):
        program.clear_cache()


CASES = {
    # rates, latent frames of the video and of its chunks, sampler, given frames
    "several overlaps, a short last chunk": (("C2O1", "C2O3", "C2O0"), 7, [2, 2, 2, 1], {"guidance": 4.0}, 0),
    "branches in turn": (("C1O1",), 5, [1] * 5, {"solver": "lcm", "guidance_batched": False}, 0),
    "a given frame": (("C2O1", "C2O0"), 4, [2, 2], {"solver": "euler_ancestral", "guidance": 1.0}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stream_has_the_latents_of_the_whole_video(build, case):
    rates, frames, sizes, sampler, count = CASES[case]
    transformer, config = build(rates), config_of(frames, **{"steps": 3, "solver": "unipc"} | sampler)
    given = np.random.default_rng(1).normal(size=(1, 1, 4, 6, 4)).astype(np.float32) if count else None
    expected, found = whole(transformer, config, given), list(chunks(transformer, config, given))
    assert [chunk.shape[1] for chunk in found] == sizes
    assert np.abs(np.concatenate(found, axis=1) - expected).max() < 1e-4 and expected.std() > 0.1


def test_without_linear_branches_only_overlaps_are_carried(build):
    transformer, config = build(("C1O2",), linear_branch=False), config_of(4, steps=2, guidance=1.0)
    found = np.concatenate(list(chunks(transformer, config)), axis=1)
    assert np.abs(found - whole(transformer, config)).max() < 1e-4


def test_control_a_state_or_an_angle_that_is_lost_shows(build, monkeypatch):
    """The first chunk is as it was, the last one is not."""
    transformer, config = build(("C1O1",)), config_of(3, steps=2, guidance=1.0)
    expected, of_chunk, step = whole(transformer, config), streaming.rope_tables, streaming.chunk_step
    broken = {
        "rope_tables": lambda grid, dim, longest, first: of_chunk(grid, dim, longest),
        "chunk_step": lambda *inputs, **options: step(*inputs[:5], None, *inputs[6:], **options),
    }
    for name, function in broken.items():
        with monkeypatch.context() as patched:
            patched.setattr(streaming, name, function)
            forget_programs()
            found = np.concatenate(list(chunks(transformer, config)), axis=1)
            error = np.abs(found - expected)[0].max(axis=(1, 2, 3))
            assert error[0] < 1e-4 and error[2] > 1e-2, (name, error)
    forget_programs()


def test_memory_and_programs_do_not_grow_with_the_chunks(build):
    """What lies on the devices after any step of a stream of 8 and of 64 chunks, and the programs that they compile."""
    transformer, peaks, kept = build(("C1O1", "C1O0")), {}, None
    sizes = lambda: [program._cache_size() for program in (streaming.first_step, streaming.steady_step)]
    forget_programs()
    gc.collect()
    live = lambda: sum(array.nbytes for array in jax.live_arrays())
    before = live()  # of other tests
    for frames in (8, 64):
        config, alive = config_of(frames, steps=2), []
        measure = lambda *_, alive=alive: alive.append(live() - before)
        kept = list(chunks(transformer, config, on_step=measure))
        peaks[frames] = max(alive)
        assert sizes() == [2, 1], "before any frame, before any state, and the rest"
    assert len(kept) == 64
    assert peaks[64] == pytest.approx(peaks[8], rel=0.02) and 56 * kept[0].nbytes > 0.02 * peaks[8]


def test_bytes_carried_are_those_of_the_formula():
    """Wan2.1 1.3B at 480p: 34 GB with 50 steps and guidance, 1.3 GB with 4 steps without."""
    fields = {"sampler.noise": "frame", "model.dtype": "bfloat16", "video.height": "480", "video.width": "832"}
    large = dataclasses.replace(WanConfig(), hybrid=HybridConfig(("C3O1",) * 15 + ("C3O2",) * 15))
    formula = lambda overlap: 12 * 256 * 129 * 4 + overlap * 30 * 52 * 2 * 12 * 128 * 2
    for steps, guidance, branches in ((50, 5.0, 2), (4, 1.0, 1)):
        sampler = {"sampler.steps": str(steps), "sampler.guidance": str(guidance), "trace.keep_steps": "1"}
        config = load_config("wan_1_3b", fields | sampler)
        expected = branches * 15 * (formula(1) + formula(2))
        assert carried_by_step(config, large) == expected
        line = describe_stream(config, large)
        assert line.startswith("7 chunks of 3 latent frames; ") and f" {steps * expected:,} bytes " in line
        alike = dataclasses.replace(large, hybrid=HybridConfig(("C3O1",) * 30))
        assert steps * carried_by_step(config, alike) / 1e9 == pytest.approx(33.6 if branches == 2 else 1.34, rel=0.01)


def test_bytes_carried_are_what_lies_on_the_device(build, monkeypatch):
    transformer, config, carried = build(("C2O1", "C2O3")), config_of(6, steps=2), []
    run = streaming.steady_step

    def watched(*arguments, **options):
        state, left = run(*arguments, **options)
        carried.append(sum(leaf.nbytes for leaf in jax.tree.leaves(left)))
        return state, left

    monkeypatch.setattr(streaming, "steady_step", watched)
    assert len(list(chunks(transformer, config))) == 3
    assert carried == [carried_by_step(config, transformer.config)] * 2


def test_what_does_not_fit_is_refused_by_arithmetic():
    large = dataclasses.replace(WanConfig(), hybrid=HybridConfig(("C3O1",) * 30))
    sizes = ModelSizes("", large, TextEncoderConfig(), VaeConfig())
    config = load_config("wan_1_3b", {"video.height": "480", "video.width": "832", "model.dtype": "bfloat16"})
    place = lambda devices, gib: on_streaming_mesh(config, sizes, devices, gib * 2**30, tell=lambda line: None).mesh
    assert place(8, 80).tensor == 1 and place(8, 24).tensor == 4 and place(1, 80).tensor == 1
    with pytest.raises(DoesNotFit, match=r"--stream: expected at most 95% of 32 GiB a device, found \d\d.\d GiB"):
        place(1, 32)
    _, phase = streaming_phases(config, sizes, abstract_mesh(config.mesh), 1)
    assert phase.held["carried"] == 50 * carried_by_step(config, large)
    with config.unlocked():
        config.mesh.data = 2
    with pytest.raises(InputError, match=r"config.mesh.data: a stream divides heads alone, along tensor; found 2"):
        place(8, 80)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (
            ("C2O1", 1, 2),
            "m: block 1 is softmax, block 0 is C2O1; --stream needs causal chunks of one length in all blocks",
        ),
        (("C2O1", "C2O0", "B2O1"), "m: block 2 is B2O1, block 0 is C2O1; --stream needs"),
        (("C2O1", "C3O1"), "m: block 1 is C3O1, block 0 is C2O1; --stream needs"),
        (("linear",), "m: block 0 is linear; --stream needs"),
    ],
)
def test_networks_that_do_not_stream_are_refused(rates, message):
    with pytest.raises(InputError, match=message):
        streamed_kinds(network(rates), "m")
    with pytest.raises(InputError, match="m: block 0 is softmax"):
        streamed_kinds(TINY_TRANSFORMER, "m")


def test_angles_of_later_frames():
    every, later = rope_tables((7, 2, 3), 12), rope_tables((2, 2, 3), 12, first=5)
    assert all(np.array_equal(a[5 * 6 :], b) for a, b in zip(every, later, strict=True))
    with pytest.raises(InputError, match="time axis has 1025 positions"):
        rope_tables((2, 2, 3), 12, first=1023)


MESH = """
import json
import jax, numpy as np
from ml_collections import ConfigDict
from flax import nnx
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.load_config import load_config
from jsurgery.runtime.mesh import AXES, make_mesh
from jsurgery.wan.streaming import stream_latents
from jsurgery.wan.transformer import WanConfig, WanTransformer

network = WanConfig(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
                    freq_dim=16, ffn_dim=32, num_layers=2, hybrid=HybridConfig(("C1O1", "C1O0")))
config = load_config("tiny", {"video.frames": "13", "video.height": "32", "video.width": "48", "sampler.noise": "frame",
                              "sampler.steps": "2", "trace.keep_steps": "1"})
text = np.random.default_rng(0).normal(size=(1, 3, 16)).astype(np.float32)
found = []
for heads in (0, 1, 2):
    model = WanTransformer(network, rngs=nnx.Rngs(0))
    if heads:
        model.shard(make_mesh(ConfigDict(dict.fromkeys(AXES, 1) | {"tensor": heads})))
    found.append(np.concatenate(list(stream_latents(model, config, text, -text, source=(0, 0))), axis=1))
    error = lambda a, b: float(np.abs(a - b).max() / np.abs(b).max())
    print(json.dumps(error(found[-1], found[0])))
"""


def test_devices_share_the_heads(on_fake_devices):
    """None, one of eight devices, and two: the same stream."""
    assert max(on_fake_devices(MESH)) < 1e-5
