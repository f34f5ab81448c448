"""Sparse-linear and chunked attention by the GPU's kernels: interpreted on small blocks, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.chunked import chunked_attention
from pallas_kernels.feature_map import init_polynomial_map
from pallas_kernels.gpu_sparse import inverse
from pallas_kernels.sparse import sparse_linear_attention
from tests.conftest import FULL_GRID
from tests.pallas_kernels.kernel_tests import cosine
from tests.pallas_kernels.kernel_tests import problem as hybrid_problem
from tests.pallas_kernels.test_chunked import branch_masks, errors, valid_keys, values_and_gradients
from tests.pallas_kernels.test_sparse import problem
from tests.pallas_kernels.test_tpu_sparse import assert_is_the_formula

CASES = [
    ((75, 75), 0.3, (16, 16), {"width": 16}),
    ((64, 96), 0.5, (32, 16), {"width": 32, "batch": 1, "dtype": jnp.bfloat16}),
]
MORE_CASES = [((70, 150), 0.4, (16, 32), {"width": 16, "batch": 1})]


@pytest.mark.parametrize(("tokens", "share", "blocks", "options"), CASES + MORE_CASES * FULL_GRID)
def test_sparse_values_and_gradients_are_those_of_the_formula(tokens, share, blocks, options):
    attend = functools.partial(gpu.sparse_linear_attention, block_q=blocks[0], block_k=blocks[1], interpret=True)
    assert_is_the_formula(attend, problem(*tokens, **options), share, *blocks)


def test_lists_the_other_way_round():
    lists = np.array([[[[0, 2], [1, 2], [2, 4]]]], np.int32)
    queries, begins = inverse(jnp.asarray(lists), 5)
    blocks = [np.asarray(queries)[0, 0, begins[0, 0, j] : begins[0, 0, j + 1]].tolist() for j in range(5)]
    assert blocks == [[0], [1], [0, 1, 2], [], [2]]


def test_blocks_that_the_kernels_do_not_take_are_named():
    q, k, v, projection = problem(64, 64, width=16)
    with pytest.raises(NotImplementedError, match="'gpu': blocks must be .* found 24 and 16"):
        sparse_linear_attention(q, k, v, projection, share=0.5, block_q=24, block_k=16, implementation="gpu")


@pytest.mark.parametrize("causal", [True, False] if FULL_GRID else [True])
def test_chunked_values_and_gradients_are_those_of_the_formula(causal):
    arguments, shape = hybrid_problem(52, width=16, heads=2), (52, 20, 7)
    valid = valid_keys(52, 20)
    sizes = {"chunk": 20, "overlap": 7, "causal": causal, "stabilizer": "max", "key_valid": valid}
    blocks = gpu.BlockSizes(query=16, key=16, backward=16)
    attend = functools.partial(gpu.chunked_attention, block_sizes=blocks, interpret=True)
    actual = values_and_gradients(attend, arguments, cosine(arguments[0]), **sizes)
    assert max(errors(actual, arguments, branch_masks(*shape, causal), key_valid=valid)) < 1e-5


def lowered(attend, *extra):
    """The program of a function's gradients for CUDA, of 32,760 tokens and 12 heads of 128 channels."""
    x = jax.ShapeDtypeStruct((1, 32760, 12, 128), jnp.bfloat16)
    gradients = jax.jit(lambda *arguments: jax.vjp(attend, *arguments)[1](arguments[0]))
    return gradients.trace(x, x, x, *extra).lower(lowering_platforms=("cuda",)).as_text()


def test_sparse_lowers_for_cuda():
    attend = functools.partial(sparse_linear_attention, share=0.1, block_q=128, block_k=64, implementation="gpu")
    projection = jax.ShapeDtypeStruct((128, 128), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.float32)
    program = lowered(attend, projection)
    kernels = ["sparse_attention", "sparse_query_gradient", "sparse_key_gradient"]
    assert program.count("xla.gpu.triton") == len(kernels)
    assert all(f"{name}_kernel" in program for name in kernels)


def test_chunked_lowers_for_cuda():
    """Chunks along the batch axis: as many kernels as attention of one chunk has, and the states of two pieces."""
    attend = functools.partial(chunked_attention, chunk=4680, overlap=1560, causal=True, implementation="gpu")
    phi = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), 12, 128))
    program = lowered(attend, phi, phi)
    assert program.count("xla.gpu.triton") == 5
    assert all(f"{name}_kernel" in program for name in ("state", "attention", "query_gradient", "key_gradient"))
