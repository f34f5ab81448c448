"""Block-sparse softmax on GPUs: flash attention of a block of queries to the key blocks of its list, and its backward.

The kernel for the keys' gradients needs the lists the other way round: for each key block, the query blocks that have
it in theirs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.gpu_backward import head_dot
from pallas_kernels.gpu_forward import (
    MASKED,
    add_tile,
    block_range,
    call_kernel,
    dot,
    head_spec,
    input_specs,
    load_rows,
    nbytes,
    scores,
    store_rows,
)


class Routed(NamedTuple):
    """The static arguments of one call."""

    block_q: int
    block_k: int
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sparse_softmax(routed: Routed, q: jax.Array, k: jax.Array, v: jax.Array, lists: jax.Array) -> jax.Array:
    """[B, N, H, D] for q, k and v [B, N, H, D], and lists [B, H, query blocks, top-k]."""
    return _forward(routed, q, k, v, lists)[0]


def _forward(routed, q, k, v, lists):
    batch, num_queries, heads, _ = q.shape
    outs = {"y": q, "lse": jax.ShapeDtypeStruct((batch, heads, num_queries), jnp.float32)}
    found = _call(sparse_attention_kernel, routed, lists.shape[2], (q, k, v, lists), outs, products=2)
    return found["y"], (q, k, v, lists, found["y"], found["lse"])


def _backward(routed, residuals, dy):
    q, k, v, lists, y, lse = residuals
    per_row = lse, head_dot(dy.astype(jnp.float32), y)
    arguments = q, k, v, lists, dy.astype(v.dtype), per_row
    found = _call(sparse_query_gradient_kernel, routed, lists.shape[2], arguments, {"dq": q}, products=3)
    key_blocks = -(-k.shape[1] // routed.block_k)
    arguments = q, k, v, inverse(lists, key_blocks), dy.astype(v.dtype), per_row
    found |= _call(sparse_key_gradient_kernel, routed, key_blocks, arguments, {"dk": k, "dv": v}, products=4)
    return found["dq"], found["dk"], found["dv"], None


sparse_softmax.defvjp(_forward, _backward)


def inverse(lists: jax.Array, key_blocks: int) -> tuple[jax.Array, jax.Array]:
    """For lists [B, H, query blocks, top-k]: the query blocks of key block 0, then those of 1, and so on, [B, H, X],
    and where each key block's begin, [B, H, key blocks + 1]."""
    batch, heads, _, top_k = lists.shape
    flat = lists.reshape(batch, heads, -1)
    order = jnp.argsort(flat, axis=-1, stable=True)
    ends = jnp.arange(key_blocks + 1, dtype=flat.dtype)
    begins = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, ends)))(jnp.sort(flat, axis=-1))
    return (order // top_k).astype(jnp.int32), begins.astype(jnp.int32)


def _call(
    kernel: Callable, routed: Routed, programs: int, arguments: tuple, outs: dict[str, Any], products: int
) -> dict[str, Any]:
    q, k, v, lists, *rest = arguments
    batch, _, heads, width = q.shape
    entries = (lists[0] if isinstance(lists, tuple) else lists).size
    pairs = entries * routed.block_q * routed.block_k
    specs: list[Any] = [*input_specs(q, k, v), jax.tree.map(_spec_of_lists, lists)]
    specs += [jax.tree.map(_spec_of_rows, x) for x in rest]
    outs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outs)
    return call_kernel(
        partial(kernel, routed=routed),
        (programs, heads, batch),
        arguments,
        tuple(specs),
        outs,
        jax.tree.map(_spec_of_rows, outs),
        pl.CostEstimate(
            flops=2 * products * pairs * width,
            transcendentals=pairs,
            bytes_accessed=nbytes((q, lists, rest, outs)) + 2 * entries * routed.block_k * width * k.dtype.itemsize,
        ),
        routed.interpret,
    )


def _spec_of_lists(x) -> pl.BlockSpec:
    return head_spec(x, "bh" + "." * (x.ndim - 2))


def _spec_of_rows(x) -> pl.BlockSpec:
    return head_spec(x, "bnhd" if x.ndim == 4 else "bhn")


def sparse_attention_kernel(q_ref, k_ref, v_ref, list_ref, outs, *, routed: Routed):
    number = pl.program_id(0)
    rows, in_range = block_range(number, routed.block_q, q_ref.shape[0])
    q = load_rows(q_ref, rows, in_range)

    def tile(entry, carry):
        _, k, v, exist = _key_block(k_ref, v_ref, list_ref[number, entry], routed)
        return add_tile(scores(q, k, exist), v, *carry)

    n = jnp.zeros(in_range.shape, jnp.float32)
    start = jnp.zeros(q.shape, jnp.float32), n, jnp.full_like(n, MASKED)
    o, n, highest = lax.fori_loop(0, list_ref.shape[1], tile, start)
    store_rows(outs["y"], rows, in_range, o / n[:, None])
    triton.store(outs["lse"].at[rows], highest + jnp.log2(n), mask=in_range)


def sparse_query_gradient_kernel(q_ref, k_ref, v_ref, list_ref, dy_ref, per_row_ref, outs, *, routed: Routed):
    number = pl.program_id(0)
    rows, in_range, *queries = _query_block(q_ref, dy_ref, per_row_ref, number, routed)

    def tile(entry, dq):
        _, k, v, exist = _key_block(k_ref, v_ref, list_ref[number, entry], routed)
        _, ds = _tile_gradient(k, v, exist, *queries)
        return dq + dot(ds.astype(k.dtype), k)

    dq = lax.fori_loop(0, list_ref.shape[1], tile, jnp.zeros(queries[0].shape, jnp.float32))
    store_rows(outs["dq"], rows, in_range, dq * q_ref.shape[1] ** -0.5)


def sparse_key_gradient_kernel(q_ref, k_ref, v_ref, inverse_refs, dy_ref, per_row_ref, outs, *, routed: Routed):
    number = pl.program_id(0)
    query_blocks_ref, begins_ref = inverse_refs
    keys, k, v, exist = _key_block(k_ref, v_ref, number, routed)

    def tile(entry, sums):
        _, _, *queries = _query_block(q_ref, dy_ref, per_row_ref, query_blocks_ref[entry], routed)
        p, ds = _tile_gradient(k, v, exist, *queries)
        dk = sums[0] + dot(ds.astype(k.dtype), queries[0], trans_a=True)
        return dk, sums[1] + dot(p.astype(v.dtype), queries[1], trans_a=True)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(begins_ref[number], begins_ref[number + 1], tile, (zeros, zeros))
    store_rows(outs["dk"], keys, exist, dk * k.shape[1] ** -0.5)
    store_rows(outs["dv"], keys, exist, dv)


def _key_block(k_ref, v_ref, number, routed: Routed):
    """(slice, k, v, which of the keys exist) of a key block."""
    keys, exist = block_range(number, routed.block_k, k_ref.shape[0])
    return keys, load_rows(k_ref, keys, exist), load_rows(v_ref, keys, exist), exist


def _query_block(q_ref, dy_ref, per_row_ref, number, routed: Routed):
    """(slice, which of the queries exist, q, dy, log-sum-exps, delta) of a query block; zeros past the end."""
    rows, exist = block_range(number, routed.block_q, q_ref.shape[0])
    numbers = (triton.load(ref.at[rows], mask=exist, other=0.0) for ref in per_row_ref)
    return rows, exist, load_rows(q_ref, rows, exist), load_rows(dy_ref, rows, exist), *numbers


def _tile_gradient(k, v, exist, q, dy, lse, delta):
    """Softmax weights and the scores' cotangent, scale aside."""
    p = jnp.exp2(scores(q, k, exist) - lse[:, None])
    return p, p * (dot(dy, v, trans_b=True) - delta[:, None])
