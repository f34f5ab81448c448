"""The TPU's kernels where there is no TPU, in interpret mode."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu, tpu_backward, tuning
from pallas_kernels.feature_map import init_hedgehog_map, init_polynomial_map
from pallas_kernels.tpu_problem import BlockSizes, Problem
from tests import equation_5
from tests.pallas_kernels.kernel_tests import (
    GridTests,
    RefusalTests,
    TiedMaximumTests,
    assert_is_equation_5,
    assert_within,
    cosine,
    grid,
    problem,
    some_valid,
    values_and_gradients,
)

# Small, so that a few hundred tokens take several blocks of each kind, the last of them partial.
BLOCKS = BlockSizes(
    query=128,
    key=256,
    key_chunk=128,
    state=128,
    backward_query=128,
    backward_key=256,
    backward_chunk=128,
    backward_state=128,
)


def in_small_blocks(*arguments, interpret=True, **options):
    return tpu.hybrid_attention(*arguments, block_sizes=BLOCKS, interpret=interpret, **options)


def changed(**changes):
    """The arguments of two heads of 128, except for `changes`."""
    names = ("q", "k", "v", "query_map", "key_map")
    arguments = dict(zip(names, problem(20, width=changes.pop("width", 128), heads=2), strict=True))
    return tuple((arguments | changes).values())


def halves():
    q, k, v, *maps = changed()
    return *(x.astype(np.float16) for x in (q, k, v)), *maps


class TestTpu(GridTests):
    implementation, module = "tpu", tpu
    cases: ClassVar = {"test_values_and_every_gradient": grid(2)}


class TestRefusals(RefusalTests):
    implementation = "tpu"
    cases: ClassVar = {
        "test_what_the_kernels_do_not_take_is_named": (
            ("arguments", "message"),
            [
                (lambda: changed(query_map=init_hedgehog_map(2, 128)), "query_map is a HedgehogMap"),
                (halves, "found float16, float16, float16"),
                (lambda: changed(v=changed()[2].astype(jnp.bfloat16)), "found float32, float32, bfloat16"),
                (functools.partial(changed, width=12), "heads of 12 channels"),
                (
                    lambda: changed(key_map=init_polynomial_map(jax.random.key(0), 2, 128, degree=3)),
                    r"found \(3, 'relu'\)",
                ),
            ],
        ),
    }


class TestSmallBlocks(TiedMaximumTests):
    in_small_blocks = staticmethod(in_small_blocks)
    sizes: ClassVar = {"width": 128, "heads": 2, "batch": 1}
    tied = (130, 33)
    cases: ClassVar = {
        "test_several_blocks": (
            ("num_tokens", "num_softmax", "stabilizer", "changes"),
            [
                (63, 63, "max", {"maps": False}),
                (130, 65, "lse", {"width": 64}),
                (500, 500, "max", {"width": 64, "masked": True, "maps": False}),
                (500, 125, "max", {"masked": True, "batch": 2, "heads": 1}),
                (300, 38, "lse", {"masked": True}),
                (130, 0, "max", {}),
                (130, 33, "max", {"width": 64, "degree": 3, "layers": 1, "activation": "softplus"}),
                (300, 75, "max", {"dtype": jnp.bfloat16}),
            ],
        ),
    }

    def test_scores_of_80_in_small_blocks(self):
        """Where e^s overflows float32 once squared, and eq. 5's linear terms carry no e^-c."""
        arguments = problem(130, **self.sizes | {"heads": 1}, spread=4.6)
        q, k = arguments[:2]
        assert 70 < np.abs(np.einsum("bnhd,bmhd->bhnm", q, k[:, :33])).max() / np.sqrt(128) < 100
        actual = values_and_gradients(self.in_small_blocks, arguments, cosine(q), num_softmax=33)
        expected = equation_5.values_and_gradients(arguments, cosine(q), 33)
        # Float32 knows a weight of e^80 to 5e-6.
        assert_within(actual, expected, value=1e-5, gradient=2e-5)


def test_bad_block_sizes_are_refused():
    with pytest.raises(ValueError, match=r"key_chunk .* found 100"):
        BlockSizes(key_chunk=100)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
def test_sums_of_weights_by_the_matrix_unit(dtype, bound):
    """They are as exact as sums by the vector units, against softmax in float64."""
    q, k, v, *_ = problem(300, width=128, heads=1, batch=1, dtype=dtype, spread=2.0)
    q_, k_, v_ = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k, v))
    weights = np.exp(q_ @ k_.T / np.sqrt(128))
    true = weights @ v_ / weights.sum(axis=1, keepdims=True)

    def attended(**sizes):
        blocks = dataclasses.replace(BLOCKS, **sizes)
        y = tpu.hybrid_attention(q, k, v, None, None, num_softmax=300, block_sizes=blocks, interpret=True)
        return np.asarray(y, np.float64)[0, :, 0]

    by_unit, by_vectors = attended(value_columns=256), attended()
    error = lambda y: np.linalg.norm(y - true) / np.linalg.norm(true)
    assert error(by_unit) < bound and error(by_unit) < 1.1 * error(by_vectors) + 1e-7
    assert (by_unit != by_vectors).any()  # they are two ways


@pytest.mark.parametrize(
    ("num_tokens", "num_softmax", "stabilizer", "masked"),
    [(300, 38, "max", True), (130, 33, "lse", False), (130, 0, "lse", False)],
)
def test_states_of_disjoint_keys_add_up(num_tokens, num_softmax, stabilizer, masked):
    """The linear keys in two parts, and the softmax keys by themselves."""
    arguments = problem(num_tokens, width=64, heads=2, batch=1)
    cotangent = cosine(arguments[0])
    valid = some_valid(num_tokens, batch=1) if masked else None
    common = {"block_sizes": BLOCKS, "interpret": True}

    def in_parts(q, k, v, query_map, key_map):
        cuts = slice(num_softmax), slice(num_softmax, num_tokens - 41), slice(num_tokens - 41, num_tokens)
        (k_S, v_S, valid_S), *linear = (jax.tree.map(lambda x, cut=cut: x[:, cut], (k, v, valid)) for cut in cuts)
        states = [tpu.linear_state(k, v, key_map, key_valid=valid, **common) for k, v, valid in linear]
        state = jax.tree.map(jnp.add, *states)
        options = {"key_valid": valid_S, "stabilizer": stabilizer, **common}
        return tpu.attend_with_state(q, k_S, v_S, query_map, state, **options)

    actual = values_and_gradients(in_parts, arguments, cotangent)
    expected = equation_5.values_and_gradients(arguments, cotangent, num_softmax, valid, stabilizer)
    assert_within(actual, expected, value=1e-5, gradient=1e-5)


def test_queries_beyond_what_vmem_holds(monkeypatch):
    """In two calls of two blocks of queries each, while two blocks of keys go by."""
    arguments = problem(400, width=128, heads=1, batch=1)
    together, calls = tpu_backward._attend_backward, []
    counted = lambda problem, blocks, *rest: calls.append(blocks) or together(problem, blocks, *rest)
    monkeypatch.setattr(tpu_backward, "RESIDENT_QUERIES", 256)
    monkeypatch.setattr(tpu_backward, "_attend_backward", counted)
    # A function of its own is compiled anew: how many queries VMEM holds is no argument.
    assert_is_equation_5(
        lambda *arguments, **options: in_small_blocks(*arguments, **options), arguments, num_softmax=300
    )
    assert calls == [range(2), range(2, 4)]


def test_races(capfd, monkeypatch):
    """None as it is, on two cores; one where the linear keys of a head are summed by both at once."""
    arguments = problem(140, width=64, heads=2, batch=1)
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, out_of_bounds_reads="uninitialized")
    assert_is_equation_5(functools.partial(in_small_blocks, interpret=interpret), arguments, num_softmax=50)
    assert "RACE DETECTED" not in capfd.readouterr().out

    call = Problem.call
    monkeypatch.setattr(Problem, "call", lambda *args, parallel, **rest: call(*args, parallel=1, **rest))
    arguments = problem(140, width=64, heads=1, batch=1)
    attend = functools.partial(tpu.hybrid_attention, num_softmax=50, block_sizes=BLOCKS, interpret=interpret)
    jax.block_until_ready(jax.jit(attend)(*arguments))
    assert "RACE DETECTED" in capfd.readouterr().out


def test_tuned_blocks(tmp_path):
    path = tmp_path / "tuned.json"
    tuning.save("v6e", 32760, 4095, {"query": 1024}, "measured", path)
    tuning.save("v6e", 32760, 32760, {"query": 512}, "measured", path)
    tuning.save("v6e", 32760, 4095, {"query": 2048}, "measured", path)
    assert len(tuning.load("v6e", path)) == 2
    assert tuning.lookup("v6e", 24000, 3000, path) == {"query": 2048}
    assert tuning.lookup("v6e", 60000, 60000, path) == {"query": 512}
    for far in (("v6e", 75600, 75600), ("v6e", 32760, 1000), ("v6e", 32760, 0), ("v5e", 32760, 4095)):
        assert tuning.lookup(*far, path) == {}
    assert tuning.load("v6e", tmp_path / "nobody_tuned.json") == []


def test_blocks_by_the_number_of_softmax_keys(monkeypatch):
    """Longer blocks of queries while the softmax keys are one step of the backward; what was tuned comes first."""
    assert [tpu.blocks_for(chip, 75600, 75600).value_columns for chip in ("v5e", "v6e")] == [128, 256]
    queries = [tpu.blocks_for("v5e", 75600, count).backward_query for count in (1, 4096, 4097, 75600)]
    assert queries == [2048, 2048, 1024, 1024] and BlockSizes().backward_key == 4096
    monkeypatch.setattr(tuning, "lookup", lambda chip, *counts: {"backward_key": 512} if chip == "v6e" else {})
    assert tpu.blocks_for("v6e", 8192, 2048).backward_key == 512
