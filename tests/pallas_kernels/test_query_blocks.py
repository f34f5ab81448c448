"""Key ranges for each block of queries: values and gradients against eq. 5 in float64, with a mask for each query."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, tpu
from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import init_polynomial_map
from pallas_kernels.query_blocks import QueryBlock, attention_by_query_blocks
from tests import equation_5

# Chunks of 8 tokens attend to themselves with softmax and to other chunks with softmax, linearly or not at all.
CHUNKS = (
    QueryBlock((0, 8), (0, 8)),
    QueryBlock((8, 16), (8, 16), ((0, 8),)),
    QueryBlock((16, 24), (8, 24), ((0, 8), (24, 29))),
    QueryBlock((24, 29), (24, 24), ((3, 21),)),
)


def problem(num_tokens=29, width=5):
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(3, 2, num_tokens, 3, width)).astype(np.float32)
    shape = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), 3, width))
    maps = [jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), shape) for _ in range(2)]
    return *arrays, *maps


def branch_masks(blocks, num_tokens=29):
    """Two masks [N, M]: whether query n attends to key m with softmax, and whether linearly."""
    in_S, in_L = np.zeros((2, num_tokens, num_tokens), bool)
    for block in blocks:
        in_S[slice(*block.queries), slice(*block.softmax)] = True
        for keys in block.linear:
            in_L[slice(*block.queries), slice(*keys)] = True
    return in_S, in_L


def values_and_gradients(attend, arguments):
    y, pullback = jax.vjp(attend, *arguments)
    return y, pullback(jnp.cos(arguments[0]).astype(y.dtype))


def true_values_and_gradients(arguments, blocks, valid, stabilizer):
    masks = branch_masks(blocks)
    return equation_5.values_and_gradients(
        arguments, np.cos(arguments[0]), key_valid=valid, stabilizer=stabilizer, masks=masks
    )


@pytest.mark.parametrize(("masked", "stabilizer"), [(True, "max"), (True, "lse"), (False, "max")])
def test_values_and_gradients_are_those_of_equation_5(masked, stabilizer):
    valid = np.ones((2, 29), bool)
    if masked:
        valid = np.random.default_rng(1).random((2, 29)) < 0.7
        valid[:, ::8] = True
    arguments = problem()
    options = {"blocks": CHUNKS, "key_valid": valid if masked else None, "stabilizer": stabilizer}
    attend = lambda *arguments: attention_by_query_blocks(*arguments, **options)
    actual = jax.jit(functools.partial(values_and_gradients, attend))(arguments)
    expected = true_values_and_gradients(arguments, CHUNKS, valid, stabilizer)
    other, _ = true_values_and_gradients(
        arguments, (*CHUNKS[:3], CHUNKS[3]._replace(linear=((11, 21),))), valid, stabilizer
    )
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-4 * np.abs(e).max())
    assert np.abs(np.asarray(actual[0]) - np.asarray(other)).max() > 1e-3


def test_one_block_of_queries_equals_hybrid_attention():
    one = [QueryBlock((0, 29), (0, 7), ((7, 29),))]
    several = [QueryBlock(queries, (0, 7), ((7, 12), (12, 29))) for queries in ((0, 4), (4, 29))]

    @jax.jit
    def attend(*arguments):
        by_blocks = [attention_by_query_blocks(*arguments, blocks=blocks) for blocks in (one, several)]
        return *by_blocks, hybrid_attention(*arguments, num_softmax=7)

    of_one, of_several, expected = attend(*problem())
    np.testing.assert_allclose(of_one, expected, atol=1e-6)
    np.testing.assert_allclose(of_several, expected, atol=1e-5)


def test_values_of_the_tpu_kernels(monkeypatch):
    for name in ("hybrid_attention", "linear_state", "attend_with_state"):
        monkeypatch.setattr(tpu, name, functools.partial(getattr(tpu, name), interpret=True))
    monkeypatch.setattr(api, "_place", lambda: ("tpu", True))
    arguments = problem(width=64)
    actual = jax.jit(functools.partial(attention_by_query_blocks, blocks=CHUNKS))(*arguments)
    expected, _ = true_values_and_gradients(arguments, CHUNKS, np.ones((2, 29), bool), "max")
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], r"queries 0\.\.29 in order, found \[\]"),
        ([QueryBlock((0, 8), (0, 8)), QueryBlock((9, 29), (0, 8))], r"in order, found \[\(0, 8\), \(9, 29\)\]"),
        ([QueryBlock((0, 29), (0, 30))], r"blocks\[0\].*0\.\.29, found \(0, 30\)"),
        ([QueryBlock((0, 29), (0, 8), ((7, 9),))], r"overlap: \[\(0, 8\), \(7, 9\)\]"),
        ([QueryBlock((0, 29), (4, 4))], r"blocks\[0\] has no keys"),
    ],
)
def test_bad_blocks_raise_errors(blocks, message):
    with pytest.raises(ValueError, match=message):
        attention_by_query_blocks(*problem(), blocks=blocks)
    with pytest.raises(ValueError, match=r"blocks\[0\] has linear keys.*found None"):
        attention_by_query_blocks(*problem()[:3], None, None, blocks=[QueryBlock((0, 29), (0, 7), ((7, 29),))])
