"""Softmax attention by XLA, in chunks of queries, with its backward; and softmax over nested prefixes of the keys."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.xla_loops import MASK, ROWS, TOKENS, dot, over, over_chunks


def _softmax_primal(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None, row_max: bool
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention [B, H, N, D] and its mass n_S [B, H, N], float32: sum exp(s - max s) with row_max, else 1.

    q [B, N, H, D], k and v [B, S, H, D], valid [B, S].
    """
    return _softmax_forward(q, k, v, valid, row_max)[0]


def _softmax_forward(q, k, v, valid, row_max):
    head = partial(_softmax_head, row_max=row_max)
    y, lse, n_S = over(head, (TOKENS, TOKENS, TOKENS, MASK), q, k, v, valid, numbers=num_scores(q, k))
    return (y, n_S), (q, k, v, valid, y, lse, n_S)


def _softmax_backward(row_max, residuals, cotangents):
    q, k, v, valid, y, lse, n_S = residuals
    dy, dn_S = cotangents
    delta_BxHxN = (dy * y).sum(axis=-1)
    head = partial(_softmax_head_backward, row_max=row_max)
    rows = (dy.astype(v.dtype), lse, delta_BxHxN, dn_S * n_S)
    axes = TOKENS, TOKENS, TOKENS, MASK, ROWS
    gradients = over(head, axes, q, k, v, valid, rows, numbers=num_scores(q, k))
    return *(d.swapaxes(1, 2).astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True)), None


softmax = jax.custom_vjp(_softmax_primal, nondiff_argnums=(4,))
softmax.defvjp(_softmax_forward, _softmax_backward)


def num_scores(q_BxNxHxD: jax.Array, k_BxSxHxD: jax.Array) -> int:
    """The number of scores of all heads."""
    return q_BxNxHxD.size // q_BxNxHxD.shape[-1] * k_BxSxHxD.shape[1]


def scores(q_CxD: jax.Array, k_SxD: jax.Array, valid_S: jax.Array | None) -> jax.Array:
    s_CxS = dot(q_CxD, k_SxD.T) * q_CxD.shape[-1] ** -0.5
    return s_CxS if valid_S is None else jnp.where(valid_S, s_CxS, -jnp.inf)


def _softmax_head(q_NxD, k_SxD, v_SxD, valid_S, *, row_max):
    def chunk(_, rows):
        (q_CxD,) = rows
        s_CxS = scores(q_CxD, k_SxD, valid_S)
        max_C = s_CxS.max(axis=-1)
        p_CxS = jnp.exp(s_CxS - max_C[:, None])
        sum_C = p_CxS.sum(axis=-1)
        y_CxD = dot(p_CxS.astype(v_SxD.dtype), v_SxD) / sum_C[:, None]
        return None, (y_CxD, max_C + jnp.log(sum_C), sum_C if row_max else jnp.ones_like(sum_C))

    return over_chunks(chunk, None, (q_NxD,), k_SxD.shape[0])[1]


def _softmax_head_backward(q_NxD, k_SxD, v_SxD, valid_S, rows, *, row_max):
    """(dq, dk, dv) of one head. `rows` are dy, lse, delta = dy . y, and the cotangent of log n_S = lse - max s."""
    scale = q_NxD.shape[-1] ** -0.5

    def chunk(sums, rows):
        q_CxD, dy_CxD, lse_C, delta_C, dlog_C = rows
        s_CxS = scores(q_CxD, k_SxD, valid_S)
        p_CxS = jnp.exp(s_CxS - lse_C[:, None])
        dp_CxS = dot(dy_CxD, v_SxD.T)
        if row_max:
            ds_CxS = p_CxS * (dp_CxS - (delta_C - dlog_C)[:, None])
            at_max_CxS = s_CxS == s_CxS.max(axis=-1, keepdims=True)
            ds_CxS -= at_max_CxS * (dlog_C / at_max_CxS.sum(axis=-1))[:, None]
        else:
            ds_CxS = p_CxS * (dp_CxS - delta_C[:, None])
        ds_CxS = ds_CxS.astype(k_SxD.dtype)
        dk_SxD = sums[0] + dot(ds_CxS.T, q_CxD) * scale
        dv_SxD = sums[1] + dot(p_CxS.astype(dy_CxD.dtype).T, dy_CxD)
        return (dk_SxD, dv_SxD), dot(ds_CxS, k_SxD) * scale

    zeros_SxD = jnp.zeros(k_SxD.shape, jnp.float32)
    (dk_SxD, dv_SxD), dq_NxD = over_chunks(chunk, (zeros_SxD, zeros_SxD), (q_NxD, *rows), k_SxD.shape[0])
    return dq_NxD, dk_SxD, dv_SxD


def zones_head(q_NxD, k_MxD, v_MxD, valid_M, *, bounds):
    def chunk(_, rows):
        (q_CxD,) = rows
        s_CxM = scores(q_CxD, k_MxD, valid_M)
        top_C, mass_C, sum_CxD = -jnp.inf, 0.0, 0.0
        zones = []
        for start, stop in zip((0, *bounds), bounds, strict=False):
            # -inf - -inf would be NaN where no key of a zone is valid.
            next_C = jnp.maximum(top_C, s_CxM[:, start:stop].max(axis=-1))
            shift_C = jnp.where(next_C == -jnp.inf, 0.0, next_C)
            p_CxS = jnp.exp(s_CxM[:, start:stop] - shift_C[:, None])
            decay_C = jnp.exp(top_C - shift_C)
            mass_C = decay_C * mass_C + p_CxS.sum(axis=-1)
            sum_CxD = decay_C[:, None] * sum_CxD + dot(p_CxS.astype(v_MxD.dtype), v_MxD[start:stop])
            top_C = next_C
            zones.append((sum_CxD / mass_C[:, None], shift_C + jnp.log(mass_C), top_C))
        return None, tuple(jnp.stack(parts, axis=1) for parts in zip(*zones, strict=True))

    return over_chunks(chunk, None, (q_NxD,), k_MxD.shape[0])[1]
