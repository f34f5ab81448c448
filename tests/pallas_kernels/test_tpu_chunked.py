"""Chunked attention by the TPU's kernels, interpreted, against eq. 5 in float64 with the formula's key ranges."""

import jax.numpy as jnp
import pytest

from pallas_kernels import tpu, tpu_chunk_states, tpu_chunks
from pallas_kernels.tpu_problem import BlockSizes
from tests.conftest import FULL_GRID
from tests.pallas_kernels.kernel_tests import cosine, problem
from tests.pallas_kernels.test_chunked import branch_masks, errors, valid_keys, values_and_gradients

# At a width of 128, the sum of the weights is a column of the product with the values.
SMALL = dict.fromkeys(("query", "state", "backward_query", "backward_state", "key_chunk"), 128)
BLOCKS = BlockSizes(**SMALL, value_columns=256)


def in_small_blocks(*arguments, **options):
    return tpu.chunked_attention(*arguments, block_sizes=BLOCKS, interpret=True, **options)


CASES = [
    ((72, 24, 8), False, True, {}),
    ((112, 32, 40), True, True, {"width": 128}),
    ((560, 272, 16), True, False, {"dtype": jnp.bfloat16, "stabilizer": "lse", "activation": "softplus"}),
]
MORE_CASES = [
    ((72, 24, 8), True, False, {"width": 128}),
    ((112, 32, 40), False, False, {"stabilizer": "lse"}),
    ((544, 272, 0), True, False, {"stabilizer": "lse"}),
    ((52, 20, 7), True, False, {}),  # copies its windows
]


@pytest.mark.parametrize(("shape", "causal", "masked", "options"), CASES + MORE_CASES * FULL_GRID)
def test_values_and_gradients_are_those_of_the_formula(monkeypatch, shape, causal, masked, options):
    """Windows in place, several blocks of queries and of a state's keys in a chunk, short last chunks."""
    monkeypatch.setattr(tpu_chunks, "MOST_QUERIES", 136)
    monkeypatch.setattr(tpu_chunk_states, "MOST_KEYS", 24 if shape[1] < 136 else 136)
    options = {"width": 64, "heads": 2, "batch": 2 if masked else 1, "stabilizer": "max"} | options
    stabilizer = options.pop("stabilizer")
    length, chunk, overlap = shape
    arguments = problem(length, **options)
    valid = valid_keys(length, chunk) if masked else None
    sizes = {"chunk": chunk, "overlap": overlap, "causal": causal, "stabilizer": stabilizer, "key_valid": valid}
    attend = lambda *arguments, **options: in_small_blocks(*arguments, **options)
    actual = values_and_gradients(attend, arguments, cosine(arguments[0]), **sizes)
    found = errors(actual, arguments, branch_masks(*shape, causal), key_valid=valid, stabilizer=stabilizer)
    if arguments[0].dtype == jnp.bfloat16:
        assert 1e-5 < found[0] < 6e-3 and found[1] < 3e-2
    else:
        assert max(found) < 1e-5


def test_the_kernel_reads_windows_in_place():
    chunks = tpu_chunks.Chunks(4680, 1560, True, 32760)
    assert chunks.refusal() is None and chunks.queries == 1560
    assert chunks.kinds() == [(0, 0, 0, 4680, False), (1, 6, 0, 6240, True)]
    assert "not all of whole rows" in tpu_chunks.Chunks(20, 7, True, 52).refusal()
    assert "no large block" in tpu_chunks.Chunks(8 * 1013, 8, True, 80000).refusal()
    assert "windows of 40000" in tpu_chunks.Chunks(32000, 8000, True, 80000).refusal()
