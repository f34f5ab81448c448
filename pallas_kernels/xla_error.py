"""The error of hybrid attention by XLA, in chunks of queries, with the gradients of phi_q and of the state."""

import jax
import jax.numpy as jnp

from pallas_kernels.reference import EPSILON
from pallas_kernels.xla_linear import num_features, read_chunk
from pallas_kernels.xla_loops import HEAD_OF_MAP, HEAD_OF_MASK, HEAD_OF_ROWS, HEAD_OF_TOKENS, over, over_chunks, swap

ERROR_AXES = (HEAD_OF_MAP, HEAD_OF_ROWS, HEAD_OF_TOKENS, HEAD_OF_TOKENS, HEAD_OF_TOKENS, HEAD_OF_MASK)


@jax.custom_vjp
def errors_and_mass(query_map, state, q, softmax, target, valid) -> tuple[jax.Array, jax.Array]:
    """The errors [H] and n_L [H, N, B]."""
    numbers = num_features(query_map, q)
    return over(_error_head, ERROR_AXES, query_map, state, q, softmax, target, valid, numbers=numbers)


def _error_forward(query_map, state, q, softmax, target, valid):
    inputs = query_map, state, q, softmax, target, valid
    errors, n_L, gradients = over(_error_head_gradients, ERROR_AXES, *inputs, numbers=num_features(query_map, q))
    return (errors, n_L), gradients


def _error_backward(gradients, cotangents):
    (d_map, d_state), (by_error_H, _) = gradients, cotangents
    scaled = jax.vmap(lambda tree, factor: jax.tree.map(lambda x: factor * x, tree))((d_map, d_state), by_error_H)
    return scaled[0], swap(scaled[1]), None, None, None, None


errors_and_mass.defvjp(_error_forward, _error_backward)


def _error_chunk(query_map, state_and_z, q_CxBxD, softmax, target_CxBxD, valid_CxB):
    y_CxBxD, n_L_CxB = read_chunk(q_CxBxD, query_map, *state_and_z)
    n_CxB = n_L_CxB + EPSILON
    if softmax is not None:
        o_S_CxBxD, n_S_CxB = softmax
        y_CxBxD, n_CxB = n_S_CxB[..., None] * o_S_CxBxD + y_CxBxD, n_S_CxB + n_L_CxB
    # A chunk is padded with zeros, where valid is False and n may be 0.
    gap_CxBxD = jnp.abs(y_CxBxD / jnp.where(valid_CxB, n_CxB, 1.0)[..., None] - target_CxBxD)
    return jnp.sum(jnp.where(valid_CxB[..., None], gap_CxBxD, 0.0)), n_L_CxB


def _error_rows(q_BxNxD, softmax, target_BxNxD, valid_BxN):
    valid_BxN = jnp.ones(q_BxNxD.shape[:2], bool) if valid_BxN is None else valid_BxN
    return swap((q_BxNxD, softmax, target_BxNxD, valid_BxN))


def _error_head(query_map, state_and_z, q_BxNxD, softmax, target_BxNxD, valid_BxN):
    def chunk(error, rows):
        more, n_L_CxB = _error_chunk(query_map, state_and_z, *rows)
        return error + more, n_L_CxB

    rows = _error_rows(q_BxNxD, softmax, target_BxNxD, valid_BxN)
    return over_chunks(chunk, jnp.zeros(()), rows, state_and_z[1].shape[1])


def _error_head_gradients(query_map, state_and_z, q_BxNxD, softmax, target_BxNxD, valid_BxN):
    def chunk(sums, rows):
        with_gradients = jax.value_and_grad(_error_chunk, argnums=(0, 1), has_aux=True)
        (error, n_L_CxB), gradients = with_gradients(query_map, state_and_z, *rows)
        return jax.tree.map(jnp.add, sums, (error, gradients)), n_L_CxB

    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, (query_map, state_and_z))
    rows = _error_rows(q_BxNxD, softmax, target_BxNxD, valid_BxN)
    (error, gradients), n_L_NxB = over_chunks(chunk, zeros, rows, state_and_z[1].shape[1])
    return error, n_L_NxB, gradients
