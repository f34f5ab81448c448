"""Hybrid attention in chunks of tokens, for any backend: differentiable, with neither N x N scores nor all features
in memory.

Each branch has its own backward pass, which keeps inputs, outputs and log-sum-exps and recomputes the rest. On CPU both
branches loop over heads and cut each head out of the tokens in its turn. A tile of scores that fits the cache is
several times faster there than one batched product.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.feature_map import FeatureMap
from pallas_kernels.reference import EPSILON, Zones

# The number of scores, or of features, in a head's tile; and the fewest tokens of a tile, however many keys there are.
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
    k_S, v_S, valid_S = jax.tree.map(lambda x: x[:, :num_softmax], (k, v, key_valid))
    k_L, v_L, valid_L = jax.tree.map(lambda x: x[:, num_softmax:], (k, v, key_valid))
    state = None
    if num_softmax < k.shape[1]:
        assert key_map is not None
        state = linear_state(k_L, v_L, key_map, key_valid=valid_L)
    return attend_with_state(q, k_S, v_S, query_map, state, key_valid=valid_S, stabilizer=stabilizer)


def linear_state(
    k: jax.Array,
    v: jax.Array,
    key_map: FeatureMap,
    *,
    start: int = 0,
    key_valid: jax.Array | None = None,
    token_gradients: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """S [B, H, F, D] and z [B, H, F]; see `pallas_kernels.linear_state`."""
    k, v, key_valid = jax.tree.map(lambda x: x[:, start:], (k, v, key_valid))
    if not token_gradients:
        k, v = lax.stop_gradient((k, v))
    return _state(k, v, key_map, jnp.ones(k.shape[:2], bool) if key_valid is None else key_valid)


def attend_with_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap | None,
    state: tuple[jax.Array, jax.Array] | None,
    *,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
) -> jax.Array:
    """See `pallas_kernels.attend_with_state`. `query_map` and `state` are None if there are no linear keys."""
    if state is None:
        y_BxHxNxD = _softmax(q, k, v, key_valid, False)[0]
    else:
        assert query_map is not None
        o_L_BxHxNxD, n_L_BxHxN = read_out(q, query_map, *state)
        if k.shape[1] == 0:
            y_BxHxNxD = o_L_BxHxNxD / (n_L_BxHxN + EPSILON)[..., None]
        else:
            y_S_BxHxNxD, n_S_BxHxN = _softmax(q, k, v, key_valid, stabilizer == "max")
            numerator_BxHxNxD = n_S_BxHxN[..., None] * y_S_BxHxNxD + o_L_BxHxNxD
            y_BxHxNxD = numerator_BxHxNxD / (n_S_BxHxN + n_L_BxHxN)[..., None]
    return y_BxHxNxD.swapaxes(1, 2).astype(v.dtype)


# The axes over which `_over` runs, by the kind of input: batch and head, or the head alone. None: the input has none.
TOKENS, MASK, ROWS = (0, 2), (0, None), (0, 1)  # [B, N, H, ...], [B, N], [B, H, ...]
HEAD_OF_TOKENS, HEAD_OF_MASK, HEAD_OF_ROWS, HEAD_OF_MAP = (2,), (None,), (1,), (0,)


def _over(function: Callable, axes: Sequence[tuple[int | None, ...]], *inputs):
    """Runs `function` over the given axes of each input's leaves, which become the first axes of the results.

    On CPU it is a loop in float32, elsewhere a batched call. `axes` has a tuple for each input, all of one length.
    """
    batched, depth = function, len(axes[0])
    for level in reversed(range(depth)):
        # The outer vmaps have removed `level` axes by then, all of which came before this one.
        left = tuple(None if (axis := each[level]) is None else axis - level for each in axes)
        batched = jax.vmap(batched, in_axes=left)
    expected = jax.eval_shape(batched, *inputs)
    lead = jax.tree.leaves(expected)[0].shape[:depth]

    def looped(*inputs):
        def one(number):
            index = jnp.unravel_index(number, lead)

            def cut(x, axes):
                chosen = {axis: i for axis, i in zip(axes, index, strict=True) if axis is not None}
                starts = [chosen.get(axis, 0) for axis in range(x.ndim)]
                sizes = [1 if axis in chosen else size for axis, size in enumerate(x.shape)]
                x = lax.dynamic_slice(x, starts, sizes).squeeze(tuple(chosen))
                return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

            return function(*(jax.tree.map(partial(cut, axes=a), x) for x, a in zip(inputs, axes, strict=True)))

        outs = lax.map(one, jnp.arange(math.prod(lead)))
        return jax.tree.map(lambda x, e: x.reshape(e.shape).astype(e.dtype), outs, expected)

    return lax.platform_dependent(*inputs, cpu=looped, default=batched)


def _softmax_primal(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None, row_max: bool
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention [B, H, N, D] and its mass n_S [B, H, N], float32: sum exp(s - max s) with row_max, else 1.

    q [B, N, H, D], k and v [B, S, H, D], valid [B, S].
    """
    return _softmax_forward(q, k, v, valid, row_max)[0]


def _softmax_forward(q, k, v, valid, row_max):
    head = partial(_softmax_head, row_max=row_max)
    y, lse, n_S = _over(head, (TOKENS, TOKENS, TOKENS, MASK), q, k, v, valid)
    return (y, n_S), (q, k, v, valid, y, lse, n_S)


def _softmax_backward(row_max, residuals, cotangents):
    q, k, v, valid, y, lse, n_S = residuals
    dy, dn_S = cotangents
    delta_BxHxN = (dy * y).sum(axis=-1)
    head = partial(_softmax_head_backward, row_max=row_max)
    rows = (dy.astype(v.dtype), lse, delta_BxHxN, dn_S * n_S)
    gradients = _over(head, (TOKENS, TOKENS, TOKENS, MASK, ROWS), q, k, v, valid, rows)
    return *(d.swapaxes(1, 2).astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True)), None


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


def _softmax_head_backward(q_NxD, k_SxD, v_SxD, valid_S, rows, *, row_max):
    """(dq, dk, dv) of one head. `rows` are dy, lse, delta = dy . y, and the cotangent of log n_S = lse - max s."""
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
    (dk_SxD, dv_SxD), dq_NxD = _over_chunks(chunk, (zeros_SxD, zeros_SxD), (q_NxD, *rows), k_SxD.shape[0])
    return dq_NxD, dk_SxD, dv_SxD


def _over_chunks(chunk: Callable, carry, rows: tuple[jax.Array, ...], numbers_per_row: int):
    """`lax.scan` of `chunk` over equal pieces of rows [N, ...], padded with zeros (False) at the end.

    `numbers_per_row` is how many scores or features a row has; it determines the length of a piece.
    """
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
def _state(k: jax.Array, v: jax.Array, key_map: FeatureMap, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """S = sum phi_k^T v [B, H, F, D] and z = sum phi_k [B, H, F], float32, for k, v [B, L, H, D] and valid [B, L]."""
    return _swap(_over(_state_head, STATE_AXES, k, v, valid, key_map))


STATE_AXES = (HEAD_OF_TOKENS, HEAD_OF_TOKENS, HEAD_OF_MASK, HEAD_OF_MAP)


def _state_forward(k, v, key_map, valid):
    return _state(k, v, key_map, valid), (k, v, key_map, valid)


def _state_backward(residuals, cotangents):
    k, v, key_map, valid = residuals
    axes = (*STATE_AXES, HEAD_OF_ROWS)
    dk_HxLxBxD, dv_HxLxBxD, d_map = _over(_state_head_backward, axes, k, v, valid, key_map, cotangents)
    return _tokens(dk_HxLxBxD), _tokens(dv_HxLxBxD), d_map, None


_state.defvjp(_state_forward, _state_backward)


def _state_chunk(k_CxBxD, v_CxBxD, key_map, valid_CxB):
    phi_CxBxF = jnp.where(valid_CxB[..., None], _features(key_map, k_CxBxD), 0)
    state_BxFxD = jnp.einsum("cbf,cbd->bfd", phi_CxBxF, v_CxBxD, preferred_element_type=jnp.float32)
    return state_BxFxD, phi_CxBxF.sum(axis=0, dtype=jnp.float32)


def _state_head(k_BxLxD, v_BxLxD, valid_BxL, key_map):
    def chunk(sums, rows):
        k, v, valid = rows
        return jax.tree.map(jnp.add, sums, _state_chunk(k, v, key_map, valid)), None

    batch, _, width = k_BxLxD.shape
    features = _num_features(key_map, k_BxLxD)
    zeros = jnp.zeros((batch, features, width), jnp.float32), jnp.zeros((batch, features), jnp.float32)
    return _over_chunks(chunk, zeros, _swap((k_BxLxD, v_BxLxD, valid_BxL)), features)[0]


def _state_head_backward(k_BxLxD, v_BxLxD, valid_BxL, key_map, d_state_and_z):
    def chunk(d_map, rows):
        k, v, valid = rows
        _, pullback = jax.vjp(partial(_state_chunk, valid_CxB=valid), k, v, key_map)
        dk, dv, more = pullback(d_state_and_z)
        return jax.tree.map(jnp.add, d_map, more), (dk, dv)

    rows = _swap((k_BxLxD, v_BxLxD, valid_BxL))
    d_map, (dk, dv) = _over_chunks(chunk, jax.tree.map(jnp.zeros_like, key_map), rows, d_state_and_z[1].shape[1])
    return dk, dv, d_map


@jax.custom_vjp
def read_out(q: jax.Array, query_map: FeatureMap, state: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """phi_q S [B, H, N, D] and phi_q z [B, H, N], float32, for q [B, N, H, D] and `linear_state`'s S and z."""
    o_HxNxBxD, n_HxNxB = _over(_read_head, READ_AXES, q, query_map, (state, z))
    return jnp.moveaxis(o_HxNxBxD, 2, 0), jnp.moveaxis(n_HxNxB, 2, 0)


READ_AXES = (HEAD_OF_TOKENS, HEAD_OF_MAP, HEAD_OF_ROWS)


def _read_forward(q, query_map, state, z):
    return read_out(q, query_map, state, z), (q, query_map, state, z)


def _read_backward(residuals, cotangents):
    q, query_map, state, z = residuals
    axes = (*READ_AXES, HEAD_OF_ROWS)
    dq_HxNxBxD, d_map, d_state_and_z = _over(_read_head_backward, axes, q, query_map, (state, z), cotangents)
    return _tokens(dq_HxNxBxD), d_map, *_swap(d_state_and_z)


read_out.defvjp(_read_forward, _read_backward)


def _read_chunk(q_CxBxD, query_map, state_BxFxD, z_BxF):
    phi_CxBxF = _features(query_map, q_CxBxD)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    return einsum("cbf,bfd->cbd", phi_CxBxF, state_BxFxD), einsum("cbf,bf->cb", phi_CxBxF, z_BxF)


def _read_head(q_BxNxD, query_map, state_and_z):
    def chunk(_, rows):
        (q_CxBxD,) = rows
        return None, _read_chunk(q_CxBxD, query_map, *state_and_z)

    return _over_chunks(chunk, None, (q_BxNxD.swapaxes(0, 1),), state_and_z[1].shape[1])[1]


def _read_head_backward(q_BxNxD, query_map, state_and_z, cotangents):
    def chunk(sums, rows):
        q, do, dn = rows
        _, pullback = jax.vjp(_read_chunk, q, query_map, *state_and_z)
        dq, d_map, *d_state_and_z = pullback((do, dn))
        return jax.tree.map(jnp.add, sums, (d_map, tuple(d_state_and_z))), dq

    zeros = jax.tree.map(jnp.zeros_like, (query_map, state_and_z))
    rows = _swap((q_BxNxD, *cotangents))
    (d_map, d_state_and_z), dq = _over_chunks(chunk, zeros, rows, state_and_z[1].shape[1])
    return dq, d_map, d_state_and_z


def _features(feature_map: FeatureMap, x_CxBxD: jax.Array) -> jax.Array:
    """phi of one head, given a map whose leaves have no head axis."""
    one_head = jax.tree.map(lambda leaf: leaf[None], feature_map)
    return one_head(x_CxBxD[:, :, None])[:, :, 0]


def _num_features(feature_map: FeatureMap, x_CxBxD: jax.Array) -> int:
    return jax.eval_shape(_features, feature_map, x_CxBxD).shape[-1]


def _swap(tree):
    """Every leaf with its first two axes exchanged."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)


def _tokens(x_HxNxBxD: jax.Array) -> jax.Array:
    """[B, N, H, D]."""
    return x_HxNxBxD.transpose(2, 1, 0, 3)


def softmax_zones(
    q: jax.Array, k: jax.Array, v: jax.Array, bounds: Sequence[int], *, key_valid: jax.Array | None = None
) -> Zones:
    """See `pallas_kernels.softmax_zones`. The scores of a chunk of queries are computed once, for all prefixes."""
    k, v, key_valid = jax.tree.map(lambda x: x[:, : bounds[-1]], (k, v, key_valid))
    head = partial(_zones_head, bounds=tuple(bounds))
    y_BxHxNxZxD, lse_BxHxNxZ, top_BxHxNxZ = _over(head, (TOKENS, TOKENS, TOKENS, MASK), q, k, v, key_valid)
    statistics = (x.transpose(3, 0, 2, 1) for x in (lse_BxHxNxZ, top_BxHxNxZ))
    return y_BxHxNxZxD.transpose(3, 0, 2, 1, 4), *statistics


def _zones_head(q_NxD, k_MxD, v_MxD, valid_M, *, bounds):
    def chunk(_, rows):
        (q_CxD,) = rows
        s_CxM = _scores(q_CxD, k_MxD, valid_M)
        top_C, mass_C, sum_CxD = -jnp.inf, 0.0, 0.0
        zones = []
        for start, stop in zip((0, *bounds), bounds, strict=False):
            # -inf - -inf would be NaN where no key of a zone is valid.
            next_C = jnp.maximum(top_C, s_CxM[:, start:stop].max(axis=-1))
            shift_C = jnp.where(next_C == -jnp.inf, 0.0, next_C)
            p_CxS = jnp.exp(s_CxM[:, start:stop] - shift_C[:, None])
            decay_C = jnp.exp(top_C - shift_C)
            mass_C = decay_C * mass_C + p_CxS.sum(axis=-1)
            sum_CxD = decay_C[:, None] * sum_CxD + _dot(p_CxS.astype(v_MxD.dtype), v_MxD[start:stop])
            top_C = next_C
            zones.append((sum_CxD / mass_C[:, None], shift_C + jnp.log(mass_C), top_C))
        return None, tuple(jnp.stack(parts, axis=1) for parts in zip(*zones, strict=True))

    return _over_chunks(chunk, None, (q_NxD,), k_MxD.shape[0])[1]


def hybrid_error(
    q: jax.Array,
    query_map: FeatureMap,
    state: tuple[jax.Array, jax.Array],
    softmax: tuple[jax.Array, jax.Array] | None,
    target: jax.Array,
    *,
    query_valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.hybrid_error`."""
    errors_H, n_L_HxNxB = _error(query_map, state, q, softmax, target, query_valid)
    return errors_H, n_L_HxNxB.transpose(2, 1, 0)


ERROR_AXES = (HEAD_OF_MAP, HEAD_OF_ROWS, HEAD_OF_TOKENS, HEAD_OF_TOKENS, HEAD_OF_TOKENS, HEAD_OF_MASK)


@jax.custom_vjp
def _error(query_map, state, q, softmax, target, valid) -> tuple[jax.Array, jax.Array]:
    """The errors [H] and n_L [H, N, B]."""
    return _over(_error_head, ERROR_AXES, query_map, state, q, softmax, target, valid)


def _error_forward(query_map, state, q, softmax, target, valid):
    inputs = query_map, state, q, softmax, target, valid
    errors, n_L, gradients = _over(_error_head_gradients, ERROR_AXES, *inputs)
    return (errors, n_L), gradients


def _error_backward(gradients, cotangents):
    (d_map, d_state), (by_error_H, _) = gradients, cotangents
    scaled = jax.vmap(lambda tree, factor: jax.tree.map(lambda x: factor * x, tree))((d_map, d_state), by_error_H)
    return scaled[0], _swap(scaled[1]), None, None, None, None


_error.defvjp(_error_forward, _error_backward)


def _error_chunk(query_map, state_and_z, q_CxBxD, softmax, target_CxBxD, valid_CxB):
    y_CxBxD, n_L_CxB = _read_chunk(q_CxBxD, query_map, *state_and_z)
    n_CxB = n_L_CxB + EPSILON
    if softmax is not None:
        o_S_CxBxD, n_S_CxB = softmax
        y_CxBxD, n_CxB = n_S_CxB[..., None] * o_S_CxBxD + y_CxBxD, n_S_CxB + n_L_CxB
    # A chunk is padded with zeros, where valid is False and n may be 0.
    gap_CxBxD = jnp.abs(y_CxBxD / jnp.where(valid_CxB, n_CxB, 1.0)[..., None] - target_CxBxD)
    return jnp.sum(jnp.where(valid_CxB[..., None], gap_CxBxD, 0.0)), n_L_CxB


def _error_rows(q_BxNxD, softmax, target_BxNxD, valid_BxN):
    valid_BxN = jnp.ones(q_BxNxD.shape[:2], bool) if valid_BxN is None else valid_BxN
    return _swap((q_BxNxD, softmax, target_BxNxD, valid_BxN))


def _error_head(query_map, state_and_z, q_BxNxD, softmax, target_BxNxD, valid_BxN):
    def chunk(error, rows):
        more, n_L_CxB = _error_chunk(query_map, state_and_z, *rows)
        return error + more, n_L_CxB

    rows = _error_rows(q_BxNxD, softmax, target_BxNxD, valid_BxN)
    return _over_chunks(chunk, jnp.zeros(()), rows, state_and_z[1].shape[1])


def _error_head_gradients(query_map, state_and_z, q_BxNxD, softmax, target_BxNxD, valid_BxN):
    def chunk(sums, rows):
        with_gradients = jax.value_and_grad(_error_chunk, argnums=(0, 1), has_aux=True)
        (error, n_L_CxB), gradients = with_gradients(query_map, state_and_z, *rows)
        return jax.tree.map(jnp.add, sums, (error, gradients)), n_L_CxB

    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, (query_map, state_and_z))
    rows = _error_rows(q_BxNxD, softmax, target_BxNxD, valid_BxN)
    (error, gradients), n_L_NxB = _over_chunks(chunk, zeros, rows, state_and_z[1].shape[1])
    return error, n_L_NxB, gradients
