"""Hybrid attention on TPU: the public functions around the Pallas kernels, which Mosaic compiles, and gradients.

The kernels themselves are in `tpu_forward`, `tpu_backward`, `tpu_zones` and `tpu_error`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tpu_chunked, tpu_error, tpu_zones
from pallas_kernels.chunk_windows import Kernels
from pallas_kernels.feature_map import FeatureMap, PolynomialMap
from pallas_kernels.reference import Zones
from pallas_kernels.tpu_arguments import as_row, check, head_product, polynomial, problem_of, scaled
from pallas_kernels.tpu_arguments import blocks_for as blocks_for
from pallas_kernels.tpu_backward import attend_backward, known_per_query, read_out_backward, summarize_backward
from pallas_kernels.tpu_forward import attend, summarize
from pallas_kernels.tpu_problem import BlockSizes, Problem
from pallas_kernels.tpu_sparse import sparse_linear_attention as sparse_linear_attention


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
        block_sizes: None for this chip's `blocks_for`.
        interpret: True, or a `pltpu.InterpretParams`, to run on any backend, slowly.

    Raises:
        NotImplementedError: arguments that the kernels do not support: maps other than two `PolynomialMap`s of the same
            degree and activation, dtypes that are not all bfloat16 or all float32, heads whose width is no multiple of
            64 (when compiled).
    """
    query_map, key_map = polynomial("query_map", query_map), polynomial("key_map", key_map)
    check(q, k, v, query_map, key_map, interpret)
    if num_softmax == k.shape[1]:
        query_map = key_map = None
    problem = problem_of(q, k, query_map, num_softmax, key_valid, stabilizer, block_sizes, interpret)
    packed = tuple(problem.pack(x) for x in (q, k, v))
    return problem.unpack(_attention(problem, packed, (query_map, key_map), as_row(key_valid)))


def linear_state(
    k: jax.Array,
    v: jax.Array,
    key_map: FeatureMap,
    *,
    start: int = 0,
    key_valid: jax.Array | None = None,
    token_gradients: bool = True,
    block_sizes: BlockSizes | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """S [B, H, F, D] and z [B, H, F]; see `pallas_kernels.linear_state`."""
    phi = polynomial("key_map", key_map)
    check(k, k, v, phi, phi, interpret)
    problem = problem_of(k, k, phi, start, key_valid, "lse", block_sizes, interpret)
    arrays = tuple(problem.pack(x) for x in (k, v))
    return _state(problem, token_gradients, arrays, phi, as_row(key_valid))


def attend_with_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap,
    state: tuple[jax.Array, jax.Array],
    *,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
    block_sizes: BlockSizes | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Eq. 5 with softmax keys and the state of the linear keys; see `pallas_kernels.attend_with_state`."""
    phi = polynomial("query_map", query_map)
    check(q, k, v, phi, phi, interpret)
    problem = problem_of(q, k, phi, k.shape[1], key_valid, stabilizer, block_sizes, interpret)
    packed = tuple(problem.pack(x) for x in (q, k, v))
    return problem.unpack(_read(problem, packed, phi, state, as_row(key_valid)))


def softmax_zones(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: Sequence[int],
    *,
    key_valid: jax.Array | None = None,
    block_sizes: BlockSizes | None = None,
    interpret: Any = False,
) -> Zones:
    """See `pallas_kernels.softmax_zones`; it has no gradients here."""
    check(q, k, v, None, None, interpret)
    problem = problem_of(q, k, None, bounds[-1], key_valid, "lse", block_sizes, interpret)
    packed = tuple(problem.pack(x) for x in (q, k, v))
    return _zones(problem, tuple(bounds), packed, as_row(key_valid))


def hybrid_error(
    q: jax.Array,
    query_map: FeatureMap,
    state: tuple[jax.Array, jax.Array],
    softmax: tuple[jax.Array, jax.Array] | None,
    target: jax.Array,
    *,
    query_valid: jax.Array | None = None,
    block_sizes: BlockSizes | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.hybrid_error`."""
    phi = polynomial("query_map", query_map)
    check(q, q, q, phi, phi, interpret)
    problem = problem_of(q, q, phi, 0, query_valid, "lse", block_sizes, interpret)
    branch = None if softmax is None else (problem.pack(softmax[0]), softmax[1])
    constants = problem.pack(q), branch, problem.pack(target)
    results: Any = _error(problem, phi, state, constants, as_row(query_valid))
    errors_H, n_L_BxHxN = results
    return errors_H, n_L_BxHxN.swapaxes(1, 2)


def chunked_attention(
    *arguments: Any, block_sizes: BlockSizes | None = None, interpret: Any = False, **options: Any
) -> jax.Array:
    """See `pallas_kernels.chunked_attention`."""
    own: Any = {"block_sizes": block_sizes, "interpret": interpret}
    functions: Any = (functools.partial(f, **own) for f in (hybrid_attention, linear_state, attend_with_state))
    return tpu_chunked.chunked_attention(Kernels(*functions), *arguments, **own, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(problem: Problem, arrays: tuple, maps: tuple, valid: jax.Array | None) -> jax.Array:
    """y, packed, for packed (q, k, v) and (query_map, key_map)."""
    return _forward(problem, arrays, maps, valid, with_stats=False)[0]


def _forward(problem, arrays, maps, valid, *, with_stats):
    (q, k, v), (query_map, key_map) = arrays, maps
    state = z = None
    if query_map is not None:
        state, z = scaled(summarize(problem, key_map, k, v, valid), query_map.log_scale + key_map.log_scale)
    y, stats = attend(problem, query_map, q, k, v, valid, state, z, with_stats=with_stats)
    return y, (stats, state, z)


def _attention_forward(problem, arrays, maps, valid):
    y, (stats, state, z) = _forward(problem, arrays, maps, valid, with_stats=True)
    return y, (arrays, maps, valid, y, stats, state, z)


def _attention_backward(problem, residuals, dy):
    (q, k, v), (query_map, key_map), valid, y, stats, state, z = residuals
    per_query = known_per_query(problem, y, dy, stats)
    if query_map is None:
        d_arrays = attend_backward(problem, q, k, v, valid, dy, per_query, None, None)
        return d_arrays, (None, None), None

    dq, linear, dstate, dz, d_query = read_out_backward(problem, query_map, q, dy, per_query, state, z)
    dlog_scale_H = -linear.sum(axis=(0, 2, 3))
    dstate, dz = scaled((dstate, dz), query_map.log_scale + key_map.log_scale)
    (dk, dv), d_key = summarize_backward(problem, key_map, k, v, valid, dstate, dz)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _state(
    problem: Problem, token_gradients: bool, arrays: tuple, key_map: PolynomialMap, valid: jax.Array | None
) -> tuple:
    """S and z of the linear keys of packed (k, v)."""
    return _state_forward(problem, token_gradients, arrays, key_map, valid)[0]


def _state_forward(problem, token_gradients, arrays, key_map, valid):
    k, v = arrays
    state = scaled(summarize(problem, key_map, k, v, valid), key_map.log_scale)
    return state, (arrays, key_map, valid, state)


def _state_backward(problem, token_gradients, residuals, cotangents):
    (k, v), key_map, valid, (state, z) = residuals
    dstate, dz = cotangents
    dlog_scale_H = head_product(dstate, state) + head_product(dz, z)
    dstate, dz = scaled((dstate, dz), key_map.log_scale)
    d_tokens, (kernels, biases) = summarize_backward(problem, key_map, k, v, valid, dstate, dz, token_gradients)
    if problem.num_softmax:
        linear = (jnp.arange(problem.num_keys) >= problem.num_softmax).reshape(*[1] * (k.ndim - 2), -1, 1)
        d_tokens = [jnp.where(linear, d, 0) for d in d_tokens]
    d_map = dataclasses.replace(key_map, kernels=kernels, biases=biases, log_scale=dlog_scale_H)
    return tuple(d_tokens) or None, d_map, None


_state.defvjp(_state_forward, _state_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _error(
    problem: Problem, query_map: PolynomialMap, state: tuple, constants: tuple, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The errors [H] and n_L [B, H, N] for constants (q, softmax, target), packed."""
    (q, softmax, target), (S, z) = constants, scaled(state, query_map.log_scale)
    errors_BxH, n_L, _ = tpu_error.hybrid_error(
        problem, query_map, q, S, z, softmax, target, valid, with_gradients=False
    )
    return errors_BxH.sum(axis=0), n_L


def _error_forward(problem, query_map, state, constants, valid):
    (q, softmax, target), (S, z) = constants, scaled(state, query_map.log_scale)
    errors_BxH, n_L, (dS, dz, (kernels, biases)) = tpu_error.hybrid_error(
        problem, query_map, q, S, z, softmax, target, valid, with_gradients=True
    )
    log_scale_H = head_product(dS, S) + head_product(dz, z)
    d_map = dataclasses.replace(query_map, kernels=kernels, biases=biases, log_scale=log_scale_H)
    return (errors_BxH.sum(axis=0), n_L), (d_map, scaled((dS, dz), query_map.log_scale))


def _error_backward(problem, gradients, cotangents):
    (d_map, d_state), (by_error_H, _) = gradients, cotangents
    times = lambda x, axis: x * by_error_H.reshape([-1 if number == axis else 1 for number in range(x.ndim)])
    return jax.tree.map(lambda x: times(x, 0), d_map), jax.tree.map(lambda x: times(x, 1), d_state), None, None


_error.defvjp(_error_forward, _error_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(problem: Problem, arrays: tuple, query_map: PolynomialMap, state: tuple, valid: jax.Array | None):
    """y, packed, for packed (q, k, v), all of whose keys keep softmax, and for S and z."""
    (q, k, v), (S, z) = arrays, scaled(state, query_map.log_scale)
    return attend(problem, query_map, q, k, v, valid, S, z, with_stats=False)[0]


def _read_forward(problem, arrays, query_map, state, valid):
    (q, k, v), (S, z) = arrays, scaled(state, query_map.log_scale)
    y, stats = attend(problem, query_map, q, k, v, valid, S, z, with_stats=True)
    return y, (arrays, query_map, S, z, valid, y, stats)


def _read_backward(problem, residuals, dy):
    (q, k, v), query_map, S, z, valid, y, stats = residuals
    per_query = known_per_query(problem, y, dy, stats)
    dq, linear, dstate, dz, (kernels, biases) = read_out_backward(problem, query_map, q, dy, per_query, S, z)
    dk, dv = jnp.zeros_like(k), jnp.zeros_like(v)
    if problem.num_softmax:
        dq, dk, dv = attend_backward(problem, q, k, v, valid, dy, per_query, linear, dq)
    d_map = dataclasses.replace(query_map, kernels=kernels, biases=biases, log_scale=-linear.sum(axis=(0, 2, 3)))
    return (dq, dk, dv), d_map, scaled((dstate, dz), query_map.log_scale), None


_read.defvjp(_read_forward, _read_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _zones(problem: Problem, bounds: tuple[int, ...], arrays: tuple, valid: jax.Array | None) -> Zones:
    q, k, v = arrays
    outputs, stats_BxHxZx2xN = tpu_zones.softmax_zones(problem, bounds, q, k, v, valid)
    lse, largest = stats_BxHxZx2xN.transpose(3, 2, 0, 4, 1)
    y = jnp.stack([problem.unpack(y) for y in outputs])
    return y, lse, largest


def _no_gradients(*_: Any) -> Any:
    raise NotImplementedError("implementation 'tpu': softmax_zones has no gradients; 'xla' has")


_zones.defvjp(_no_gradients, _no_gradients)
