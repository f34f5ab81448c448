"""Chunked attention on TPU: kernels that find a chunk's tokens where they lie, and gradients.

The forward reads windows in place (`tpu_chunks`). The backward has the chunks along the batch axis and runs the kernels
of hybrid attention on copies of the windows, whose gradients it adds where windows overlap.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import log, tuning
from pallas_kernels.chunk_windows import (
    Kernels,
    State,
    attend_to_chunks,
    has_linear_keys,
    padded,
    sums_of_pieces,
    windows,
)
from pallas_kernels.feature_map import FeatureMap, PolynomialMap
from pallas_kernels.tpu_arguments import check, default_blocks, head_product, polynomial, problem_of, scaled
from pallas_kernels.tpu_backward import attend_backward, known_per_query, read_out_backward, summarize_backward
from pallas_kernels.tpu_chunk_states import summarize_chunks
from pallas_kernels.tpu_chunks import Chunks, attend_to_windows, masks_from
from pallas_kernels.tpu_problem import LANES, BlockSizes, Problem

MOST_BACKWARD_KEYS = 8192  # of a step


def chunked_attention(
    kernels: Kernels,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap | None,
    key_map: FeatureMap | None,
    *,
    chunk: int,
    overlap: int,
    causal: bool,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
    block_sizes: BlockSizes | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `pallas_kernels.chunked_attention`. Chunks that are no whole rows take `kernels` and copies of windows."""
    length = q.shape[1]
    chunk = min(chunk, length)
    chunks = Chunks(chunk, min(overlap, (-(-length // chunk) - 1) * chunk), causal, length)
    refusal = chunks.refusal()
    if refusal or not has_linear_keys(length, chunk, overlap, causal):
        if refusal:
            log.once(f"'tpu' copies the windows of chunked attention: {refusal}")
        options = {"causal": causal, "key_valid": key_valid, "stabilizer": stabilizer}
        return attend_to_chunks(kernels, q, k, v, query_map, key_map, chunk=chunk, overlap=overlap, **options)
    query_map, key_map = polynomial("query_map", query_map), polynomial("key_map", key_map)
    assert query_map is not None and key_map is not None
    check(q, k, v, query_map, key_map, interpret)
    block_sizes = block_sizes or default_blocks(tuning.current_chip())
    problem = problem_of(q, k, query_map, length, key_valid, stabilizer, block_sizes, interpret)
    packed = tuple(problem.pack(x) for x in (q, k, v))
    state = _states(problem, chunks, packed[1:], key_map, key_valid)
    return problem.unpack(_attend(problem, chunks, packed, query_map, state, key_valid))


def _evenly(length: int, most: int) -> int:
    """The size of equal blocks of a length, each at most `most` tokens, in whole lanes."""
    blocks = -(-length // most)
    return -(-length // (blocks * LANES)) * LANES


def _of_chunks(problem: Problem, chunks: Chunks, window: bool, masked: bool) -> Problem:
    """The problem with chunks along the batch axis, each with its own keys or with those of its window."""
    length = chunks.window if window else chunks.chunk
    most = problem.blocks
    one_step = length <= MOST_BACKWARD_KEYS  # then no dq is kept in VMEM, which leaves room for more queries
    blocks = dataclasses.replace(
        most,
        state=_evenly(chunks.chunk, most.state),
        backward_state=_evenly(chunks.chunk, most.backward_state),
        backward_query=_evenly(chunks.chunk, most.backward_query * (1 + one_step)),
        backward_key=_evenly(length, MOST_BACKWARD_KEYS),
    )
    return dataclasses.replace(
        problem,
        batch=problem.batch * chunks.count,
        num_queries=chunks.chunk,
        num_keys=length,
        num_softmax=length,
        masked=masked,
        blocks=blocks.fit(chunks.chunk, length, length),
    )


def _pieces(problem: Problem, chunks: Chunks, masked: bool) -> list[Problem]:
    """The problems of the states before and, if there is any, after the cut of every chunk."""
    of_chunks = _of_chunks(problem, chunks, window=False, masked=masked)
    before = dataclasses.replace(of_chunks, num_keys=chunks.cut, num_softmax=0)
    return [before, dataclasses.replace(of_chunks, num_softmax=chunks.cut)] if chunks.cut < chunks.chunk else [before]


def _by_chunk(problem: Problem, chunks: Chunks, x: jax.Array) -> jax.Array:
    """A packed array [B, N, ...] or [B, H, N, D] with chunks along the batch axis, and zeros after the last token."""
    cut = lambda x: windows(x[:, : chunks.length], chunks.chunk, 0, chunks.count)
    return cut(x) if problem.packed else cut(x.swapaxes(1, 2)).swapaxes(1, 2)


def _from_chunks(problem: Problem, chunks: Chunks, x: jax.Array) -> jax.Array:
    """The inverse of `_by_chunk`."""
    of_chunks = lambda x: _by_chunk(problem, chunks, x)
    whole = jax.ShapeDtypeStruct(problem.packed_shape(problem.num_keys), x.dtype)
    return jax.linear_transpose(of_chunks, whole)(x)[0]


def _windows(problem: Problem, chunks: Chunks, x: jax.Array) -> jax.Array:
    """A packed array's windows, zeros beyond its ends, along the batch axis."""
    cut = lambda x: windows(x, chunks.chunk, chunks.overlap, chunks.count)
    return cut(x) if problem.packed else cut(x.swapaxes(1, 2)).swapaxes(1, 2)


def _chunk_mask(chunks: Chunks, valid: jax.Array | None) -> jax.Array | None:
    """float32 [B*T, 1, chunk]: which tokens of every chunk there are and are valid; None if all are."""
    if valid is None and chunks.length % chunks.chunk == 0:
        return None
    valid = jnp.ones((1, chunks.length), bool) if valid is None else valid[:, : chunks.length]
    return windows(valid, chunks.chunk, 0, chunks.count)[:, None].astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _states(problem: Problem, chunks: Chunks, arrays: tuple, key_map: PolynomialMap, valid: jax.Array | None) -> State:
    """The linear state of every chunk, [B*T, H, F, D] and [B*T, H, F], for packed (k, v)."""
    return _states_forward(problem, chunks, arrays, key_map, valid)[0]


def _states_forward(problem, chunks, arrays, key_map, valid):
    k, v = arrays
    parts = summarize_chunks(problem, chunks.with_states(), key_map, k, v, valid)
    if chunks.causal:  # running sums, of which each is the state of a later chunk
        by_batch = lambda x: x.reshape(problem.batch, -1, *x.shape[1:])
        later = lambda x: padded(by_batch(x), chunks.back, 0).reshape(-1, *x.shape[1:])
        totals = jax.tree.map(later, parts[0])
    else:
        totals = _sums(problem, chunks, parts)
    totals = scaled(totals, key_map.log_scale)
    return totals, (arrays, key_map, valid, totals)


def _mask_of_batch(problem: Problem, chunks: Chunks, valid: jax.Array | None) -> jax.Array | None:
    mask = _chunk_mask(chunks, valid)
    if mask is None or len(mask) == problem.batch * chunks.count:
        return mask
    return jnp.tile(mask, (problem.batch, 1, 1))


def _sums(problem: Problem, chunks: Chunks, parts: list[State]) -> State:
    """The states of all chunks from those of each chunk's keys before the cut and, if there are any, after it."""
    by_batch = lambda x: x.reshape(problem.batch, -1, *x.shape[1:])
    before, *rest = (jax.tree.map(by_batch, part) for part in parts)
    return sums_of_pieces(before, rest[0] if rest else None, chunks.count, chunks.back, chunks.causal)


def _states_backward(problem, chunks, residuals, cotangents):
    arrays, key_map, valid, totals = residuals
    log_scale_H = sum(head_product(d, x) for d, x in zip(cotangents, totals, strict=True))
    kept = chunks.with_states()
    mask = _mask_of_batch(problem, kept, valid)
    k, v = (_by_chunk(problem, kept, x) for x in arrays)
    problems = _pieces(problem, kept, mask is not None)
    shapes = [jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(k), *x.shape[1:]), x.dtype), totals)] * len(problems)
    (of_parts,) = jax.linear_transpose(lambda parts: _sums(problem, chunks, parts), shapes)(
        scaled(cotangents, key_map.log_scale)
    )
    tokens, maps = [], []
    for each, cotangent in zip(problems, of_parts, strict=True):
        d_tokens, (kernels, biases) = summarize_backward(each, key_map, k, v, mask, *cotangent)
        tokens.append(d_tokens)
        maps.append((kernels, biases))
    d_tokens, kernels_and_biases = tokens[0], maps[0]
    if len(tokens) == 2:  # each is defined at its own piece alone
        first = jnp.arange(kept.chunk) < problems[0].num_keys
        first = first[None, :, None] if problem.packed else first[None, None, :, None]
        d_tokens = [jnp.where(first, *pair) for pair in zip(*tokens, strict=True)]
        kernels_and_biases = jax.tree.map(jnp.add, *maps)
    kernels, biases = kernels_and_biases
    d_map = dataclasses.replace(key_map, kernels=kernels, biases=biases, log_scale=log_scale_H)
    return tuple(_from_chunks(problem, kept, x) for x in d_tokens), d_map, None


_states.defvjp(_states_forward, _states_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    problem: Problem, chunks: Chunks, arrays: tuple, query_map: PolynomialMap, state: State, valid: jax.Array | None
) -> jax.Array:
    """y, packed, for packed (q, k, v) and the states of all chunks."""
    return _run(problem, chunks, arrays, query_map, scaled(state, query_map.log_scale), valid, with_stats=False)[0]


def _run(problem, chunks, arrays, query_map, state, valid, *, with_stats):
    mask = None
    if valid is not None:
        mask = masks_from(valid, chunks.window, [chunks.window_start(t) for t in range(chunks.count)])
    (q, k, v), (S, z) = arrays, state
    return attend_to_windows(problem, chunks, query_map, q, k, v, mask, S, z, with_stats=with_stats)


def _attend_forward(problem, chunks, arrays, query_map, state, valid):
    state = scaled(state, query_map.log_scale)
    y, stats = _run(problem, chunks, arrays, query_map, state, valid, with_stats=True)
    return y, (arrays, query_map, state, valid, y, stats)


def _attend_backward(problem, chunks, residuals, dy):
    (q, k, v), query_map, state, valid, y, stats = residuals
    there = jnp.ones((problem.batch, chunks.length), bool) if valid is None else valid
    window_valid = windows(there, chunks.chunk, chunks.overlap, chunks.count)[:, None].astype(jnp.float32)
    masked = valid is not None or chunks.overlap > 0 or chunks.length % chunks.chunk > 0
    of_chunks = _of_chunks(problem, chunks, window=True, masked=masked)

    known = known_per_query(problem, y, dy, stats).swapaxes(1, 3)  # [B, N, 3, H]
    known = windows(known, chunks.chunk, 0, chunks.count).swapaxes(1, 3)
    q_chunks, dy_chunks = (_by_chunk(problem, chunks, x) for x in (q, dy))
    dq, linear, dstate, dz, (kernels, biases) = read_out_backward(
        of_chunks, query_map, q_chunks, dy_chunks, known, *state
    )
    (k_windows, v_windows), back = jax.vjp(lambda *pair: tuple(_windows(problem, chunks, x) for x in pair), k, v)
    dq, *d_windows = attend_backward(
        of_chunks, q_chunks, k_windows, v_windows, window_valid, dy_chunks, known, linear, dq
    )
    dk, dv = back(tuple(d_windows))
    d_map = dataclasses.replace(query_map, kernels=kernels, biases=biases, log_scale=-linear.sum(axis=(0, 2, 3)))
    return (_from_chunks(problem, chunks, dq), dk, dv), d_map, scaled((dstate, dz), query_map.log_scale), None


_attend.defvjp(_attend_forward, _attend_backward)
