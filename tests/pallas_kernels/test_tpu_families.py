"""Chunked and sparse attention through the TPU compiler, which needs no TPU, and what its schedules say of them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tpu, tpu_lists
from pallas_kernels.estimate import compile_ahead, estimate_cycles
from pallas_kernels.feature_map import init_polynomial_map
from pallas_kernels.sparse import routing
from pallas_kernels.tpu_arguments import default_blocks
from tests.conftest import FULL_GRID, needs_libtpu

FRAMES, HEADS, WIDTH = 21, 12, 128
CHIPS, TOKENS = ("v5e", "v5p", "v6e"), (12600, 32760, 75600)
BLOCKS = 128, 64  # of queries and of keys
SHARE = 0.1
# Of a chip: matrix units that take a row a cycle, their side, cycles a second, bytes a second from HBM: the published
# 197 and 918 TFLOP/s are 2 * units * side^2 * cycles.
UNITS = {"v5e": (4, 128, 1.5e9, 819e9), "v6e": (4, 256, 1.75e9, 1640e9)}


def rows(num_tokens, heads=HEADS, width=WIDTH):
    """q, k or v as projections leave them."""
    return jax.ShapeDtypeStruct((1, num_tokens, heads * width), jnp.bfloat16)


def heads_of(x, width=WIDTH):
    return x.reshape(*x.shape[:2], -1, width)


def chunked(chunk, overlap, q, k, v, *maps, **options):
    arrays = map(heads_of, (q, k, v))
    y = tpu.chunked_attention(*arrays, *maps, chunk=chunk, overlap=overlap, causal=True, stabilizer="lse", **options)
    return y.reshape(q.shape)


def sparse(q, k, v, projection, block_q=BLOCKS[0], block_k=BLOCKS[1], **options):
    q, k, v = map(heads_of, (q, k, v))
    lists = routing(q, k, SHARE, block_q, block_k)
    y = tpu.sparse_linear_attention(q, k, v, projection, lists, block_q=block_q, block_k=block_k, **options)
    return y.reshape(*y.shape[:2], -1)


def gradients(attend, *arguments):
    return jax.vjp(attend, *arguments)[1](arguments[0])


def maps(heads=HEADS):
    return (jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), heads, WIDTH)),) * 2


def projection():
    return jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32), jax.ShapeDtypeStruct((WIDTH,), jnp.float32)


def kernel_names(program):
    return set(re.findall(r"((?:hybrid|chunk|sparse)_[a-z_]*[a-z])\W*/pallas_call", program.as_text()))


CHUNKED = {
    "chunk_state",
    "chunk_attend",
    "hybrid_delta",
    "hybrid_read_out_backward",
    "hybrid_attend_backward",
    "hybrid_state_backward",
}
SPARSE = {"sparse_state", "sparse_attend", "sparse_attend_backward"}


@needs_libtpu
def test_chunked_attention_compiles_for_tpu():
    """Windows that begin at odd multiples of 8 tokens, and a last chunk that is short."""
    x = rows(5 * 136 + 40, heads=2)
    attend = functools.partial(chunked, 2 * 136, 136)
    assert kernel_names(compile_ahead("v5e", functools.partial(gradients, attend), x, x, x, *maps(2))) == CHUNKED


@needs_libtpu
def test_sparse_attention_compiles_for_tpu():
    """A last block of keys and of queries that is short."""
    x = rows(2040, heads=2)
    assert kernel_names(compile_ahead("v5e", functools.partial(gradients, sparse), x, x, x, projection())) == SPARSE


if FULL_GRID:

    @needs_libtpu
    @pytest.mark.parametrize("num_tokens", TOKENS)
    @pytest.mark.parametrize("chip", CHIPS)
    def test_chunked_attention_compiles_at_full_size(chip, num_tokens):
        frame, x = num_tokens // FRAMES, rows(num_tokens)
        attend = functools.partial(chunked, 3 * frame, frame, block_sizes=default_blocks(chip))
        assert kernel_names(compile_ahead(chip, functools.partial(gradients, attend), x, x, x, *maps())) == CHUNKED

    @needs_libtpu
    @pytest.mark.parametrize("num_tokens", TOKENS)
    @pytest.mark.parametrize("chip", CHIPS)
    def test_sparse_attention_compiles_at_full_size(chip, num_tokens):
        x = rows(num_tokens)
        attend = functools.partial(sparse, block_sizes=default_blocks(chip))
        assert kernel_names(compile_ahead(chip, functools.partial(gradients, attend), x, x, x, projection())) == SPARSE

    @needs_libtpu
    @pytest.mark.parametrize(("chip", "ratio"), [("v5e", 1.1), ("v6e", 1.15)])
    def test_chunked_attention_is_near_its_bound(chip, ratio):
        """Static estimate of a forward at 32,760 tokens, Tc 3 and To 1, XLA's part too, against arithmetic."""
        frame, x = 32760 // FRAMES, rows(32760)
        attend = functools.partial(chunked, 3 * frame, frame, block_sizes=default_blocks(chip))
        kernels, others = estimate_cycles(chip, attend, x, x, x, *maps())
        total = sum(kernels.values()) + sum(others.values())
        assert total <= ratio * chunked_bound(chip, 32760, 3 * frame, frame)

    @needs_libtpu
    @pytest.mark.parametrize(("chip", "ratio"), [("v5e", 1.3), ("v6e", 1.4)])
    def test_sparse_attention_is_near_its_bound(chip, ratio):
        """Likewise of the kernels, of whole blocks, as many a step as go in turn: loops in a step count once."""
        x = rows(32768)
        step_queries = tpu_lists.IN_TURN * BLOCKS[0]
        attend = functools.partial(sparse, step_queries=step_queries, block_sizes=default_blocks(chip))
        kernels, _ = estimate_cycles(chip, attend, x, x, x, projection())
        assert sum(kernels.values()) <= ratio * sparse_bound(chip, 32768)


def product_cycles(chip, m, k, n):
    """Of [m, k] x [k, n] in bfloat16 on all matrix units: a row a cycle, where k and n fill a unit's sides or parts."""
    units, side, _, _ = UNITS[chip]
    return m * math.ceil(k / side) * math.ceil(n / side) / units


def chunked_bound(chip, num_tokens, chunk, overlap):
    """The larger of the matrix units' cycles and HBM's, of causal chunks in a forward."""
    cycles = 0.0
    phi = lambda count: product_cycles(chip, count, 128, 256) + product_cycles(chip, count, 256, 256)
    for start in range(0, num_tokens, chunk):
        queries, first = min(chunk, num_tokens - start), max(start - overlap, 0)
        keys = start + queries - first
        cycles += product_cycles(chip, queries, WIDTH, 1) * keys / UNITS[chip][1]  # scores: keys fill a side
        cycles += product_cycles(chip, queries, 1, WIDTH) * keys / UNITS[chip][1]  # values
        if first:
            cycles += phi(queries) + product_cycles(chip, queries, 256, WIDTH)
    last = max((num_tokens - 1) // chunk * chunk - overlap, 0)
    cycles += phi(last) + product_cycles(chip, last, 256, WIDTH)
    moved = 2 * WIDTH * (4 * num_tokens + last)  # q, k, v, y, and what the states read
    return HEADS * max(cycles, moved * UNITS[chip][2] / UNITS[chip][3])


def sparse_bound(chip, num_tokens):
    """Likewise, of sparse-linear attention without its routing."""
    chosen = max(1, int(SHARE * math.ceil(num_tokens / BLOCKS[1]))) * BLOCKS[1]
    cycles = 2 * product_cycles(chip, num_tokens, WIDTH, 1) * chosen / UNITS[chip][1]
    cycles += 2 * product_cycles(chip, num_tokens, WIDTH, WIDTH)
    return HEADS * max(cycles, 2 * WIDTH * 6 * num_tokens * UNITS[chip][2] / UNITS[chip][3])
