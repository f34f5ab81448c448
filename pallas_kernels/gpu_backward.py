"""Backward of the softmax branch on GPUs: a flash kernel for the queries and one for the prefix's keys and values."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.gpu_forward import (
    Options,
    as_mask,
    attended_keys,
    block_range,
    call_kernel,
    dot,
    head_spec,
    head_specs,
    input_specs,
    load_rows,
    nbytes,
    scores,
    store_rows,
)


def head_dot(x_BxNxHxD: jax.Array, y_BxNxHxD: jax.Array) -> jax.Array:
    """The dot products of x and y over channels, [B, H, N] in float32."""
    return jnp.einsum("bnhd,bnhd->bhn", x_BxNxHxD, y_BxNxHxD.astype(jnp.float32))


def softmax_backward(options: Options, q, k, v, valid, dy, lse, delta, tops):
    """Cotangents of q and of the prefix of k and v. `dy` is the cotangent of the softmax branch's output.

    `tops` are, for every query, the key with the largest score and the cotangent of log n_S, which goes to that score;
    None if c_i has no gradient of its own.
    """
    batch, num_queries, heads, width = q.shape
    num_softmax, block = options.num_softmax, options.blocks.backward
    per_row = (lse, delta, tops)
    arguments = (q, k, v, as_mask(valid), dy, per_row)
    in_specs = (*input_specs(q, k, v, arguments[3]), head_spec(dy, "bnhd"), head_specs(per_row, "bhn"))
    dq = jax.ShapeDtypeStruct(q.shape, q.dtype)
    dk = dv = jax.ShapeDtypeStruct((batch, num_softmax, heads, width), k.dtype)
    pairs = batch * heads * num_queries * num_softmax
    moved = nbytes((q, dy, per_row)) + nbytes((dk, dv))

    def call(kernel: Callable, length: int, outs, matmuls: int):
        return call_kernel(
            partial(kernel, options=options),
            (pl.cdiv(length, block), heads, batch),
            arguments,
            in_specs,
            outs,
            head_specs(outs, "bnhd"),
            pl.CostEstimate(
                flops=2 * matmuls * pairs * width, transcendentals=pairs, bytes_accessed=moved + nbytes(outs)
            ),
            options.interpret,
        )

    (dq,) = call(query_gradient_kernel, num_queries, (dq,), 3)
    return dq, *call(key_gradient_kernel, num_softmax, (dk, dv), 4)


def query_gradient_kernel(q_ref, k_ref, v_ref, valid_ref, dy_ref, per_row_ref, dq_ref, *, options: Options):
    (num_queries, width), block = q_ref.shape, options.blocks.backward
    rows, in_range = block_range(pl.program_id(0), block, num_queries)
    q, dy, per_row = _load_queries(q_ref, dy_ref, per_row_ref, rows, in_range)

    def tile(number, dq):
        keys, attended = block_range(number, block, options.num_softmax)
        k, v = load_rows(k_ref, keys, attended), load_rows(v_ref, keys, attended)
        attended = attended_keys(valid_ref, keys, attended)
        _, ds = _tile_gradient(q, k, v, dy, per_row, attended, number * block)
        return dq + dot(ds.astype(k.dtype), k)

    dq = lax.fori_loop(0, pl.cdiv(options.num_softmax, block), tile, jnp.zeros(q.shape, jnp.float32))
    store_rows(dq_ref, rows, in_range, dq * width**-0.5)


def key_gradient_kernel(q_ref, k_ref, v_ref, valid_ref, dy_ref, per_row_ref, dk_ref, dv_ref, *, options: Options):
    (num_queries, width), block = q_ref.shape, options.blocks.backward
    number = pl.program_id(0)
    keys, in_range = block_range(number, block, options.num_softmax)
    k, v = load_rows(k_ref, keys, in_range), load_rows(v_ref, keys, in_range)
    attended = attended_keys(valid_ref, keys, in_range)

    def tile(queries, sums):
        rows, exist = block_range(queries, block, num_queries)
        q, dy, per_row = _load_queries(q_ref, dy_ref, per_row_ref, rows, exist)
        p, ds = _tile_gradient(q, k, v, dy, per_row, attended, number * block)
        dk = sums[0] + dot(ds.astype(q.dtype), q, trans_a=True)
        return dk, sums[1] + dot(p.astype(dy.dtype), dy, trans_a=True)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, pl.cdiv(num_queries, block), tile, (zeros, zeros))
    store_rows(dk_ref, keys, in_range, dk * width**-0.5)
    store_rows(dv_ref, keys, in_range, dv)


def _tile_gradient(q, k, v, dy, per_row, attended, first_key):
    """Softmax weights and the scores' cotangent of one tile. Queries past the end are zero; so is their cotangent."""
    lse, delta, tops = per_row
    p = jnp.exp2(scores(q, k, attended) - lse[:, None])
    ds = p * (dot(dy, v, trans_b=True) - delta[:, None])
    if tops is not None:
        top, d_log_mass = tops
        is_top = lax.broadcasted_iota(jnp.int32, p.shape, 1) + first_key == top[:, None]
        ds -= jnp.where(is_top, d_log_mass[:, None], 0.0)
    return p, ds


def _load_queries(q_ref, dy_ref, per_row_ref, rows, in_range):
    load = lambda ref: triton.load(ref.at[rows], mask=in_range, other=0)
    return load_rows(q_ref, rows, in_range), load_rows(dy_ref, rows, in_range), jax.tree.map(load, per_row_ref)
