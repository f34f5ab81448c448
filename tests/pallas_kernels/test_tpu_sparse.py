"""Sparse-linear attention by the TPU's kernels, interpreted, against its formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tpu_lists, tpu_sparse
from pallas_kernels.sparse import routing
from pallas_kernels.tpu_problem import BlockSizes
from tests.conftest import FULL_GRID
from tests.pallas_kernels.kernel_tests import cosine
from tests.pallas_kernels.test_sparse import errors, problem, true_routing, true_values_and_gradients


@functools.partial(jax.jit, static_argnames=("attend",))
def values_and_gradients(attend, arguments, lists, cotangent):
    y, pullback = jax.vjp(lambda arguments: attend(*arguments, lists), arguments)
    return y, pullback(cotangent)[0]


def assert_is_the_formula(attend, arguments, share, block_q, block_k):
    """Values and gradients at the routing of the keys' blocks; the gradients are as exact as the dtype allows."""
    lists = routing(*arguments[:2], share, block_q, block_k)
    routed, _ = true_routing(*arguments[:2], share, block_q, block_k)
    found = np.zeros(routed.shape, bool)
    np.put_along_axis(found, np.asarray(lists), True, axis=-1)
    actual = values_and_gradients(attend, arguments, lists, cosine(arguments[0]))
    found = errors(actual, true_values_and_gradients(arguments, found, block_q, block_k))
    if arguments[0].dtype == np.float32:
        assert max(found) < 1e-5, found
    else:
        assert 1e-5 < found[0] < 6e-3 and max(found) < 3e-2, found


CASES = [
    ((290, 411), 0.2, (32, 64), {"width": 128, "batch": 1}),
    ((128, 256), 0.6, (16, 32), {"width": 64, "batch": 1, "dtype": jnp.bfloat16}),
]
MORE_CASES = [((300, 300), 0.3, (16, 16), {"width": 128, "heads": 1}), ((290, 411), 0.2, (32, 64), {"width": 64})]


@pytest.mark.parametrize(("tokens", "share", "blocks", "options"), CASES + MORE_CASES * FULL_GRID)
def test_values_and_gradients_are_those_of_the_formula(monkeypatch, tokens, share, blocks, options):
    """Several steps, tiles and segments, the last of them partial; at a width of 128 the unit sums the weights too."""
    monkeypatch.setattr(tpu_lists, "TILE_SCORES", 2048)
    monkeypatch.setattr(tpu_lists, "BACKWARD_TILE_KEYS", 128)
    sizes = {"step_queries": 128, "segment_keys": 128, "interpret": True}
    sizes["block_sizes"] = BlockSizes(value_columns=256)
    attend = functools.partial(tpu_sparse.sparse_linear_attention, block_q=blocks[0], block_k=blocks[1], **sizes)
    assert_is_the_formula(attend, problem(*tokens, **options), share, *blocks)


def test_what_the_kernels_do_not_take_is_named():
    q, k, v, projection = problem(32, 32, width=64)
    attend = functools.partial(tpu_sparse.sparse_linear_attention, lists=jnp.zeros((2, 2, 2, 1), jnp.int32))
    with pytest.raises(NotImplementedError, match="multiples of 16 tokens, found 24 and 16"):
        attend(q, k, v, projection, block_q=24, block_k=16)
    long = jax.ShapeDtypeStruct((1, 200_000, 1, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="fit 45 MiB, found 200000 keys"):
        jax.eval_shape(functools.partial(attend, block_q=16, block_k=16), long, long, long, projection)
