"""The chunked implementation in plain XLA: the loop for CPUs, and the batched form for accelerators."""

import functools
import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import xla_loops
from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import init_hedgehog_map, init_polynomial_map
from tests.pallas_kernels.kernel_tests import AnyShapeTests, GridTests, TiedMaximumTests, grid, problem


class TestXla(GridTests, AnyShapeTests):
    implementation = "xla"
    cases: ClassVar = {"test_values_and_every_gradient": grid(0, lengths=(63, 500, 2049, 1000))}


class TestLoop(TiedMaximumTests):
    """Several chunks of queries in the loop for CPUs."""

    in_small_blocks = staticmethod(functools.partial(hybrid_attention, implementation="xla"))
    sizes: ClassVar = {"width": 5, "heads": 3, "batch": 2}
    tied = (9, 7)
    bfloat16_gradient = 0.1
    cases: ClassVar = {
        "test_several_blocks": (
            ("num_tokens", "num_softmax", "stabilizer", "changes"),
            [
                (21, 0, "max", {"masked": True}),
                (21, 7, "max", {"masked": True}),
                (21, 7, "lse", {"masked": True}),
                (21, 21, "max", {"masked": True}),
                (21, 7, "max", {"dtype": jnp.bfloat16, "activation": "softplus"}),
            ],
        )
    }

    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch):
        monkeypatch.setattr(xla_loops, "TILE", 1)
        monkeypatch.setattr(xla_loops, "MIN_TOKENS", 8)


class TestBatched(TestLoop):
    """The same chunks in the batched form for accelerators."""

    in_small_blocks = staticmethod(functools.partial(hybrid_attention, implementation="xla"))

    @pytest.fixture(autouse=True)
    def batched(self, monkeypatch):
        use_batched_form(monkeypatch)


def use_batched_form(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))


def assert_trees_close(actual, expected):
    for (path, e), a in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-3, atol=2e-4, err_msg=jax.tree_util.keystr(path))


def test_vmap_over_stacked_maps():
    *arrays, query_map, key_map = problem(21)
    loss = jax.value_and_grad(lambda maps: jnp.cos(hybrid_attention(*arrays, *maps, num_softmax=7)).sum())
    pair = [(query_map, key_map), jax.tree.map(lambda x: x + np.float32(0.2), (query_map, key_map))]
    stacked = jax.jit(jax.vmap(loss))(jax.tree.map(lambda *x: np.stack(x), *pair))
    one = jax.jit(loss)
    assert_trees_close(stacked, jax.tree.map(lambda *x: np.stack(x), *map(one, pair)))


def arrays_in(program):
    """{(type, number of elements)} of all arrays in the text of an HLO module."""
    return {
        (kind, math.prod(map(int, shape.split(",")))) for kind, shape in re.findall(r"\b(\w+)\[([\d,]+)\]", program)
    }


@pytest.mark.parametrize("form", ["loop", "batched"])
def test_neither_scores_nor_features_are_in_memory(form, monkeypatch):
    """Value and gradients have no array of N x N/R elements, no float32 of [N, H, P*D], and need memory linear in N."""
    if form == "batched":
        use_batched_form(monkeypatch)

    def compiled(num_tokens, implementation):
        q = jax.ShapeDtypeStruct((1, num_tokens, 2, 128), jnp.float32)
        maps = jax.eval_shape(lambda: (init_polynomial_map(jax.random.key(0), 2, 128),) * 2)
        options = {"num_softmax": num_tokens // 8, "implementation": implementation}
        step = jax.value_and_grad(lambda arguments: hybrid_attention(*arguments, **options).sum())
        return jax.jit(step).trace((q, q, q, *maps)).lower().compile()

    def offenders(program, num_tokens):
        scores, features = num_tokens * num_tokens // 8, num_tokens * 2 * 2 * 128
        found = arrays_in(program.as_text())
        return [(kind, size) for kind, size in found if size >= scores or (kind == "f32" and size >= features)]

    short, long = (compiled(num_tokens, "xla") for num_tokens in (8192, 16384))
    assert offenders(long, 16384) == []
    assert long.memory_analysis().temp_size_in_bytes < 2.2 * short.memory_analysis().temp_size_in_bytes
    if form == "loop":
        found = offenders(compiled(8192, "reference"), 8192)
        assert {("f32", 8192 * 1024 * 2), ("f32", 8192 * 2 * 2 * 128)} <= set(found)


def test_program_for_accelerators_has_no_loops_or_custom_calls():
    step = jax.jit(jax.grad(lambda args: hybrid_attention(*args, num_softmax=6).sum())).trace(problem(24))
    for platform in ("tpu", "cuda"):
        module = step.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.dot_general" in module
        assert "stablehlo.while" not in module
        assert "custom_call" not in module


def test_full_softmax_equals_dot_product_attention():
    q, k, v, _, _ = problem(33, width=16)

    @functools.partial(jax.jit, static_argnums=0)
    def of_both(attention, q, k, v):
        y, pullback = jax.vjp(attention, q, k, v)
        return y, pullback(jnp.cos(y))

    actual = of_both(lambda q, k, v: hybrid_attention(q, k, v, None, None, num_softmax=33), q, k, v)
    expected = of_both(jax.nn.dot_product_attention, q, k, v)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=3e-6), actual, expected)


def test_gradients_with_hedgehog_maps_equal_the_reference():
    q, k, v, _, _ = problem(21)
    arguments, attend = (
        (q, k, v, init_hedgehog_map(3, 5), init_hedgehog_map(3, 5)),
        functools.partial(hybrid_attention, num_softmax=7),
    )
    actual, expected = (
        jax.jit(jax.grad(lambda args, name=name: (attend(*args, implementation=name) * np.cos(q)).sum()))(arguments)
        for name in ("xla", "reference")
    )
    assert_trees_close(actual, expected)
