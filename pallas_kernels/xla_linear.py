"""The linear branch by XLA, in chunks of tokens: its state, the read-out of the state, and their backwards."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.feature_map import FeatureMap
from pallas_kernels.xla_loops import (
    HEAD_OF_MAP,
    HEAD_OF_MASK,
    HEAD_OF_ROWS,
    HEAD_OF_TOKENS,
    as_tokens,
    dot,
    over,
    over_chunks,
    over_examples,
    swap,
)


@jax.custom_vjp
def summarize(k: jax.Array, v: jax.Array, key_map: FeatureMap, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """S = sum phi_k^T v [B, H, F, D] and z = sum phi_k [B, H, F], float32, for k, v [B, L, H, D] and valid [B, L]."""
    return swap(over(_state_head, STATE_AXES, k, v, valid, key_map, numbers=num_features(key_map, k)))


STATE_AXES = (HEAD_OF_TOKENS, HEAD_OF_TOKENS, HEAD_OF_MASK, HEAD_OF_MAP)


def _state_forward(k, v, key_map, valid):
    return summarize(k, v, key_map, valid), (k, v, key_map, valid)


def _state_backward(residuals, cotangents):
    k, v, key_map, valid = residuals
    axes = (*STATE_AXES, HEAD_OF_ROWS)
    inputs = k, v, valid, key_map, cotangents
    dk_HxLxBxD, dv_HxLxBxD, d_map = over(_state_head_backward, axes, *inputs, numbers=num_features(key_map, k))
    return as_tokens(dk_HxLxBxD), as_tokens(dv_HxLxBxD), d_map, None


summarize.defvjp(_state_forward, _state_backward)


def _state_chunk(k_CxBxD, v_CxBxD, key_map, valid_CxB):
    phi_CxBxF = jnp.where(valid_CxB[..., None], features_of(key_map, k_CxBxD), 0)
    return lax.platform_dependent(phi_CxBxF, v_CxBxD, cpu=_sums_in_one_product, default=_sums)


def _sums(phi_CxBxF, v_CxBxD):
    state_BxFxD = over_examples(lambda phi, v: dot(phi.T, v), (1, 1), 0, phi_CxBxF, v_CxBxD)
    return state_BxFxD, phi_CxBxF.sum(axis=0, dtype=jnp.float32)


def _sums_in_one_product(phi_CxBxF, v_CxBxD):
    """A CPU reads features again for z, unless z is one more column of S. Other chips have no room for odd columns."""
    v_and_ones = jnp.concatenate([v_CxBxD, jnp.ones_like(v_CxBxD[..., :1])], axis=-1)
    sums = over_examples(lambda phi, v: dot(phi.T, v), (1, 1), 0, phi_CxBxF, v_and_ones)
    return sums[..., :-1], sums[..., -1]


def _state_head(k_BxLxD, v_BxLxD, valid_BxL, key_map):
    def chunk(sums, rows):
        k, v, valid = rows
        return jax.tree.map(jnp.add, sums, _state_chunk(k, v, key_map, valid)), None

    batch, _, width = k_BxLxD.shape
    features = jax.eval_shape(features_of, key_map, k_BxLxD).shape[-1]
    zeros = jnp.zeros((batch, features, width), jnp.float32), jnp.zeros((batch, features), jnp.float32)
    return over_chunks(chunk, zeros, swap((k_BxLxD, v_BxLxD, valid_BxL)), features)[0]


def _state_head_backward(k_BxLxD, v_BxLxD, valid_BxL, key_map, d_state_and_z):
    dS_BxFxD, dz_BxF = d_state_and_z

    def chunk(d_map, rows):
        k_CxBxD, v_CxBxD, valid_CxB = rows
        phi_CxBxF, pullback = jax.vjp(features_of, key_map, k_CxBxD)
        dphi_CxBxF = over_examples(lambda v, dS: dot(v, dS.T), (1, 0), 1, v_CxBxD, dS_BxFxD.astype(v_CxBxD.dtype))
        dphi_CxBxF = jnp.where(valid_CxB[..., None], dphi_CxBxF + dz_BxF[None], 0)
        more, dk_CxBxD = pullback(dphi_CxBxF.astype(phi_CxBxF.dtype))
        dv_CxBxD = over_examples(dot, (1, 0), 1, phi_CxBxF, dS_BxFxD.astype(phi_CxBxF.dtype))
        dv_CxBxD = jnp.where(valid_CxB[..., None], dv_CxBxD, 0).astype(v_CxBxD.dtype)
        return jax.tree.map(jnp.add, d_map, more), (dk_CxBxD, dv_CxBxD)

    rows = swap((k_BxLxD, v_BxLxD, valid_BxL))
    d_map, (dk, dv) = over_chunks(chunk, jax.tree.map(jnp.zeros_like, key_map), rows, dz_BxF.shape[1])
    return dk, dv, d_map


@jax.custom_vjp
def read_out(q: jax.Array, query_map: FeatureMap, state: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """phi_q S [B, H, N, D] and phi_q z [B, H, N], float32, for q [B, N, H, D] and `linear_state`'s S and z."""
    numbers = num_features(query_map, q)
    o_HxNxBxD, n_HxNxB = over(_read_head, READ_AXES, q, query_map, (state, z), numbers=numbers)
    return jnp.moveaxis(o_HxNxBxD, 2, 0), jnp.moveaxis(n_HxNxB, 2, 0)


READ_AXES = (HEAD_OF_TOKENS, HEAD_OF_MAP, HEAD_OF_ROWS)


def _read_forward(q, query_map, state, z):
    return read_out(q, query_map, state, z), (q, query_map, state, z)


def _read_backward(residuals, cotangents):
    q, query_map, state, z = residuals
    axes = (*READ_AXES, HEAD_OF_ROWS)
    inputs = q, query_map, (state, z), cotangents
    dq_HxNxBxD, d_map, d_state_and_z = over(_read_head_backward, axes, *inputs, numbers=num_features(query_map, q))
    return as_tokens(dq_HxNxBxD), d_map, *swap(d_state_and_z)


read_out.defvjp(_read_forward, _read_backward)


def read_chunk(q_CxBxD, query_map, state_BxFxD, z_BxF):
    phi_CxBxF = features_of(query_map, q_CxBxD)
    return lax.platform_dependent(phi_CxBxF, state_BxFxD, z_BxF, cpu=_read_in_one_product, default=_read)


def _read(phi_CxBxF, state_BxFxD, z_BxF):
    n_CxB = jnp.einsum("cbf,bf->cb", phi_CxBxF, z_BxF, preferred_element_type=jnp.float32)
    return over_examples(dot, (1, 0), 1, phi_CxBxF, state_BxFxD), n_CxB


def _read_in_one_product(phi_CxBxF, state_BxFxD, z_BxF):
    """The same, with z as one more column of S; see `_sums_in_one_product`."""
    state_and_z = jnp.concatenate([state_BxFxD, z_BxF[..., None].astype(state_BxFxD.dtype)], axis=-1)
    read = over_examples(dot, (1, 0), 1, phi_CxBxF, state_and_z)
    return read[..., :-1], read[..., -1]


def _read_head(q_BxNxD, query_map, state_and_z):
    def chunk(_, rows):
        (q_CxBxD,) = rows
        return None, read_chunk(q_CxBxD, query_map, *state_and_z)

    return over_chunks(chunk, None, (q_BxNxD.swapaxes(0, 1),), state_and_z[1].shape[1])[1]


def _read_head_backward(q_BxNxD, query_map, state_and_z, cotangents):
    def chunk(sums, rows):
        q, do, dn = rows
        _, pullback = jax.vjp(read_chunk, q, query_map, *state_and_z)
        dq, d_map, *d_state_and_z = pullback((do, dn))
        return jax.tree.map(jnp.add, sums, (d_map, tuple(d_state_and_z))), dq

    zeros = jax.tree.map(jnp.zeros_like, (query_map, state_and_z))
    rows = swap((q_BxNxD, *cotangents))
    (d_map, d_state_and_z), dq = over_chunks(chunk, zeros, rows, state_and_z[1].shape[1])
    return dq, d_map, d_state_and_z


@functools.partial(jax.jit, inline=True)  # traced once, for its shapes and for its values
def features_of(feature_map: FeatureMap, x_CxBxD: jax.Array) -> jax.Array:
    """phi of one head, given a map whose leaves have no head axis."""
    one_head = jax.tree.map(lambda leaf: leaf[None], feature_map)
    return one_head(x_CxBxD[:, :, None])[:, :, 0]


def num_features(feature_map: FeatureMap, x_BxNxHxD: jax.Array) -> int:
    """The number of features of all tokens and heads."""
    one_head = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), feature_map)
    x_NxBxD = jax.ShapeDtypeStruct((*x_BxNxHxD.shape[1::-1], x_BxNxHxD.shape[3]), x_BxNxHxD.dtype)
    return jax.eval_shape(features_of, one_head, x_NxBxD).size * x_BxNxHxD.shape[2]
