"""Hybrid attention on TPU: Pallas kernels compiled by Mosaic, and their gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.feature_map import FeatureMap, PolynomialMap
from pallas_kernels.tpu_backward import attend_backward, read_out_backward, summarize_backward
from pallas_kernels.tpu_forward import BlockSizes, Problem, attend, summarize


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
    block_sizes: BlockSizes | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Eq. 5 of Attention Surgery; see `pallas_kernels.hybrid_attention`.

    Args:
        block_sizes: None for what `tuning` knows of this chip, or the defaults.
        interpret: True, or a `pltpu.InterpretParams`, to run on any backend, slowly.

    Raises:
        NotImplementedError: what the kernels do not do: maps other than a pair of `PolynomialMap` of one kind, dtypes
            that are not all bfloat16 or all float32, heads that are no multiple of 64 wide (when compiled).
    """
    query_map, key_map = _polynomial("query_map", query_map), _polynomial("key_map", key_map)
    _check(q, k, v, query_map, key_map, interpret)
    batch, num_queries, heads, width = q.shape
    num_keys = k.shape[1]
    if num_softmax == num_keys:
        query_map = key_map = None
    if block_sizes is None:
        block_sizes = BlockSizes(**tuning.lookup(tuning.current_chip(), num_keys, num_softmax))
    problem = Problem(
        batch=batch,
        num_queries=num_queries,
        num_keys=num_keys,
        num_softmax=num_softmax,
        heads=heads,
        width=width,
        dtype=q.dtype,
        stabilizer=stabilizer,
        masked=key_valid is not None,
        degree=query_map.degree if query_map else 1,
        activation=query_map.activation if query_map else "relu",
        blocks=block_sizes.fit(num_queries, num_keys, num_softmax),
        interpret=interpret,
    )
    valid = None if key_valid is None else key_valid[:, None].astype(jnp.float32)
    packed = tuple(problem.pack(x) for x in (q, k, v))
    return problem.unpack(_attention(problem, packed, (query_map, key_map), valid))


def _polynomial(name: str, phi: FeatureMap | None) -> PolynomialMap | None:
    if phi is None or isinstance(phi, PolynomialMap):
        return phi
    raise NotImplementedError(
        f"implementation 'tpu': {name} is a {type(phi).__name__}; the kernels compute PolynomialMap alone"
    )


def _check(q, k, v, query_map, key_map, interpret) -> None:
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (jnp.bfloat16, jnp.float32)):
        found = ", ".join(str(x.dtype) for x in (q, k, v))
        raise NotImplementedError(
            f"implementation 'tpu': q, k and v must be all bfloat16 or all float32, found {found}"
        )
    if q.shape[-1] % 64 and not interpret:
        raise NotImplementedError(
            f"implementation 'tpu': q has heads of {q.shape[-1]} channels; the kernels take multiples of 64"
        )
    if query_map is not None and key_map is not None:
        kinds = [(phi.degree, phi.activation) for phi in (query_map, key_map)]
        if kinds[0] != kinds[1]:
            raise NotImplementedError(
                "implementation 'tpu': key_map must have query_map's degree and activation, "
                f"{kinds[0]}, found {kinds[1]}"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(problem: Problem, arrays: tuple, maps: tuple, valid: jax.Array | None) -> jax.Array:
    """y of (q, k, v), all packed, and (query_map, key_map)."""
    return _forward(problem, arrays, maps, valid, with_stats=False)[0]


def _forward(problem, arrays, maps, valid, *, with_stats):
    (q, k, v), (query_map, key_map) = arrays, maps
    state = z = None
    if query_map is not None:
        state, z = summarize(problem, key_map, k, v, valid)
        scale_H = jnp.exp(query_map.log_scale + key_map.log_scale)
        state, z = state * scale_H[None, :, None, None], z * scale_H[None, :, None]
    y, stats = attend(problem, query_map, q, k, v, valid, state, z, with_stats=with_stats)
    return y, (stats, state, z)


def _attention_forward(problem, arrays, maps, valid):
    y, (stats, state, z) = _forward(problem, arrays, maps, valid, with_stats=True)
    return y, (arrays, maps, valid, y, stats, state, z)


def _attention_backward(problem, residuals, dy):
    (q, k, v), (query_map, key_map), valid, y, stats, state, z = residuals
    delta = (dy.astype(jnp.float32) * y).reshape(*dy.shape[:-1], -1, problem.width).sum(axis=-1)
    delta_BxHxN = delta.swapaxes(1, 2) if problem.packed else delta[..., 0]
    per_query = jnp.concatenate([stats, delta_BxHxN[:, :, None]], axis=2)

    if query_map is None:
        d_arrays = attend_backward(problem, q, k, v, valid, dy, per_query, None, None)
        return d_arrays, (None, None), None

    dq, linear, dstate, dz, d_query = read_out_backward(problem, query_map, q, dy, per_query, state, z)
    dlog_scale_H = -linear.sum(axis=(0, 2, 3))
    scale_H = jnp.exp(query_map.log_scale + key_map.log_scale)
    dstate, dz = dstate * scale_H[None, :, None, None], dz * scale_H[None, :, None]
    dk, dv, d_key = summarize_backward(problem, key_map, k, v, valid, dstate, dz)
    if problem.num_softmax:
        dq, dk_S, dv_S = attend_backward(problem, q, k, v, valid, dy, per_query, linear, dq)
        token_axis = 1 if problem.packed else 2
        dk, dv = (
            jax.lax.dynamic_update_slice_in_dim(full, prefix, 0, token_axis)
            for full, prefix in ((dk, dk_S), (dv, dv_S))
        )
    d_maps = tuple(
        PolynomialMap(kernels, biases, dlog_scale_H, phi.degree, phi.activation)
        for phi, (kernels, biases) in ((query_map, d_query), (key_map, d_key))
    )
    return (dq, dk, dv), d_maps, None


_attention.defvjp(_attention_forward, _attention_backward)
