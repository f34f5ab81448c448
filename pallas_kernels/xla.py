"""Hybrid attention in chunks of tokens, for any backend: differentiable, never N x N, nor all features, in memory.

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

# Scores, or features, per head and tile, and the fewest tokens of a tile, however many keys there are.
TILE = 2**19
MIN_TOKENS = 256


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
    q_BxHxNxD, *arrays = _heads_second(q, k, v, key_valid)
    k_S, v_S, valid_S = jax.tree.map(lambda x: x[:, :, :num_softmax], arrays)
    k_L, v_L, valid_L = jax.tree.map(lambda x: x[:, :, num_softmax:], arrays)
    state = None if num_softmax == k.shape[1] else state_of_heads(k_L, v_L, key_map, valid_L)
    return _attend(q_BxHxNxD, k_S, v_S, valid_S, query_map, state, stabilizer).swapaxes(1, 2).astype(v.dtype)


def linear_state(
    k: jax.Array, v: jax.Array, key_map: FeatureMap, *, key_valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The linear branch's S [B, H, F, D] and z [B, H, F] of keys and values [B, L, H, D]."""
    _, k_BxHxLxD, v_BxHxLxD, valid_BxHxL = _heads_second(k, k, v, key_valid)
    return state_of_heads(k_BxHxLxD, v_BxHxLxD, key_map, valid_BxHxL)


def attend_with_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap,
    state: tuple[jax.Array, jax.Array],
    *,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
) -> jax.Array:
    """Eq. 5 of softmax keys and values [B, S, H, D] and of the state of all linear ones."""
    arrays = _heads_second(q, k, v, key_valid)
    return _attend(*arrays, query_map, state, stabilizer).swapaxes(1, 2).astype(v.dtype)


def _heads_second(q, k, v, key_valid):
    q_BxHxNxD, k_BxHxMxD, v_BxHxMxD = (x.swapaxes(1, 2) for x in (q, k, v))
    valid_BxHxM = None if key_valid is None else jnp.broadcast_to(key_valid[:, None], k_BxHxMxD.shape[:3])
    return q_BxHxNxD, k_BxHxMxD, v_BxHxMxD, valid_BxHxM


def _attend(q_BxHxNxD, k_S, v_S, valid_S, query_map, state, stabilizer):
    if state is None:
        return _softmax(q_BxHxNxD, k_S, v_S, valid_S, False)[0]
    o_L_BxHxNxD, n_L_BxHxN = read_out(q_BxHxNxD, query_map, *state)
    if k_S.shape[2] == 0:
        return o_L_BxHxNxD / (n_L_BxHxN + EPSILON)[..., None]
    y_S_BxHxNxD, n_S_BxHxN = _softmax(q_BxHxNxD, k_S, v_S, valid_S, stabilizer == "max")
    return (n_S_BxHxN[..., None] * y_S_BxHxNxD + o_L_BxHxNxD) / (n_S_BxHxN + n_L_BxHxN)[..., None]


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

    return _over_chunks(chunk, None, (q_NxD,), k_SxD.shape[0])[1]


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
    (dk_SxD, dv_SxD), dq_NxD = _over_chunks(chunk, (zeros_SxD, zeros_SxD), rows, k_SxD.shape[0])
    return dq_NxD, dk_SxD, dv_SxD


def _over_chunks(chunk: Callable, carry, rows: tuple[jax.Array, ...], numbers_per_row: int):
    """`lax.scan` of chunk over equal pieces of rows [N, ...], zeros (False) after the last."""
    length = rows[0].shape[0]
    chunks = max(1, -(-length // max(MIN_TOKENS, TILE // numbers_per_row)))
    if chunks == 1:
        return chunk(carry, rows)
    size = -(-length // chunks)

    def split(x):
        padding = [(0, chunks * size - length)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape((chunks, size, *x.shape[1:]))

    carry, outs = lax.scan(chunk, carry, jax.tree.map(split, rows))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], outs)


@jax.custom_vjp
def state_of_heads(
    k: jax.Array, v: jax.Array, key_map: FeatureMap, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """S = sum phi_k^T v [B, H, F, D] and z = sum phi_k [B, H, F] in float32; k, v [B, H, L, D], valid [B, H, L]."""
    if valid is None:
        valid = jnp.ones(k.shape[:3], bool)
    return _swap(_over(1, _state_head, *_tokens_first((k, v, valid)), key_map))


def _state_forward(k, v, key_map, valid):
    return state_of_heads(k, v, key_map, valid), (k, v, key_map, valid)


def _state_backward(residuals, cotangents):
    k, v, key_map, valid = residuals
    tokens = _tokens_first((k, v, jnp.ones(k.shape[:3], bool) if valid is None else valid))
    dk_HxLxBxD, dv_HxLxBxD, d_map = _over(1, _state_head_backward, *tokens, key_map, *_swap(cotangents))
    dk, dv = _tokens_third((dk_HxLxBxD, dv_HxLxBxD))
    return dk, dv, d_map, None


state_of_heads.defvjp(_state_forward, _state_backward)


def _state_chunk(k_CxBxD, v_CxBxD, key_map, valid_CxB):
    phi_CxBxF = jnp.where(valid_CxB[..., None], _features(key_map, k_CxBxD), 0)
    state_BxFxD = jnp.einsum("cbf,cbd->bfd", phi_CxBxF, v_CxBxD, preferred_element_type=jnp.float32)
    return state_BxFxD, phi_CxBxF.sum(axis=0, dtype=jnp.float32)


def _state_head(k_LxBxD, v_LxBxD, valid_LxB, key_map):
    def chunk(sums, rows):
        k, v, valid = rows
        return jax.tree.map(jnp.add, sums, _state_chunk(k, v, key_map, valid)), None

    features = _num_features(key_map, k_LxBxD)
    batch, width = k_LxBxD.shape[1:]
    zeros = jnp.zeros((batch, features, width), jnp.float32), jnp.zeros((batch, features), jnp.float32)
    return _over_chunks(chunk, zeros, (k_LxBxD, v_LxBxD, valid_LxB), features)[0]


def _state_head_backward(k_LxBxD, v_LxBxD, valid_LxB, key_map, d_state_BxFxD, d_z_BxF):
    def chunk(d_map, rows):
        k, v, valid = rows
        _, pullback = jax.vjp(partial(_state_chunk, valid_CxB=valid), k, v, key_map)
        dk, dv, more = pullback((d_state_BxFxD, d_z_BxF))
        return jax.tree.map(jnp.add, d_map, more), (dk, dv)

    rows = (k_LxBxD, v_LxBxD, valid_LxB)
    d_map, (dk, dv) = _over_chunks(chunk, jax.tree.map(jnp.zeros_like, key_map), rows, d_z_BxF.shape[1])
    return dk, dv, d_map


@jax.custom_vjp
def read_out(q: jax.Array, query_map: FeatureMap, state: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """phi_q S [B, H, N, D] and phi_q z [B, H, N] in float32, of q [B, H, N, D] and `state_of_heads`'s S and z."""
    o_HxNxBxD, n_HxNxB = _over(1, _read_head, _tokens_first(q), query_map, *_swap((state, z)))
    return _tokens_third((o_HxNxBxD, n_HxNxB))


def _read_forward(q, query_map, state, z):
    return read_out(q, query_map, state, z), (q, query_map, state, z)


def _read_backward(residuals, cotangents):
    q, query_map, state, z = residuals
    rows = _tokens_first((q, *cotangents))
    dq_HxNxBxD, d_map, d_state, d_z = _over(1, _read_head_backward, rows, query_map, *_swap((state, z)))
    return _tokens_third(dq_HxNxBxD), d_map, *_swap((d_state, d_z))


read_out.defvjp(_read_forward, _read_backward)


def _read_chunk(q_CxBxD, query_map, state_BxFxD, z_BxF):
    phi_CxBxF = _features(query_map, q_CxBxD)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    return einsum("cbf,bfd->cbd", phi_CxBxF, state_BxFxD), einsum("cbf,bf->cb", phi_CxBxF, z_BxF)


def _read_head(q_NxBxD, query_map, state_BxFxD, z_BxF):
    def chunk(_, rows):
        (q_CxBxD,) = rows
        return None, _read_chunk(q_CxBxD, query_map, state_BxFxD, z_BxF)

    return _over_chunks(chunk, None, (q_NxBxD,), z_BxF.shape[1])[1]


def _read_head_backward(rows_NxBx, query_map, state_BxFxD, z_BxF):
    def chunk(sums, rows):
        q, do, dn = rows
        _, pullback = jax.vjp(_read_chunk, q, query_map, state_BxFxD, z_BxF)
        dq, *more = pullback((do, dn))
        return jax.tree.map(jnp.add, sums, tuple(more)), dq

    zeros = jax.tree.map(jnp.zeros_like, (query_map, state_BxFxD, z_BxF))
    sums, dq = _over_chunks(chunk, zeros, rows_NxBx, z_BxF.shape[1])
    return dq, *sums


def _features(feature_map: FeatureMap, x_CxBxD: jax.Array) -> jax.Array:
    """phi of one head, whose map has lost the head axis of its leaves."""
    one_head = jax.tree.map(lambda leaf: leaf[None], feature_map)
    return one_head(x_CxBxD[:, :, None])[:, :, 0]


def _num_features(feature_map: FeatureMap, x_CxBxD: jax.Array) -> int:
    return jax.eval_shape(_features, feature_map, x_CxBxD).shape[-1]


def _swap(tree):
    """Batch and head axes exchanged."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)


def _tokens_first(tree):
    """[B, H, N, ...] to [H, N, B, ...], which chunks of tokens take."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), tree)


def _tokens_third(tree):
    """[H, N, B, ...] to [B, H, N, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), tree)
