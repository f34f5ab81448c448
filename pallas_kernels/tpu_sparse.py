"""Sparse-linear attention on TPU: the public function around the kernels of `tpu_lists`, and gradients.

The backward of the linear branch is a chain of matrix products, which XLA runs in chunks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tuning, xla_sparse
from pallas_kernels.tpu_arguments import check, default_blocks, problem_of
from pallas_kernels.tpu_lists import RESIDENT, ROWS, Routed, attend_to_lists, linear_state, lists_backward
from pallas_kernels.tpu_problem import BlockSizes, Problem


def sparse_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    projection: tuple[jax.Array, jax.Array],
    lists: jax.Array,
    *,
    block_q: int,
    block_k: int,
    block_sizes: BlockSizes | None = None,
    interpret: Any = False,
    **sizes: int,
) -> jax.Array:
    """See `pallas_kernels.sparse_linear_attention`; `sizes` are fields of `Routed`.

    Raises:
        NotImplementedError: blocks that are no multiples of 16 tokens, more keys than VMEM holds, and what the other
            kernels do not support.
    """
    check(q, k, v, None, None, interpret)
    if block_q % ROWS or block_k % ROWS:
        raise NotImplementedError(
            f"implementation 'tpu': blocks must be multiples of {ROWS} tokens, found {block_q} and {block_k}"
        )
    if 2 * k.shape[1] * k.shape[-1] * k.dtype.itemsize > RESIDENT:
        raise NotImplementedError(
            f"implementation 'tpu': a head's keys and values must fit {RESIDENT // 2**20} MiB, found {k.shape[1]} keys"
        )
    block_sizes = block_sizes or default_blocks(tuning.current_chip())
    problem = problem_of(q, k, None, k.shape[1], None, "lse", block_sizes, interpret)
    return _attention(problem, Routed(block_q, block_k, lists.shape[-1], **sizes), (q, k, v), projection, lists)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(problem: Problem, routed: Routed, arrays: tuple, projection: tuple, lists: jax.Array) -> jax.Array:
    """y for q, k and v [B, N, H, D]."""
    return _run(problem, routed, arrays, projection, lists, with_stats=False)[0]


def _run(problem, routed, arrays, projection, lists, *, with_stats):
    q, k, v = (problem.pack(x) for x in arrays)
    state, z = linear_state(problem, k, v)
    projected = xla_sparse.project(state, projection[0])
    bias = projection[1].astype(jnp.float32)
    y, lse = attend_to_lists(problem, routed, q, k, v, lists, projected, z, bias, with_stats=with_stats)
    return problem.unpack(y), lse


def _forward(problem, routed, arrays, projection, lists):
    y, lse = _run(problem, routed, arrays, projection, lists, with_stats=True)
    return y, (arrays, projection, lists, y, lse)


def _backward(problem, routed, residuals, dy):
    arrays, projection, lists, y, lse = residuals
    linear_BxHxNxD, pullback = jax.vjp(xla_sparse.linear_branch, *arrays, projection)
    as_heads = lambda x: x.astype(jnp.float32).swapaxes(1, 2)
    *linear_gradients, d_projection = pullback(as_heads(dy))
    delta_BxHxN = (as_heads(dy) * (as_heads(y) - linear_BxHxNxD)).sum(axis=-1)
    blocks = lists.shape[2]
    delta = jnp.pad(delta_BxHxN, ((0, 0), (0, 0), (0, blocks * routed.block_q - problem.num_queries)))
    delta = delta.reshape(*delta.shape[:2], blocks, routed.block_q)
    q, k, v, dy = (problem.pack(x) for x in (*arrays, dy))
    gradients = lists_backward(problem, routed, q, k, v, lists, dy, lse, delta)
    d_arrays = (problem.unpack(a) + b.astype(a.dtype) for a, b in zip(gradients, linear_gradients, strict=True))
    return tuple(d_arrays), d_projection, None


_attention.defvjp(_forward, _backward)
