"""The losses, gradients and statistics of one-pass distillation against direct formulas; the stage on a tiny model."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx

from jsurgery.attention.hybrid import HybridConfig, token_order
from jsurgery.attention.kinds import prefix_losses as losses
from jsurgery.attention.kinds.prefix_losses import AttentionInputs, attention_loss, nested_softmax
from jsurgery.attention.token_order import TokenOrder
from jsurgery.attention.token_shards import TokenShards
from jsurgery.config import base
from jsurgery.data.shards import shard_path, text_array, write_shard
from jsurgery.errors import Terminated
from jsurgery.io.safetensors import read_tensors
from jsurgery.runtime.mesh import make_mesh
from jsurgery.runtime.metrics import read_metrics
from jsurgery.surgery import plan_forward
from jsurgery.surgery.distillation import held_out
from jsurgery.surgery.distillation.distill import calibrate, distill
from jsurgery.surgery.distillation.jobs import merge
from jsurgery.surgery.distillation.saved_maps import load_maps
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, losses_and_gradients, measure_heads
from jsurgery.surgery.distillation.update import initial_maps
from jsurgery.surgery.operate import operate
from jsurgery.surgery.trace import TraceSteps, padded_embedding, text_record
from jsurgery.wan.transformer import WanTransformer
from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import init_polynomial_map
from pallas_kernels.reference import softmax_share

RATES = (2, 4, "linear")
LATENTS = (3, 6, 6, 3)  # 27 tokens, which neither rate divides
TEXT = (4, 6)
SETUPS = {name: DistillSpec(RATES, (1, 2, 4), "strided", name, "value") for name in ("max", "lse")}


@pytest.fixture(scope="module")
def batches():
    """Two batches, each of one traced step."""
    rng = np.random.default_rng(1)
    return [
        {
            "latents": rng.normal(size=(1, *LATENTS)).astype(np.float32),
            "timestep": np.float32([timestep]),
            "text": rng.normal(size=(1, *TEXT)).astype(np.float32),
        }
        for timestep in (900.0, 300.0)
    ]


def small_config(**changes):
    config = base()
    config.hybrid.rates = RATES
    config.trace.prompts, config.trace.holdout = 5, 1
    config.distill.steps, config.distill.learning_rate = 40, 1e-2
    config.checkpoint.every = 20
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def maps(teacher):
    """Maps with leaves [blocks, rates, heads, ...], whose biases and scales are not zero."""
    rng = np.random.default_rng(2)
    fresh = initial_maps(small_config(), teacher)
    return jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), fresh)


@pytest.fixture(scope="module")
def order():
    return token_order((3, 3, 3), (1, 2, 4), "strided")


@pytest.fixture(scope="module")
def activations(teacher, batches, order):
    """q, k, v [blocks, B, N, H, D] of the first batch in the teacher, in prefix order."""

    @jax.jit
    def run(batch):
        def softmax(q, k, v, _):
            return hybrid_attention(q, k, v, None, None, num_softmax=k.shape[1]), (q, k, v)

        latents, timestep, text = batch["latents"], batch["timestep"], batch["text"]
        return teacher.apply_blocks(latents, timestep, text, softmax, None, order=order)[1]

    return run(batches[0])


def scores(q_NxD, k_MxD):
    return np.float64(q_NxD) @ np.float64(k_MxD).T / np.sqrt(q_NxD.shape[-1])


def log_sum_exp(s, axis=-1):
    top = s.max(axis, keepdims=True)
    return np.log(np.exp(s - top).sum(axis)) + top.squeeze(axis)


@pytest.mark.parametrize("rates", [(2, 8, 4), (4, "linear"), ("linear",)])
def test_merged_zones_are_softmax_over_each_prefix(rates):
    order = TokenOrder(21, (1, *rates))
    q, k, v = 3 * np.random.default_rng(0).normal(size=(3, 1, 21, 1, 5)).astype(np.float32)
    branches, full = jax.jit(lambda *qkv: nested_softmax(*qkv, TokenShards(order), rates))(q, k, v)
    assert branches.keys() == set(rates) - {"linear"}
    for rate, branch in [*branches.items(), (1, full)]:
        s = scores(q[0, :, 0], k[0, : order.num_softmax(rate), 0])
        p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
        expected = p @ v[0, : order.num_softmax(rate), 0]
        np.testing.assert_allclose(branch.output[0, :, 0], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(branch.lse[0, :, 0], np.log(np.exp(s).sum(-1)), rtol=1e-5)
        np.testing.assert_allclose(branch.largest[0, :, 0], s.max(-1), rtol=1e-5)


def direct_losses(maps, q, k, v, spec, order):
    """Losses [rates, heads] of one block, by the reference implementation or by eq. 6 with all pairs of tokens."""
    full = hybrid_attention(q, k, v, None, None, num_softmax=order.num_tokens, implementation="reference")
    losses = []
    for index, rate in enumerate(spec.rates):
        query_map, key_map = jax.tree.map(lambda leaf, i=index: leaf[i], maps.pair)
        start = order.num_softmax(rate)
        if spec.loss == "value":
            options = {"num_softmax": start, "stabilizer": spec.stabilizer, "implementation": "reference"}
            y = hybrid_attention(q, k, v, query_map, key_map, **options)
            losses.append(jnp.abs(y - full).mean(axis=(0, 1, 3)))
        else:
            s = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
            zone = s if rate == "linear" else s[..., :start]
            take_max = spec.stabilizer == "max" and rate != "linear"
            c = zone.max(-1, keepdims=True) if take_max else jax.nn.logsumexp(zone, -1, keepdims=True)
            learned = jnp.einsum("bnhf,bmhf->bhnm", query_map(q), key_map(k[:, start:]))
            squares = jnp.square(jnp.exp(s[..., start:] - c) - learned).sum(-1).mean(-1)
            losses.append(jnp.log(1 + squares).mean(0))
    return jnp.stack(losses)


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    "spec",
    [SETUPS["lse"], SETUPS["max"], DistillSpec(RATES, (1, 2, 4), "strided", "max", "attention")],
    ids=lambda spec: f"{spec.loss}, {spec.stabilizer}",
)
def test_losses_and_gradients_are_those_of_the_direct_loss(teacher, batches, maps, order, activations, spec):
    @jax.jit
    def direct(maps, qkv):
        def one_block(maps, qkv):
            losses = direct_losses(maps, *qkv, spec, order)
            return losses.sum(), losses.mean(axis=1)  # the sum has the gradient of each head's own loss

        return jax.vmap(jax.grad(one_block, has_aux=True))(maps, qkv)

    expected_gradients, expected = direct(maps, activations)
    losses, gradients = losses_and_gradients(teacher, batches[0], maps, spec)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for side, block, index in np.ndindex(2, 2, len(RATES)):
        flat = lambda maps, at: np.concatenate([np.ravel(leaf[at]) for leaf in jax.tree.leaves(maps)])
        actual, expected = (flat(maps[side], (block, index)) for maps in (gradients, expected_gradients))
        assert relative_error(actual, expected) < 1e-4


def test_a_map_affects_only_its_own_gradient(teacher, batches, maps):
    """Gradients of other blocks, rates and heads do not change by a single bit."""
    changed_maps = jax.tree.map(lambda leaf: leaf.at[0, 1, 0].multiply(1.5), maps)
    gradients = [losses_and_gradients(teacher, batches[0], m, SETUPS["lse"])[1] for m in (maps, changed_maps)]
    for before, after in zip(*map(jax.tree.leaves, gradients), strict=True):
        changed = np.any(np.asarray(before != after), axis=tuple(range(3, before.ndim)))
        assert changed[0, 1, 0] and changed.sum() == 1


@pytest.mark.parametrize("spread", [1.0, 10.0])
@pytest.mark.parametrize(("rate", "stabilizer"), [(4, "max"), (4, "lse"), ("linear", "max")])
def test_attention_loss_is_that_of_brute_force(rate, stabilizer, spread, monkeypatch):
    """In three pieces of the 21 queries. With spread 10, scores reach 100, and exponentials of linear keys are 1e40
    times those of softmax keys."""
    monkeypatch.setattr(losses, "QUERIES_AT_ONCE", 8)
    order = TokenOrder(21, (1, 4))
    q, k, v = spread * np.random.default_rng(0).normal(size=(3, 2, 21, 1, 5)).astype(np.float32)
    maps = init_polynomial_map(jax.random.key(0), 1, 5), init_polynomial_map(jax.random.key(1), 1, 5)

    @jax.jit
    @jax.value_and_grad
    def loss(maps):
        branches, full = nested_softmax(q, k, v, TokenShards(order), (rate,))
        at = AttentionInputs(rate, q, k, v, branches.get(rate), full, TokenShards(order), stabilizer)
        return attention_loss(maps, at).sum()

    start, expected, largest = order.num_softmax(rate), [], []
    for example in range(2):
        s = scores(q[example, :, 0], k[example, :, 0])
        c = s[:, :start].max(-1) if start and stabilizer == "max" else log_sum_exp(s[:, :start] if start else s)
        phi_q, phi_k = (np.float64(phi(x[example][None])[0, :, 0]) for phi, x in zip(maps, (q, k), strict=True))
        gap = np.exp(s[:, start:] - c[:, None]) - phi_q @ phi_k[start:].T
        expected.append(np.log(1 + (gap**2).sum() / 21))
        largest.append(np.exp(s[:, start:] - c[:, None]).max())
    value, gradients = loss(maps)
    assert (np.max(largest) > 1e40) == (spread == 10 and rate != "linear")
    assert value == pytest.approx(np.mean(expected), rel=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_scores_of_the_attention_loss_have_rope_whatever_phi_sees():
    """Features that are constant do not tell whether phi sees queries and keys before RoPE. Scores would."""
    order = TokenOrder(21, (1, 4))
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 21, 1, 6)).astype(np.float32)
    angles = np.random.default_rng(1).uniform(0, 6, (21, 3)).astype(np.float32)
    constant = init_polynomial_map(jax.random.key(0), 1, 6)
    ones = tuple(jnp.ones_like(bias) for bias in constant.biases)
    constant = dataclasses.replace(constant, kernels=tuple(0 * kernel for kernel in constant.kernels), biases=ones)
    branches, full = nested_softmax(q, k, v, TokenShards(order), (4,))
    after = AttentionInputs(4, q, k, v, branches[4], full, TokenShards(order), "lse")
    before = dataclasses.replace(after, inverse_rope=(jnp.cos(angles), -jnp.sin(angles)))
    losses_of = [attention_loss((constant, constant), at) for at in (after, before)]
    np.testing.assert_array_equal(*losses_of)
    assert not np.allclose(before.inputs[0], q, atol=0.1)


@pytest.mark.parametrize("name", SETUPS)
def test_statistics_and_calibration(teacher, batches, maps, order, activations, name):
    spec = SETUPS[name]
    found = measure_heads(teacher, batches[0], (maps,), spec)[0]
    for block, index in np.ndindex(2, len(RATES)):
        rate, (q, k, v) = RATES[index], (x[block] for x in activations)
        query_map, key_map = jax.tree.map(lambda leaf: leaf[block, index], maps.pair)  # noqa: B023
        start = order.num_softmax(rate)
        options = {"num_softmax": start, "stabilizer": name}
        share = softmax_share(q, k, query_map, key_map, **options).mean(axis=(0, 1))
        np.testing.assert_allclose(found["share"][block, index], share, rtol=1e-4, atol=1e-6)
        full = hybrid_attention(q, k, v, None, None, num_softmax=27, implementation="reference")
        y = hybrid_attention(q, k, v, query_map, key_map, **options, implementation="reference")
        np.testing.assert_allclose(found["error"][block, index], jnp.abs(y - full).sum(axis=(0, 1, 3)), rtol=1e-4)
        np.testing.assert_allclose(found["size"][block, index], jnp.abs(full).sum(axis=(0, 1, 3)), rtol=1e-4)
        for head in range(2):
            s = scores(q[0, :, head], k[0, :, head])
            p = np.exp(s - log_sum_exp(s)[:, None])
            teacher_share = p[:, :start].sum(-1).mean()
            assert found["teacher_share"][block, index, head] == pytest.approx(teacher_share, abs=1e-5)
            if start:
                c = s[:, :start].max(-1) if name == "max" else log_sum_exp(s[:, :start])
                expected = np.exp(s[:, start:] - c[:, None]).sum(-1).mean()
                assert found["teacher_mass"][block, index, head] == pytest.approx(expected, rel=1e-4)

    calibrated = calibrate(teacher, batches, maps, spec)
    masses = [measure_heads(teacher, batch, (calibrated,), spec)[0] for batch in batches]
    mass, expected = (sum(stats[key] for stats in masses) for key in ("mass", "teacher_mass"))
    np.testing.assert_allclose(mass, expected, rtol=1e-4)
    with pytest.raises(AssertionError):  # before calibration, masses differ
        np.testing.assert_allclose(found["mass"], found["teacher_mass"], rtol=0.1)


@pytest.mark.parametrize("name", SETUPS)
def test_calibration_stays_finite_if_linear_keys_score_far_above_the_stabilizer(teacher, batches, maps, name):
    graph, state = nnx.split(teacher)
    sharp = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    sharp.blocks.attn1.norm_k[...] *= 300
    found = measure_heads(sharp, batches[0], (maps,), SETUPS[name])[0]
    assert np.isinf(found["teacher_mass"]).any()
    calibrated = calibrate(sharp, batches, maps, SETUPS[name])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(calibrated.key))


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Traces of five prompts with three steps each, and the text of the negative prompt."""
    folder, rng = epath.Path(tmp_path_factory.mktemp("trace")), np.random.default_rng(3)
    texts = [
        {"embedding": rng.normal(size=TEXT).astype(np.float32), "prompt": text_array(f"prompt {i}")} for i in range(6)
    ]
    steps = [
        {
            "latents": rng.normal(size=LATENTS).astype(np.float16),
            "timestep": np.float32(1000 - 300 * step),
            "conditional": np.bool_(step != 1),
            "prompt": np.int32(prompt),
        }
        for prompt in range(5)
        for step in range(3)
    ]
    write_shard(shard_path(folder / "text", 0), texts)
    write_shard(shard_path(folder / "steps", 0), steps)
    return folder


@pytest.mark.parametrize(("computed", "stored"), [("float32", "float32"), ("bfloat16", "float16")])
def test_texts_are_stored_unpadded_and_read_padded(computed, stored):
    embedding = np.random.default_rng(0).normal(size=(5, 16)).astype(jnp.dtype(computed))
    arrays = {name: np.asarray(value) for name, value in text_record(embedding, "a prompt", 9).items()}
    record = safetensors.numpy.load(safetensors.numpy.save(arrays))
    assert record["embedding"].dtype == stored and record["embedding"].shape == (5, 16)
    padded = padded_embedding(record)
    assert padded.shape == (9, 16) and padded.dtype == np.float32
    np.testing.assert_array_equal(padded[:5], embedding.astype(np.float32))
    assert not padded[5:].any()
    of_0_1 = {"embedding": padded, "prompt": record["prompt"]}
    np.testing.assert_array_equal(padded_embedding(of_0_1), padded)


def test_unconditional_steps_have_the_text_of_the_negative_prompt(traces):
    held_out = TraceSteps(traces, range(4, 5))
    texts = TraceSteps(traces, range(5)).texts
    assert len(held_out) == 3
    assert np.array_equal(held_out[0]["text"], texts[4]["embedding"])
    assert np.array_equal(held_out[1]["text"], texts[5]["embedding"])
    assert held_out[2]["timestep"] == 400


@pytest.fixture(scope="module")
def distilled(teacher, traces, tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("distill"))
    distill(small_config(), teacher, traces, folder)
    return folder


def test_distillation_lowers_the_errors_of_held_out_prompts(distilled):
    report = json.loads((distilled / "errors.json").read_text())
    errors, initial = np.array(report["errors"]), np.array(report["initial_errors"])
    assert report["rates"] == list(RATES) and report["samples"] == 3
    assert errors.shape == initial.shape == (2, 3)
    assert (errors.mean(axis=0) < 0.95 * initial.mean(axis=0)).all()
    for field in ("softmax_share", "teacher_softmax_share"):
        share = np.array(report[field])
        assert (share[:, 2] == 0).all() and (share[:, :2] > 0).all() and (share < 1).all()
    assert (share[:, 0] > share[:, 1]).all(), "the softmax keys of rate 2 include those of rate 4"


def test_velocity_errors_are_those_of_models_with_one_hybrid_block(teacher, traces, distilled):
    report = json.loads((distilled / "errors.json").read_text())
    errors = np.array(report["velocity_errors"])
    held_out = TraceSteps(traces, range(4, 5))
    assert errors.shape == (2, 3) and report["velocity_samples"] == len(held_out) == 3
    for block, rate in ((0, 2), (1, 4), (1, "linear")):
        rates = tuple(rate if at == block else 1 for at in range(2))
        hybrid = HybridConfig(rates, chain=(1, 2, 4))
        maps = load_maps(distilled / "feature_maps.safetensors", rates, hybrid.feature_map)
        model, found = operate(teacher, hybrid, maps), []
        for number in range(3):
            step = jax.tree.map(lambda leaf: leaf[None], held_out[number])
            inputs = step["latents"], step["timestep"], step["text"]
            expected = np.asarray(teacher(*inputs), np.float64)
            found.append(np.sum((model(*inputs) - expected) ** 2) / np.sum(expected**2))
        assert errors[block, RATES.index(rate)] == pytest.approx(np.mean(found), rel=1e-3)
    assert errors.min() > 1e-6


def test_without_velocity_steps_there_are_no_velocity_errors(teacher, traces, tmp_path):
    distill(small_config(**{"distill.steps": 1, "distill.velocity_steps": 0}), teacher, traces, epath.Path(tmp_path))
    assert "velocity_errors" not in json.loads((tmp_path / "errors.json").read_text())


def test_resumed_distillation_equals_uninterrupted_distillation(teacher, traces, distilled, tmp_path):
    folder = epath.Path(tmp_path)
    distill(small_config(**{"distill.steps": 20}), teacher, traces, folder)
    half = read_tensors(folder / "feature_maps.safetensors")
    distill(small_config(), teacher, traces, folder)
    for name in ("initial.safetensors", "feature_maps.safetensors"):
        resumed, straight = read_tensors(folder / name), read_tensors(distilled / name)
        assert resumed.keys() == straight.keys()
        assert all(np.array_equal(resumed[key], straight[key]) for key in straight), name
    assert not any(np.array_equal(half[key], straight[key]) for key in straight)
    for name in ("errors.json", "metrics.jsonl"):
        assert (folder / name).read_text() == (distilled / name).read_text()
    assert [row["step"] for row in read_metrics(folder)] == [10, 20, 30, 40]


def test_held_out_steps_are_evenly_spread(traces):
    config = small_config(**{"distill.error_steps": 2})
    chosen = held_out.HeldOut(config, make_mesh(config.mesh), traces).chosen
    assert chosen == {"errors": [[0], [2]], "velocity errors": [[0], [1], [2]]}


class Killed(BaseException):
    """Nothing is saved after it."""


@pytest.fixture
def work(monkeypatch):
    """(the forwards for the held-out errors, each with its timestep; {number: what is called before that forward})."""
    done, before = [], {}

    def count(module, name, kind):
        original = getattr(module, name)

        def counting(model, batch, maps, *rest):
            done.append((kind, float(batch["timestep"][0]), *(rest[0].tolist() if kind == "plan" else ())))
            before.get(len(done) - 1, lambda: None)()
            return original(model, batch, maps, *rest)

        monkeypatch.setattr(module, name, counting)

    count(held_out, "measure_heads", "heads")
    count(held_out, "plan_velocity", "teacher")
    count(plan_forward, "plan_velocity", "plan")
    return done, before


def test_held_out_errors_resume(teacher, traces, distilled, tmp_path, work):
    """Two runs are killed and one gets SIGTERM. Nothing is done twice but the open batch."""
    done, before = work

    def run():
        done.clear()
        distill(small_config(), teacher, traces, epath.Path(tmp_path))
        return list(done)

    def stopped(number, how, error):
        before[number] = how
        with pytest.raises(error):
            run()
        before.clear()
        assert (tmp_path / "held_out.json").exists() and not (tmp_path / "errors.json").exists()
        return list(done)

    def kill():
        raise Killed

    shutil.copytree(distilled / "checkpoints", tmp_path / "checkpoints")
    whole = run()
    plans = [(block, choice) for block in range(2) for choice in (1, 2, 3)]
    times = [entry[1] for entry in whole[:3]]
    assert len(set(times)) > 1
    assert whole[3:] == [
        entry
        for time in times
        for entry in [("teacher", time), *(("plan", time, *np.eye(2, dtype=int)[b] * choice) for b, choice in plans)]
    ]
    assert (tmp_path / "errors.json").read_text() == (distilled / "errors.json").read_text()
    assert not (tmp_path / "held_out.json").exists()
    (tmp_path / "errors.json").unlink()

    assert stopped(2, kill, Killed) == whole[:3]
    assert stopped(13, kill, Killed) == whole[2:16], "in the second block of the second batch of velocities"
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert stopped(2, terminate, Terminated) == whole[10:14], "the signal comes in the first block, which is finished"
    assert run() == [whole[10], *whole[14:]]
    assert (tmp_path / "errors.json").read_text() == (distilled / "errors.json").read_text()
    assert not (tmp_path / "held_out.json").exists()


def test_a_forward_may_stop_before_the_last_block(teacher, batches):
    """Its velocity is then that of a teacher with one block."""
    first = nnx.eval_shape(lambda: WanTransformer(dataclasses.replace(teacher.config, num_layers=1), rngs=nnx.Rngs(0)))
    state = nnx.state(teacher)
    state["blocks"] = jax.tree.map(lambda leaf: leaf[:1], state["blocks"])
    nnx.update(first, state)
    latents, timestep, text = (batches[0][name] for name in ("latents", "timestep", "text"))
    number = jnp.arange(2)
    attention = lambda q, k, v, layer: (hybrid_attention(q, k, v, None, None, num_softmax=k.shape[1]), layer + 5)
    run = jax.jit(
        lambda stop_block: teacher.apply_blocks(
            latents, timestep, text, attention, number, order=None, stop_block=stop_block
        ),
        static_argnums=0,
    )
    velocity, records = run(1)
    np.testing.assert_allclose(velocity, first(latents, timestep, text), rtol=1e-5, atol=1e-6)
    assert records.tolist() == [5, 0]
    assert relative_error(run(2)[0], velocity) > 1e-2 and run(2)[1].tolist() == [5, 6]


def test_two_merged_jobs_equal_one_distillation(teacher, traces, distilled, tmp_path):
    """One job is interrupted and resumed. Equal up to rounding, as the compiler orders a job's sums differently."""
    jobs = {blocks: epath.Path(tmp_path) / f"blocks_{blocks}" for blocks in ("0", "1")}
    distill(small_config(**{"distill.blocks": "1", "distill.steps": 20}), teacher, traces, jobs["1"])
    for blocks, folder in jobs.items():
        distill(small_config(**{"distill.blocks": blocks}), teacher, traces, folder)
    assert all(name.startswith("blocks.1.") for name in read_tensors(jobs["1"] / "feature_maps.safetensors"))
    merge(small_config(), list(jobs.values()), 2, epath.Path(tmp_path))
    initial, trained = "initial.safetensors", "feature_maps.safetensors"
    assert (tmp_path / initial).read_bytes() == (distilled / initial).read_bytes()
    together = read_tensors(distilled / trained)
    assert list(read_tensors(tmp_path / trained)) == list(together)
    # With linear keys alone, log_scale has no effect. Its gradient is rounding error, of which Adam makes full steps.
    names = [name for name in together if "rate_linear" not in name or "log_scale" not in name]
    assert len(names) == len(together) - 4
    flat = lambda tensors: np.concatenate([np.ravel(tensors[name]) for name in names])
    assert relative_error(flat(read_tensors(tmp_path / trained)), flat(together)) < 1e-5
    assert relative_error(flat(read_tensors(tmp_path / initial)), flat(together)) > 1e-2
    reports = [json.loads((folder / "errors.json").read_text()) for folder in (epath.Path(tmp_path), distilled)]
    assert list(reports[0]) == list(reports[1])
    assert {"errors", "velocity_errors", "velocity_samples"} < reports[0].keys()
    for field in reports[0]:
        if field == "rates":
            assert reports[0][field] == reports[1][field]
            continue
        np.testing.assert_allclose(reports[0][field], reports[1][field], rtol=1e-5)
    for row, expected in zip(read_metrics(tmp_path), read_metrics(distilled), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
