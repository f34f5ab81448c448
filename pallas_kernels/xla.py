"""Hybrid attention in chunks of queries, for any backend: differentiable, and never N x N in memory.

Each branch has a backward of its own, which recomputes all but its inputs, outputs and log-sum-exps. On CPU both loop
over heads: a tile of scores that fits the cache is several times faster there than one batched product.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.feature_map import FeatureMap
from pallas_kernels.reference import EPSILON

# Scores per head and tile, and the fewest queries of a tile, however many keys there are.
TILE = 2**19
MIN_QUERIES = 256


def hybrid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap | None,
    key_map: FeatureMap | None,
    *,
    num_softmax: int,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
) -> jax.Array:
    """Eq. 5 of Attention Surgery; see `pallas_kernels.hybrid_attention`."""
    q_BxHxNxD, k_BxHxMxD, v_BxHxMxD = (x.swapaxes(1, 2) for x in (q, k, v))
    valid_BxHxM = None if key_valid is None else jnp.broadcast_to(key_valid[:, None], k_BxHxMxD.shape[:3])
    arrays = (k_BxHxMxD, v_BxHxMxD, valid_BxHxM)
    k_S, v_S, valid_S = jax.tree.map(lambda x: x[:, :, :num_softmax], arrays)
    k_L, v_L, valid_L = jax.tree.map(lambda x: x[:, :, num_softmax:], arrays)

    if num_softmax == k.shape[1]:
        y_BxHxNxD, _ = _softmax(q_BxHxNxD, k_S, v_S, valid_S, False)
    elif num_softmax == 0:
        o_L_BxHxNxD, n_L_BxHxN = _linear((q_BxHxNxD, k_L, v_L), (query_map, key_map), valid_L)
        y_BxHxNxD = o_L_BxHxNxD / (n_L_BxHxN + EPSILON)[..., None]
    else:
        o_L_BxHxNxD, n_L_BxHxN = _linear((q_BxHxNxD, k_L, v_L), (query_map, key_map), valid_L)
        y_S_BxHxNxD, n_S_BxHxN = _softmax(q_BxHxNxD, k_S, v_S, valid_S, stabilizer == "max")
        y_BxHxNxD = (n_S_BxHxN[..., None] * y_S_BxHxNxD + o_L_BxHxNxD) / (n_S_BxHxN + n_L_BxHxN)[..., None]
    return y_BxHxNxD.swapaxes(1, 2).astype(v.dtype)


def _over(axes: int, function: Callable, *inputs):
    """`function` over the first `axes` axes of the inputs' leaves: a loop in float32 on CPU, batched elsewhere."""
    batched = function
    for _ in range(axes):
        batched = jax.vmap(batched)
    expected = jax.eval_shape(batched, *inputs)

    def looped(*inputs):
        lead = jax.tree.leaves(inputs)[0].shape[:axes]

        def flatten(x):
            x = x.reshape(-1, *x.shape[axes:])
            return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

        outs = lax.map(lambda x: function(*x), jax.tree.map(flatten, inputs))
        return jax.tree.map(lambda x, e: x.reshape(*lead, *x.shape[1:]).astype(e.dtype), outs, expected)

    return lax.platform_dependent(*inputs, cpu=looped, default=batched)


def _softmax_primal(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None, row_max: bool
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention [B, H, N, D] and its mass n_S [B, H, N]: sum exp(s - max s) with row_max, else 1; float32."""
    return _softmax_forward(q, k, v, valid, row_max)[0]


def _softmax_forward(q, k, v, valid, row_max):
    y, lse, n_S = _over(2, partial(_softmax_head, row_max=row_max), q, k, v, valid)
    return (y, n_S), (q, k, v, valid, y, lse, n_S)


def _softmax_backward(row_max, residuals, cotangents):
    q, k, v, valid, y, lse, n_S = residuals
    dy, dn_S = cotangents
    delta_BxHxN = (dy * y).sum(axis=-1)
    head = partial(_softmax_head_backward, row_max=row_max)
    dq, dk, dv = _over(2, head, q, k, v, valid, dy.astype(v.dtype), lse, delta_BxHxN, dn_S * n_S)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_softmax = jax.custom_vjp(_softmax_primal, nondiff_argnums=(4,))
_softmax.defvjp(_softmax_forward, _softmax_backward)

_dot = partial(jnp.dot, preferred_element_type=jnp.float32)


def _scores(q_CxD: jax.Array, k_SxD: jax.Array, valid_S: jax.Array | None) -> jax.Array:
    s_CxS = _dot(q_CxD, k_SxD.T) * q_CxD.shape[-1] ** -0.5
    return s_CxS if valid_S is None else jnp.where(valid_S, s_CxS, -jnp.inf)


def _softmax_head(q_NxD, k_SxD, v_SxD, valid_S, *, row_max):
    def chunk(_, rows):
        (q_CxD,) = rows
        s_CxS = _scores(q_CxD, k_SxD, valid_S)
        max_C = s_CxS.max(axis=-1)
        p_CxS = jnp.exp(s_CxS - max_C[:, None])
        sum_C = p_CxS.sum(axis=-1)
        y_CxD = _dot(p_CxS.astype(v_SxD.dtype), v_SxD) / sum_C[:, None]
        return None, (y_CxD, max_C + jnp.log(sum_C), sum_C if row_max else jnp.ones_like(sum_C))

    return _over_queries(chunk, None, (q_NxD,), k_SxD.shape[0])[1]


def _softmax_head_backward(q_NxD, k_SxD, v_SxD, valid_S, dy_NxD, lse_N, delta_N, dlog_N, *, row_max):
    """(dq, dk, dv) of one head; delta = dy . y, and dlog is the cotangent of log n_S = lse - max s."""
    scale = q_NxD.shape[-1] ** -0.5

    def chunk(sums, rows):
        q_CxD, dy_CxD, lse_C, delta_C, dlog_C = rows
        s_CxS = _scores(q_CxD, k_SxD, valid_S)
        p_CxS = jnp.exp(s_CxS - lse_C[:, None])
        dp_CxS = _dot(dy_CxD, v_SxD.T)
        if row_max:
            ds_CxS = p_CxS * (dp_CxS - (delta_C - dlog_C)[:, None])
            at_max_CxS = s_CxS == s_CxS.max(axis=-1, keepdims=True)
            ds_CxS -= at_max_CxS * (dlog_C / at_max_CxS.sum(axis=-1))[:, None]
        else:
            ds_CxS = p_CxS * (dp_CxS - delta_C[:, None])
        ds_CxS = ds_CxS.astype(k_SxD.dtype)
        dk_SxD = sums[0] + _dot(ds_CxS.T, q_CxD) * scale
        dv_SxD = sums[1] + _dot(p_CxS.astype(dy_CxD.dtype).T, dy_CxD)
        return (dk_SxD, dv_SxD), _dot(ds_CxS, k_SxD) * scale

    zeros_SxD = jnp.zeros(k_SxD.shape, jnp.float32)
    rows = (q_NxD, dy_NxD, lse_N, delta_N, dlog_N)
    (dk_SxD, dv_SxD), dq_NxD = _over_queries(chunk, (zeros_SxD, zeros_SxD), rows, k_SxD.shape[0])
    return dq_NxD, dk_SxD, dv_SxD


def _over_queries(chunk: Callable, carry, rows: tuple[jax.Array, ...], num_keys: int):
    """`lax.scan` of chunk over equal pieces of rows [N, ...], zeros after the last: scores and cotangents of 0."""
    length = rows[0].shape[0]
    chunks = -(-length // max(MIN_QUERIES, TILE // num_keys))
    if chunks == 1:
        return chunk(carry, rows)
    size = -(-length // chunks)

    def split(x):
        padding = [(0, chunks * size - length)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape((chunks, size, *x.shape[1:]))

    carry, outs = lax.scan(chunk, carry, jax.tree.map(split, rows))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], outs)


@jax.custom_vjp
def _linear(arrays: tuple, maps: tuple, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """phi_q S [B, H, N, D] and phi_q z [B, H, N] in float32, of (q, k, v) and (query_map, key_map)."""
    return _swap(_over(1, _linear_head, _swap(arrays), maps, _swap(valid)))


def _linear_forward(arrays, maps, valid):
    return _linear(arrays, maps, valid), (arrays, maps, valid)


def _linear_backward(residuals, cotangents):
    def head(arrays, maps, valid, cotangents):
        return jax.vjp(partial(_linear_head, valid_BxL=valid), arrays, maps)[1](cotangents)

    arrays, maps, valid = residuals
    d_arrays, d_maps = _over(1, head, _swap(arrays), maps, _swap(valid), _swap(cotangents))
    return _swap(d_arrays), d_maps, None


_linear.defvjp(_linear_forward, _linear_backward)


def _linear_head(arrays, maps, valid_BxL):
    (q_BxNxD, k_BxLxD, v_BxLxD), (query_map, key_map) = arrays, maps
    phi_q_BxNxF = _features(query_map, q_BxNxD)
    phi_k_BxLxF = _features(key_map, k_BxLxD)
    if valid_BxL is not None:
        phi_k_BxLxF = jnp.where(valid_BxL[..., None], phi_k_BxLxF, 0)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    state_BxFxD = einsum("blf,bld->bfd", phi_k_BxLxF, v_BxLxD)
    z_BxF = phi_k_BxLxF.sum(axis=1, dtype=jnp.float32)
    return einsum("bnf,bfd->bnd", phi_q_BxNxF, state_BxFxD), einsum("bnf,bf->bn", phi_q_BxNxF, z_BxF)


def _features(feature_map: FeatureMap, x_BxNxD: jax.Array) -> jax.Array:
    """phi of one head, whose map has lost the head axis of its leaves."""
    one_head = jax.tree.map(lambda leaf: leaf[None], feature_map)
    return one_head(x_BxNxD[:, :, None])[:, :, 0]


def _swap(tree):
    """Batch and head axes exchanged."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)
