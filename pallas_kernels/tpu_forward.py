"""Forward of hybrid attention on TPU: a kernel for the state of the linear keys, and flash attention that reads it out.

`summarize` runs over the suffix of K and V, computes phi itself, and returns S = sum phi(k)^T v and z = sum phi(k).
`attend` runs over the prefix. In the last key step of each query block it computes phi(q), reads S and z, and combines
the branches, so that neither branch's output is written to memory. Row maxima and sums are replicated over lanes, where
broadcasting them is free.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.feature_map import PolynomialMap
from pallas_kernels.reference import EPSILON
from pallas_kernels.tpu_feature_map import columns, features_rows, hidden_columns, map_flops, powers, rows
from pallas_kernels.tpu_problem import (
    LANES,
    LOG2_E,
    MASKED,
    Problem,
    lane_sums,
    row,
    run_with_tail,
    take,
    whole,
    within,
)


def add_tile(
    problem: Problem, s_QxS: jax.Array, v_SxD: jax.Array, peak: jax.Array, total: jax.Array, o_QxD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest score, sum of weights (each [Q, 128]) and weighted values after one more tile of scores in log 2."""
    peak_next = jnp.maximum(peak, s_QxS.max(axis=1, keepdims=True))
    p_QxS = jnp.exp2(s_QxS - jnp.concatenate([peak_next] * (s_QxS.shape[1] // LANES), axis=1))
    decay = jnp.exp2(peak - peak_next)
    values_QxD, sums = problem.weigh(p_QxS, v_SxD)
    return peak_next, decay * total + sums, decay[:, : problem.width] * o_QxD + values_QxD


def summarize(problem: Problem, key_map: PolynomialMap, k, v, valid) -> tuple[jax.Array, jax.Array]:
    """S [B, H, F, D] and z [B, H, F] of the linear keys, float32, without phi's scale; k and v are packed."""
    size = problem.blocks.state
    first = problem.num_softmax // size
    steps = pl.cdiv(problem.num_keys, size) - first
    weights, weight_specs = columns(key_map, problem.dtype)
    features = key_map.biases[-1].shape[-1]
    ragged = problem.num_softmax % size or problem.num_keys % size

    def kernel(k_ref, v_ref, *refs):
        *inputs, state_ref, z_ref, lanes_ref = refs
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            state_ref[...] = jnp.zeros_like(state_ref)
            lanes_ref[...] = jnp.zeros_like(lanes_ref)

        psi_FxT = hidden_columns(problem, k_ref[...], inputs[: len(weights)])[-1]
        phi_FxT = powers(psi_FxT, problem.degree, 0)
        v_TxD = v_ref[...]
        if ragged:
            start = (first + step) * size
            phi_FxT = jnp.where(within(start, size, problem.num_softmax, problem.num_keys, 1), phi_FxT, 0.0)
            v_TxD = jnp.where(within(start, size, 0, problem.num_keys, 0), v_TxD, 0)
        if problem.masked:
            phi_FxT = jnp.where(inputs[-1][...] > 0, phi_FxT, 0.0)
        state_ref[...] += problem.dot(phi_FxT, v_TxD)
        lanes_ref[...] += lane_sums(phi_FxT)

        @pl.when(step == steps - 1)
        def _():
            z_ref[...] = lanes_ref[...].T.sum(axis=0, keepdims=True)

    block = lambda step: first + step
    masks = [valid] if problem.masked else []
    state, z = problem.call(
        kernel,
        "hybrid_state",
        (steps,),
        parallel=0,
        flops=problem.num_linear * (map_flops(key_map) + 2 * features * problem.width),
        exps=0,
        in_specs=[
            problem.tokens(size, block),
            problem.tokens(size, block),
            *weight_specs,
            *(row(size, block) for _ in masks),
        ],
        out_specs=[whole(features, problem.width, per_batch=True), whole(1, features, per_batch=True)],
        out_shape=[
            jax.ShapeDtypeStruct((problem.batch, problem.heads, features, problem.width), jnp.float32),
            jax.ShapeDtypeStruct((problem.batch, problem.heads, 1, features), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((features, LANES), jnp.float32)],
    )(k, v, *weights, *masks)
    return state, z[:, :, 0]


def attend(
    problem: Problem, query_map: PolynomialMap | None, q, k, v, valid, state, z, *, with_stats: bool
) -> tuple[jax.Array, jax.Array | None]:
    """y, packed, and with_stats what the backward needs: base and shift of every query, float32 [B, H, 2, N].

    With scores s in units of log 2, the weight of key j for query i is exp2(s_ij - shift_i), and exp2(shift - base) is
    eq. 5's denominator. base is c_i in a hybrid. In full softmax and pure linear attention its value does not matter.
    """
    queries, keys, chunk = problem.blocks.query, problem.blocks.key, problem.blocks.key_chunk
    key_steps = pl.cdiv(problem.num_softmax, keys)
    tail = problem.num_softmax - (key_steps - 1) * keys
    scale = problem.width**-0.5 * LOG2_E
    linear, softmax = query_map is not None, problem.num_softmax > 0
    features = 0 if query_map is None else query_map.biases[-1].shape[-1]

    def kernel(*refs):
        refs = iter(refs)
        (q_ref,) = take(refs, 1)
        k_ref, v_ref = take(refs, 2, softmax)
        (valid_ref,) = take(refs, 1, softmax and problem.masked)
        weight_refs = take(refs, len(weights))
        state_ref, z_ref = take(refs, 2, linear)
        (y_ref,) = take(refs, 1)
        (stats_ref,) = take(refs, 1, with_stats)
        max_ref, sum_ref, out_ref = take(refs, 3, softmax)
        step = pl.program_id(3)
        first, last = key_steps < 2 or step == 0, key_steps < 2 or step == key_steps - 1

        def attend_to(count):
            q_QxD = q_ref[...]
            peak, total, o = max_ref[...], sum_ref[...], out_ref[...]
            for start in range(0, count, chunk):
                size = min(chunk, keys - start)
                piece = pl.ds(start, size)
                s = problem.dot(q_QxD, k_ref[piece, :], (1, 1)) * scale
                v_SxD = v_ref[piece, :]
                if start + size > count:
                    s = jnp.where(within(start, size, 0, count, 1), s, MASKED)
                    v_SxD = jnp.where(within(start, size, 0, count, 0), v_SxD, 0)
                if problem.masked:
                    s = jnp.where(valid_ref[:, piece] > 0, s, MASKED)
                peak, total, o = add_tile(problem, s, v_SxD, peak, total, o)
            max_ref[...], sum_ref[...], out_ref[...] = peak, total, o

        if softmax:

            @pl.when(first)
            def _():
                max_ref[...] = jnp.full_like(max_ref, MASKED)
                sum_ref[...] = jnp.zeros_like(sum_ref)
                out_ref[...] = jnp.zeros_like(out_ref)

            run_with_tail(attend_to, step, key_steps, keys, tail)

        @pl.when(last)
        def _():
            num, den = jnp.zeros((queries, problem.width), jnp.float32), jnp.full((queries, 1), EPSILON)
            base = jnp.zeros((queries, LANES), jnp.float32)
            if softmax:
                num, den, base = out_ref[...], sum_ref[...].sum(axis=1, keepdims=True), max_ref[...]
                if problem.stabilizer == "lse" and linear:
                    num, den, base = num / den, jnp.ones_like(den), base + jnp.log2(den)
            if linear:
                phi_QxF = features_rows(problem, q_ref[...], weight_refs)
                num += problem.dot(phi_QxF, state_ref[...])
                den += (phi_QxF * z_ref[...]).sum(axis=1, keepdims=True)
            y_ref[...] = (num / den).astype(y_ref.dtype)
            if with_stats:
                first_lane = lax.broadcasted_iota(jnp.int32, base.shape, 1) == 0
                stats_ref[...] = jnp.where(first_lane, base, base + jnp.log2(den)).T[:2]

    weights, weight_specs = rows(query_map, problem.dtype) if query_map is not None else ([], [])
    operands, specs = [q], [problem.tokens(queries, lambda i, j: i)]
    if softmax:
        operands += [k, v]
        specs += [problem.tokens(keys, lambda i, j: j)] * 2
        if problem.masked:
            operands.append(valid)
            specs.append(row(keys, lambda i, j: j))
    operands, specs = operands + weights, specs + weight_specs
    if linear:
        operands += [state.astype(problem.dtype), z[:, :, None]]
        specs += [whole(features, problem.width, per_batch=True), whole(1, features, per_batch=True)]
    out_specs = [problem.tokens(queries, lambda i, j: i)]
    out_shape = [jax.ShapeDtypeStruct(problem.packed_shape(problem.num_queries), problem.dtype)]
    if with_stats:
        out_specs.append(pl.BlockSpec((None, None, 2, queries), lambda b, h, i, j: (b, h, 0, i)))
        out_shape.append(jax.ShapeDtypeStruct((problem.batch, problem.heads, 2, problem.num_queries), jnp.float32))
    per_query = 4 * problem.num_softmax * problem.width
    if query_map is not None:
        per_query += map_flops(query_map) + 2 * features * (problem.width + 1)
    lanes = pltpu.VMEM((queries, LANES), jnp.float32)
    y, *stats = problem.call(
        kernel,
        "hybrid_attend",
        (pl.cdiv(problem.num_queries, queries), max(key_steps, 1)),
        parallel=1,
        flops=problem.num_queries * per_query,
        exps=problem.num_queries * problem.num_softmax,
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[lanes, lanes, pltpu.VMEM((queries, problem.width), jnp.float32)] if softmax else [],
    )(*operands)
    return y, stats[0] if stats else None
