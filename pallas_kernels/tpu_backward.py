"""Backward of hybrid attention on TPU: a kernel for each feature map, and one pass over the softmax scores.

The forward pass keeps its inputs, its output and two numbers per query; the rest is recomputed. Scores and features are
transposed, with the tokens of the queries along lanes. What is known per query is then a row, and no product has to
transpose its operands.

Let n be eq. 5's denominator, g = dy / n, delta = dy . y, and T_i = -phi_q,i . dphi_q,i. T is all that the softmax
branch needs to know about the linear branch. The gradient of the scores is w (g . v - delta / n), minus a term for the
stabiliser: T at the row's maximum for "max" (shared between equal maxima of one tile), and w T for "lse".
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.feature_map import PolynomialMap
from pallas_kernels.tpu_feature_map import (
    hidden_columns,
    map_backward,
    map_flops,
    map_gradient,
    map_operands,
    map_results,
    powers,
)
from pallas_kernels.tpu_problem import (
    LANES,
    LOG2_E,
    MASKED,
    Problem,
    lane_sums,
    query_numbers,
    row,
    run_with_tail,
    take,
    whole,
    within,
    zero_at,
)

# Queries whose dq is kept in VMEM at once, in float32: 20 MiB at width 128.
RESIDENT_QUERIES = 40960


def known_per_query(problem: Problem, y, dy, stats) -> jax.Array:
    """The other kernels' numbers per query, float32 [B, H, 3, N]: base and shift (see `attend`), and delta = dy . y.

    This is a kernel because XLA, to sum y * dy in this layout, would write the product in float32 and transpose it. At
    a fast rate that takes a third as long as all kernels together.
    """
    size = problem.blocks.backward_state

    def kernel(y_ref, dy_ref, stats_ref, known_ref):
        known_ref[:2, :] = stats_ref[...]
        known_ref[2:, :] = (dy_ref[...].astype(jnp.float32) * y_ref[...]).T.sum(axis=0, keepdims=True)

    tokens = problem.tokens(size, lambda step: step)
    return problem.call(
        kernel,
        "hybrid_delta",
        (pl.cdiv(problem.num_queries, size),),
        parallel=1,
        flops=2 * problem.num_queries * problem.width,
        exps=0,
        in_specs=[tokens, tokens, query_numbers(2, size, lambda step: step)],
        out_specs=query_numbers(3, size, lambda step: step),
        out_shape=jax.ShapeDtypeStruct((problem.batch, problem.heads, 3, problem.num_queries), jnp.float32),
    )(y, dy, stats)


def read_out_backward(problem: Problem, query_map: PolynomialMap, q, dy, per_query, state, z):
    """Backward of phi_q's read-out.

    Args:
        per_query: the result of `known_per_query`.
        state: S [B, H, F, D], with the scales of both maps.
        z: [B, H, F], likewise.

    Returns:
        the linear branch's part of dq, packed; T [B, H, 1, N]; dS; dz; the gradients of phi_q's kernels and biases.
    """
    size = problem.blocks.backward_state
    features = state.shape[2]
    operands, specs = map_operands(query_map, problem.dtype)
    sums, sum_specs = map_results(query_map, problem)
    count = len(operands)

    def kernel(q_ref, dy_ref, per_query_ref, state_ref, z_ref, *refs):
        weights, (dq_ref, linear_ref, dstate_ref, dz_ref, *sum_refs) = refs[:count], refs[count:]
        step = pl.program_id(2)
        zero_at(step == 0, [dstate_ref, dz_ref, *sum_refs])
        q_TxD, dy_TxD, known = q_ref[...], dy_ref[...], per_query_ref[...]
        if problem.num_queries % size:
            inside = within(step * size, size, 0, problem.num_queries, 0)
            q_TxD, dy_TxD = jnp.where(inside, q_TxD, 0), jnp.where(inside, dy_TxD, 0)
            known = jnp.where(within(step * size, size, 0, problem.num_queries, 1), known, 0.0)
        base, shift, delta = known[0:1], known[1:2], known[2:3]
        after = hidden_columns(problem, q_TxD, weights[: 2 * len(query_map.kernels)])
        phi_FxT = powers(after[-1], problem.degree, 0)
        over_n = jnp.exp2(base - shift)
        weighted_FxT = phi_FxT * over_n
        dstate_ref[...] += problem.dot(weighted_FxT, dy_TxD)
        dz_ref[...] -= lane_sums(weighted_FxT * delta)
        dphi_FxT = (problem.dot(state_ref[...], dy_TxD, (1, 1)) - z_ref[...] * delta) * over_n
        linear_ref[...] = -(phi_FxT * dphi_FxT).sum(axis=0, keepdims=True)
        dq_ref[...] = map_backward(problem, q_TxD, after, dphi_FxT, weights, sum_refs)

    tokens = problem.tokens(size, lambda step: step)
    f32 = lambda *shape: jax.ShapeDtypeStruct((problem.batch, problem.heads, *shape), jnp.float32)
    dq, linear, dstate, dz, *sums = problem.call(
        kernel,
        "hybrid_read_out_backward",
        (pl.cdiv(problem.num_queries, size),),
        parallel=0,
        flops=problem.num_queries * (3 * map_flops(query_map) + 4 * features * problem.width),
        exps=problem.num_queries,
        in_specs=[
            tokens,
            tokens,
            query_numbers(3, size, lambda step: step),
            whole(features, problem.width, per_batch=True),
            whole(features, 1, per_batch=True),
            *specs,
        ],
        out_specs=[
            tokens,
            query_numbers(1, size, lambda step: step),
            whole(features, problem.width, per_batch=True),
            whole(features, LANES, per_batch=True),
            *sum_specs,
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            f32(1, problem.num_queries),
            f32(features, problem.width),
            f32(features, LANES),
            *sums,
        ],
    )(q, dy, per_query, state.astype(problem.dtype), z[..., None], *operands)
    return dq, linear, dstate, dz.sum(axis=-1), map_gradient(query_map, sums)


def summarize_backward(
    problem: Problem, key_map: PolynomialMap, k, v, valid, dstate, dz, token_gradients: bool = True
) -> tuple[Any, Any]:
    """Backward of `summarize`: (dk, dv), packed, with undefined values at softmax keys, and phi_k's gradients.

    Without `token_gradients`, dk and dv are not computed, and the first result is empty.
    """
    size = problem.blocks.backward_state
    first = problem.num_softmax // size
    features = dstate.shape[2]
    ragged = problem.num_softmax % size or problem.num_keys % size
    operands, specs = map_operands(key_map, problem.dtype)
    sums, sum_specs = map_results(key_map, problem)
    count = len(operands)
    masks = [valid] if problem.masked else []

    def kernel(k_ref, v_ref, dstate_ref, turned_ref, dz_ref, *refs):
        weights, mask_refs, results = refs[:count], refs[count : count + len(masks)], refs[count + len(masks) :]
        results = iter(results)
        dk_ref, dv_ref = take(results, 2, token_gradients)
        sum_refs = list(results)
        step = pl.program_id(2)
        zero_at(step == 0, sum_refs)
        k_TxD, v_TxD = k_ref[...], v_ref[...]
        start = (first + step) * size
        if problem.num_keys % size:
            inside = within(start, size, 0, problem.num_keys, 0)
            k_TxD, v_TxD = jnp.where(inside, k_TxD, 0), jnp.where(inside, v_TxD, 0)
        after = hidden_columns(problem, k_TxD, weights[: 2 * len(key_map.kernels)])
        phi_FxT = powers(after[-1], problem.degree, 0)
        dphi_FxT = problem.dot(dstate_ref[...], v_TxD, (1, 1)) + dz_ref[...]
        if ragged:
            inside = within(start, size, problem.num_softmax, problem.num_keys, 1)
            phi_FxT, dphi_FxT = jnp.where(inside, phi_FxT, 0.0), jnp.where(inside, dphi_FxT, 0.0)
        if problem.masked:
            inside = mask_refs[0][...] > 0
            phi_FxT, dphi_FxT = jnp.where(inside, phi_FxT, 0.0), jnp.where(inside, dphi_FxT, 0.0)
        dk_TxD = map_backward(problem, k_TxD, after, dphi_FxT, weights, sum_refs, inputs=token_gradients)
        if token_gradients:
            dv_ref[...] = problem.dot(turned_ref[...], phi_FxT).astype(dv_ref.dtype).T
            dk_ref[...] = dk_TxD

    block = lambda step: first + step
    of_tokens = problem.tokens(size, block)
    results = problem.call(
        kernel,
        "hybrid_state_backward",
        (pl.cdiv(problem.num_keys, size) - first,),
        parallel=0,
        flops=problem.num_linear * (3 * map_flops(key_map) + 4 * features * problem.width),
        exps=0,
        in_specs=[
            of_tokens,
            of_tokens,
            whole(features, problem.width, per_batch=True),
            whole(problem.width, features, per_batch=True),
            whole(features, 1, per_batch=True),
            *specs,
            *(row(size, block) for _ in masks),
        ],
        out_specs=[of_tokens] * 2 * token_gradients + sum_specs,
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2 * token_gradients + sums,
    )(
        k,
        v,
        dstate.astype(problem.dtype),
        dstate.astype(problem.dtype).swapaxes(2, 3),
        dz[..., None],
        *operands,
        *masks,
    )
    count = 2 * token_gradients
    return results[:count], map_gradient(key_map, results[count:])


def attend_backward(problem: Problem, q, k, v, valid, dy, per_query, linear, dq_linear):
    """Backward of softmax over the prefix, in one pass: five products per tile of scores.

    dk and dv of a block of keys stay in VMEM while the kernel runs over the queries. If there are several blocks of
    keys, dq stays in VMEM too, and a call processes at most `RESIDENT_QUERIES` queries.

    Args:
        per_query: the result of `known_per_query`.
        linear: T [B, H, 1, N]; None in full softmax.
        dq_linear: the linear branch's part of dq, packed; None in full softmax.

    Returns:
        dq, and dk and dv of the softmax keys, packed.
    """
    size = problem.blocks.backward_query
    query_blocks = pl.cdiv(problem.num_queries, size)
    resident = RESIDENT_QUERIES // size if problem.num_softmax > problem.blocks.backward_key else query_blocks
    parts = [
        _attend_backward(
            problem, range(start, min(start + resident, query_blocks)), q, k, v, valid, dy, per_query, linear, dq_linear
        )
        for start in range(0, query_blocks, resident)
    ]
    if len(parts) == 1:
        return parts[0]
    axis = 1 if problem.packed else 2
    dq, dk, dv = zip(*parts, strict=True)
    dk, dv = (functools.reduce(jnp.add, sums).astype(problem.dtype) for sums in (dk, dv))
    return jnp.concatenate(dq, axis), dk, dv


def _attend_backward(problem: Problem, query_blocks: range, q, k, v, valid, dy, per_query, linear, dq_linear):
    queries, keys, chunk = (
        problem.blocks.backward_query,
        problem.blocks.backward_key,
        problem.blocks.backward_chunk,
    )
    key_steps, query_steps = pl.cdiv(problem.num_softmax, keys), len(query_blocks)
    length = min(problem.num_queries - query_blocks.start * queries, query_steps * queries)
    tail = problem.num_softmax - (key_steps - 1) * keys
    width = problem.width
    scale = width**-0.5
    hybrid = linear is not None
    at_maximum = hybrid and problem.stabilizer == "max"
    masks = [valid] if problem.masked else []

    def kernel(q_ref, dy_ref, per_query_ref, k_ref, v_ref, *refs):
        refs = iter(refs)
        (valid_ref,) = take(refs, 1, problem.masked)
        linear_ref, dq_linear_ref = take(refs, 2, hybrid)
        dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum, turned_k = take(refs, 7)
        (unclaimed,) = take(refs, 1, at_maximum)
        (valid_column,) = take(refs, 1, problem.masked)
        key_step, query_step = pl.program_id(2), pl.program_id(3)
        only_step = key_steps == 1  # then no dq is kept between steps, and no code depends on the key step
        first_keys, last_keys = only_step or key_step == 0, only_step or key_step == key_steps - 1
        slot = 0 if only_step else query_step

        @pl.when(query_step == 0)
        def _():
            dk_sum[...] = jnp.zeros_like(dk_sum)
            dv_sum[...] = jnp.zeros_like(dv_sum)
            k_SxD = k_ref[...]
            if problem.num_keys % keys:
                k_SxD = jnp.where(within(key_step * keys, keys, 0, problem.num_keys, 0), k_SxD, 0)
            turned_k[...] = k_SxD.T
            if problem.masked:
                valid_column[...] = jnp.broadcast_to(valid_ref[...], (LANES, keys)).T

        @pl.when(first_keys)
        def _():
            dq_sum[slot] = jnp.zeros_like(dq_sum[slot])
            if at_maximum:
                unclaimed[slot] = jnp.ones_like(unclaimed[slot])

        def backward(count):
            q_QxD, dy_QxD = q_ref[...], dy_ref[...]
            base, shift, delta = (per_query_ref[i : i + 1] for i in range(3))
            linear_Q = linear_ref[...] if hybrid else jnp.zeros_like(delta)
            if hybrid:
                linear_Q *= jnp.exp2(shift - base)
            if hybrid and not at_maximum:
                delta += linear_Q
            if problem.num_queries % queries:
                start = (query_blocks.start + query_step) * queries
                inside = within(start, queries, 0, problem.num_queries, 0)
                q_QxD, dy_QxD = jnp.where(inside, q_QxD, 0), jnp.where(inside, dy_QxD, 0)
                # Past the last query, weights are zero whatever the scores are, and so are gradients.
                inside = within(start, queries, 0, problem.num_queries, 1)
                base, delta, linear_Q = (jnp.where(inside, x, 0.0) for x in (base, delta, linear_Q))
                shift = jnp.where(inside, shift, -MASKED)
            left = unclaimed[slot] if at_maximum else jnp.ones_like(delta)
            # The forward computes the scores by products of another shape, which may round differently.
            near_base = base - 1e-5 * jnp.maximum(jnp.abs(base), 1.0)
            dq_DxQ = dq_sum[slot]
            for start in range(0, count, chunk):
                extent = min(chunk, keys - start)
                piece = pl.ds(start, extent)
                s = problem.dot(k_ref[piece, :], q_QxD, (1, 1)) * (scale * LOG2_E)
                v_SxD = v_ref[piece, :]
                if start + extent > count:
                    inside = within(start, extent, 0, count, 0)
                    s, v_SxD = jnp.where(inside, s, MASKED), jnp.where(inside, v_SxD, 0)
                if problem.masked:
                    lanes = jnp.concatenate([valid_column[piece, :]] * (queries // LANES), axis=1)
                    s = jnp.where(lanes > 0, s, MASKED)
                p = jnp.exp2(s - shift)
                mean = delta
                if at_maximum:
                    at_base = s >= near_base
                    hits = jnp.where(at_base, 1.0, 0.0).sum(axis=0, keepdims=True)
                    mean = jnp.where(at_base, delta + left * linear_Q / jnp.maximum(hits, 1.0), delta)
                    left = jnp.where(hits > 0, 0.0, left)
                ds = (p * (problem.dot(v_SxD, dy_QxD, (1, 1)) - mean)).astype(problem.dtype)
                p = p.astype(problem.dtype)
                dv_sum[piece, :] += problem.dot(p, dy_QxD)
                dk_sum[piece, :] += problem.dot(ds, q_QxD)
                dq_DxQ += problem.dot(turned_k[:, piece], ds)
            dq_sum[slot] = dq_DxQ
            if at_maximum:
                unclaimed[slot] = left

        run_with_tail(backward, key_step, key_steps, keys, tail)

        @pl.when(last_keys)
        def _():
            dq_QxD = (dq_sum[slot] * scale).T
            if hybrid:
                dq_QxD += dq_linear_ref[...].astype(jnp.float32)
            dq_ref[...] = dq_QxD.astype(dq_ref.dtype)

        @pl.when(query_step == query_steps - 1)
        def _():
            dk_ref[...] = (dk_sum[...] * scale).astype(dk_ref.dtype)
            dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    query_block = lambda j, i: query_blocks.start + i
    key_block = lambda j, i: j
    # dq is written out during the last block of keys. Before that, its window stays on the first block.
    at_last = lambda j, i: i if key_steps == 1 else jnp.where(j == key_steps - 1, i, 0)
    operands = [q, dy, per_query, k, v, *masks]
    specs = [
        problem.tokens(queries, query_block),
        problem.tokens(queries, query_block),
        query_numbers(3, queries, query_block),
        problem.tokens(keys, key_block),
        problem.tokens(keys, key_block),
        *(row(keys, key_block) for _ in masks),
    ]
    if hybrid:
        operands += [linear, dq_linear]
        specs += [
            query_numbers(1, queries, query_block),
            problem.tokens(queries, lambda j, i: query_blocks.start + at_last(j, i)),
        ]
    partial_sums = length < problem.num_queries
    dkv = jax.ShapeDtypeStruct(
        problem.packed_shape(problem.num_softmax), jnp.float32 if partial_sums else problem.dtype
    )
    f32, slots = jnp.float32, 1 if key_steps == 1 else query_steps
    scratch = [
        pltpu.VMEM((slots, width, queries), f32),
        pltpu.VMEM((keys, width), f32),
        pltpu.VMEM((keys, width), f32),
        pltpu.VMEM((width, keys), problem.dtype),
    ]
    if at_maximum:
        scratch.append(pltpu.VMEM((slots, 1, queries), f32))
    if problem.masked:
        scratch.append(pltpu.VMEM((keys, LANES), f32))
    return problem.call(
        kernel,
        "hybrid_attend_backward",
        (key_steps, query_steps),
        parallel=0,
        flops=10 * length * problem.num_softmax * width,
        exps=length * problem.num_softmax,
        in_specs=specs,
        out_specs=[
            problem.tokens(queries, at_last),
            problem.tokens(keys, key_block),
            problem.tokens(keys, key_block),
        ],
        out_shape=[jax.ShapeDtypeStruct(problem.packed_shape(length), problem.dtype), dkv, dkv],
        scratch_shapes=scratch,
    )(*operands)
