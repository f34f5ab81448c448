"""The error of hybrid attention and the gradients of phi_q and of the state, in one pass over the queries on TPU.

In tokens along lanes, with n = n_S + phi_q z and y = (n_S o_S + phi_q S) / n: the gradient of |y - t| by phi_q S is
g = sign(y - t) / n, and by phi_q z it is -g . y. Nothing but one number per query is written for a query.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.feature_map import PolynomialMap
from pallas_kernels.reference import EPSILON
from pallas_kernels.tpu_feature_map import (
    columns,
    hidden_columns,
    map_backward,
    map_flops,
    map_gradient,
    map_operands,
    map_results,
    powers,
)
from pallas_kernels.tpu_problem import LANES, Problem, lane_sums, query_numbers, row, take, whole, within, zero_at


def hybrid_error(
    problem: Problem, query_map: PolynomialMap, q, state, z, softmax, target, valid, *, with_gradients: bool
) -> tuple[jax.Array, jax.Array, Any]:
    """See `pallas_kernels.hybrid_error`.

    Args:
        q: packed.
        state, z: S [B, H, F, D] and z [B, H, F], with the scales of both maps.
        softmax: the softmax branch's output, packed, and n_S [B, N, H], both float32; or None.
        target: packed.
        valid: float32 [B, 1, N], or None.

    Returns:
        errors [B, H]; n_L [B, H, N]; and with_gradients (dS, dz, the gradients of phi_q's kernels and of its biases),
        else None.
    """
    size, features, width = problem.blocks.backward_state, state.shape[2], problem.width
    ragged = problem.num_queries % size
    operands, specs = (map_operands if with_gradients else columns)(query_map, problem.dtype)
    sums, sum_specs = map_results(query_map, problem) if with_gradients else ([], [])
    count, weights_alone = len(operands), 2 * len(query_map.kernels)

    def kernel(q_ref, target_ref, state_ref, turned_ref, z_ref, *refs):
        refs = iter(refs)
        output_ref, mass_ref = take(refs, 2, softmax is not None)
        (valid_ref,) = take(refs, 1, problem.masked)
        weights = take(refs, count)
        error_ref, linear_ref = take(refs, 2)
        dstate_ref, dz_ref = take(refs, 2, with_gradients)
        sum_refs = list(refs)
        step = pl.program_id(2)
        zero_at(step == 0, [error_ref, *([dstate_ref, dz_ref] if with_gradients else []), *sum_refs])

        q_TxD, inside = q_ref[...], None
        if ragged:  # past the last query the blocks hold anything, even NaN
            q_TxD = jnp.where(within(step * size, size, 0, problem.num_queries, 0), q_TxD, 0)
            inside = within(step * size, size, 0, problem.num_queries, 1)
        if problem.masked:
            inside = valid_ref[...] > 0 if inside is None else inside & (valid_ref[...] > 0)
        after = hidden_columns(problem, q_TxD, weights[:weights_alone])
        phi_FxT = powers(after[-1], problem.degree, 0)
        y_DxT = problem.dot(turned_ref[...], phi_FxT)
        n_1xT = n_L_1xT = (phi_FxT * z_ref[...]).sum(axis=0, keepdims=True)
        linear_ref[...] = n_L_1xT
        if softmax is None:
            n_1xT += EPSILON
        else:
            y_DxT += mass_ref[...] * output_ref[...].T
            n_1xT += mass_ref[...]
        y_DxT /= n_1xT
        gap_DxT = y_DxT - target_ref[...].astype(jnp.float32).T
        if inside is not None:
            y_DxT, gap_DxT = jnp.where(inside, y_DxT, 0.0), jnp.where(inside, gap_DxT, 0.0)
            n_1xT = jnp.where(inside, n_1xT, 1.0)
        error_ref[...] += lane_sums(jnp.abs(gap_DxT).sum(axis=0, keepdims=True))
        if with_gradients:
            # Mosaic lowers jnp.sign only where the chip is known.
            sign_DxT = jnp.where(gap_DxT > 0, 1.0, jnp.where(gap_DxT < 0, -1.0, 0.0))
            g_DxT = sign_DxT / n_1xT
            dn_1xT = -(g_DxT * y_DxT).sum(axis=0, keepdims=True)
            dstate_ref[...] += problem.dot(phi_FxT, g_DxT, (1, 1))
            dz_ref[...] += lane_sums(phi_FxT * dn_1xT)
            dphi_FxT = problem.dot(state_ref[...], g_DxT) + z_ref[...] * dn_1xT
            map_backward(problem, q_TxD, after, dphi_FxT, weights, sum_refs, inputs=False)

    block = lambda step: step
    tokens, numbers = problem.tokens(size, block), query_numbers(1, size, block)
    per_head = lambda *shape: jax.ShapeDtypeStruct((problem.batch, problem.heads, *shape), jnp.float32)
    inputs, input_specs = [], []
    if softmax is not None:
        output, mass_BxNxH = softmax
        inputs, input_specs = [output, mass_BxNxH.swapaxes(1, 2)[:, :, None]], [tokens, numbers]
    if problem.masked:
        inputs, input_specs = [*inputs, valid], [*input_specs, row(size, block)]
    of_state = [whole(features, width, per_batch=True), whole(features, LANES, per_batch=True)]
    products = 3 if with_gradients else 1
    in_dtype = state.astype(problem.dtype)
    error, n_L, *gradients = problem.call(
        kernel,
        "hybrid_error",
        (pl.cdiv(problem.num_queries, size),),
        parallel=0,
        flops=problem.num_queries * products * (map_flops(query_map) + 2 * features * width),
        exps=0,
        in_specs=[
            tokens,
            tokens,
            whole(features, width, per_batch=True),
            whole(width, features, per_batch=True),
            whole(features, 1, per_batch=True),
            *input_specs,
            *specs,
        ],
        out_specs=[whole(1, LANES, per_batch=True), numbers, *(of_state if with_gradients else []), *sum_specs],
        out_shape=[
            per_head(1, LANES),
            per_head(1, problem.num_queries),
            *([per_head(features, width), per_head(features, LANES)] if with_gradients else []),
            *sums,
        ],
    )(q, target, in_dtype, in_dtype.swapaxes(2, 3), z[..., None], *inputs, *operands)
    errors_BxH, n_L_BxHxN = error.sum(axis=(2, 3)), n_L[:, :, 0]
    if not with_gradients:
        return errors_BxH, n_L_BxHxN, None
    dstate, dz, *sums = gradients
    return errors_BxH, n_L_BxHxN, (dstate, dz.sum(axis=-1), map_gradient(query_map, sums))
