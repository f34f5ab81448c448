"""Softmax attention to chosen blocks of keys by XLA, in chunks of query blocks, and the linear branch beside it."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.feature_map import SoftmaxMap
from pallas_kernels.reference import SPARSE_EPSILON
from pallas_kernels.xla_linear import read_out, summarize
from pallas_kernels.xla_loops import ROWS, TOKENS, over, over_chunks

Blocks = tuple[int, int]  # tokens of a block of queries, and of keys


def _primal(q: jax.Array, k: jax.Array, v: jax.Array, lists: jax.Array, blocks: Blocks) -> jax.Array:
    """Softmax attention [B, H, N, D], float32, of each query block to the key blocks that `lists` names.

    q, k and v [B, N, H, D], lists [B, H, query blocks, top-k]; blocks are those of queries and of keys, in tokens. The
    gradients are those at these lists.
    """
    return _forward(q, k, v, lists, blocks)[0]


def _forward(q, k, v, lists, blocks):
    head = partial(_head, blocks=blocks)
    y, lse = over(head, (TOKENS, TOKENS, TOKENS, ROWS), q, k, v, lists, numbers=_num_scores(lists, blocks))
    return y, (q, k, v, lists, y, lse)


def _backward(blocks, residuals, dy):
    q, k, v, lists, y, lse = residuals
    rows = dy.astype(v.dtype), lse, (dy * y).sum(axis=-1)
    head, axes = partial(_head_backward, blocks=blocks), (TOKENS, TOKENS, TOKENS, ROWS, ROWS)
    gradients = over(head, axes, q, k, v, lists, rows, numbers=_num_scores(lists, blocks))
    return *(d.swapaxes(1, 2).astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True)), None


def block_sparse_lse(q: jax.Array, k: jax.Array, v: jax.Array, lists: jax.Array, blocks: Blocks) -> jax.Array:
    """The log-sum-exp [B, H, N], float32, of the scores that `block_sparse_softmax` weighs. No gradients."""
    return _forward(q, k, v, lists, blocks)[1][-1]


block_sparse_softmax = jax.custom_vjp(_primal, nondiff_argnums=(4,))
block_sparse_softmax.defvjp(_forward, _backward)


def add_linear(
    y_BxHxNxD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, projection: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """[B, N, H, D] in v's dtype: y plus the projected linear attention to all keys."""
    return (y_BxHxNxD + linear_branch(q, k, v, projection)).swapaxes(1, 2).astype(v.dtype)


def linear_branch(q: jax.Array, k: jax.Array, v: jax.Array, projection: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Proj(phi_q S / (1e-5 + phi_q z)) [B, H, N, D], float32, for S and z of all keys.

    The projection's kernel is applied to S, which has far fewer rows than there are queries.
    """
    kernel, bias = projection
    return linear_attention(q, k, v, kernel) + bias.astype(jnp.float32)[None, None, None]


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array, kernel_DxD: jax.Array | None = None) -> jax.Array:
    """phi_q S / (1e-5 + phi_q z) [B, H, N, D], float32, times the kernel if one is given."""
    phi = SoftmaxMap()
    state, z = summarize(k, v, phi, jnp.ones(k.shape[:2], bool))
    o_BxHxNxD, n_BxHxN = read_out(q, phi, state if kernel_DxD is None else project(state, kernel_DxD), z)
    return o_BxHxNxD / (SPARSE_EPSILON + n_BxHxN)[..., None]


def project(state_BxHxFxD: jax.Array, kernel_DxD: jax.Array) -> jax.Array:
    """The state that reads out projected values."""
    kernel_DxD = kernel_DxD.astype(jnp.float32)
    return jnp.einsum("bhfd,de->bhfe", state_BxHxFxD, kernel_DxD, precision=jax.lax.Precision.HIGHEST)


def _num_scores(lists: jax.Array, blocks: Blocks) -> int:
    return lists.size * blocks[0] * blocks[1]


def _in_blocks(x_NxD: jax.Array, size: int) -> jax.Array:
    """[N, ...] -> [blocks, size, ...], with zeros after the last token."""
    padding = [(0, -x_NxD.shape[0] % size)] + [(0, 0)] * (x_NxD.ndim - 1)
    return jnp.pad(x_NxD, padding).reshape(-1, size, *x_NxD.shape[1:])


_batched = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(q_CxQxD, k_JxKxD, list_CxT, length: int):
    """Scores [C, Q, T*K], and the keys they belong to [C, T*K, D]; -inf at keys from `length` on."""
    blocks, size, width = k_JxKxD.shape
    k_CxSxD = k_JxKxD[list_CxT].reshape(q_CxQxD.shape[0], -1, width)
    s_CxQxS = _batched("cqd,csd->cqs", q_CxQxD, k_CxSxD) * width**-0.5
    if length < blocks * size:
        token_CxS = (list_CxT[..., None] * size + jnp.arange(size)[None, None]).reshape(k_CxSxD.shape[:2])
        s_CxQxS = jnp.where(token_CxS[:, None] < length, s_CxQxS, -jnp.inf)
    return s_CxQxS, k_CxSxD


def _head(q_NxD, k_MxD, v_MxD, list_IxT, *, blocks: Blocks):
    k_JxKxD, v_JxKxD = (_in_blocks(x, blocks[1]) for x in (k_MxD, v_MxD))

    def chunk(_, rows):
        q_CxQxD, list_CxT = rows
        s_CxQxS, k_CxSxD = _scores(q_CxQxD, k_JxKxD, list_CxT, k_MxD.shape[0])
        max_CxQ = s_CxQxS.max(axis=-1)
        p_CxQxS = jnp.exp(s_CxQxS - max_CxQ[..., None])
        sum_CxQ = p_CxQxS.sum(axis=-1)
        v_CxSxD = v_JxKxD[list_CxT].reshape(k_CxSxD.shape)
        y_CxQxD = _batched("cqs,csd->cqd", p_CxQxS.astype(v_MxD.dtype), v_CxSxD) / sum_CxQ[..., None]
        return None, (y_CxQxD, max_CxQ + jnp.log(sum_CxQ))

    rows = _in_blocks(q_NxD, blocks[0]), list_IxT
    _, outs = over_chunks(chunk, None, rows, _scores_per_row(list_IxT, blocks), fewest_rows=1)
    return jax.tree.map(partial(_tokens, length=q_NxD.shape[0]), outs)


def _head_backward(q_NxD, k_MxD, v_MxD, list_IxT, rows, *, blocks: Blocks):
    """(dq, dk, dv) of one head. `rows` are dy, lse and delta = dy . y."""
    scale = q_NxD.shape[-1] ** -0.5
    k_JxKxD, v_JxKxD = (_in_blocks(x, blocks[1]) for x in (k_MxD, v_MxD))

    def chunk(sums, rows):
        q_CxQxD, list_CxT, dy_CxQxD, lse_CxQ, delta_CxQ = rows
        s_CxQxS, k_CxSxD = _scores(q_CxQxD, k_JxKxD, list_CxT, k_MxD.shape[0])
        p_CxQxS = jnp.exp(s_CxQxS - lse_CxQ[..., None])
        dp_CxQxS = _batched("cqd,csd->cqs", dy_CxQxD, v_JxKxD[list_CxT].reshape(k_CxSxD.shape))
        ds_CxQxS = (p_CxQxS * (dp_CxQxS - delta_CxQ[..., None]) * scale).astype(k_MxD.dtype)
        added = (
            _batched("cqs,cqd->csd", weights, x).reshape(*list_CxT.shape, *k_JxKxD.shape[1:])
            for weights, x in ((ds_CxQxS, q_CxQxD), (p_CxQxS.astype(dy_CxQxD.dtype), dy_CxQxD))
        )
        sums = tuple(x.at[list_CxT].add(more) for x, more in zip(sums, added, strict=True))
        return sums, _batched("cqs,csd->cqd", ds_CxQxS, k_CxSxD)

    zeros = jnp.zeros(k_JxKxD.shape, jnp.float32)
    dy, lse, delta = (_in_blocks(x, blocks[0]) for x in rows)
    rows = _in_blocks(q_NxD, blocks[0]), list_IxT, dy, lse, delta
    numbers = _scores_per_row(list_IxT, blocks)
    (dk, dv), dq_IxQxD = over_chunks(chunk, (zeros, zeros), rows, numbers, fewest_rows=1)
    return _tokens(dq_IxQxD, q_NxD.shape[0]), *(_tokens(x, k_MxD.shape[0]) for x in (dk, dv))


def _scores_per_row(list_IxT, blocks: Blocks) -> int:
    return list_IxT.shape[1] * blocks[0] * blocks[1]


def _tokens(x_IxQx: jax.Array, length: int) -> jax.Array:
    """[blocks, size, ...] -> [length, ...]."""
    return x_IxQx.reshape(-1, *x_IxQx.shape[2:])[:length]
