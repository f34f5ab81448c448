"""Attention kernels and their gradients against the plain reference in float32, with controls that must differ."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsurgery.bench.gpu_evidence.rows import Row, Scale
from pallas_kernels import gpu, reference, stock
from pallas_kernels.feature_map import init_polynomial_map

BATCH, HEADS = 2, 2
# Largest relative error (Euclidean norm) of y, and of any argument's gradient. Kernels that are interpreted on a CPU
# differ from the reference by a fifth of this in bfloat16 and by a thousandth in float32.
TOLERANCES = {"bfloat16": (0.01, 0.02), "float32": (1e-4, 1e-3)}
TOY_BLOCKS = gpu.BlockSizes(query=16, key=16, backward=16)


def kernel_test(row: Row, scale: Scale, on_gpu: bool) -> dict[str, Any]:
    """Errors of y, gradients and controls, and "passed": y and gradients are right, and every control is wrong."""
    if row.function == "softmax_zones":
        return zones_test(row, scale, on_gpu)
    arguments, dy, valid = problem(row, scale.dtype)
    options = {"num_softmax": num_softmax(row), "stabilizer": row.stabilizer, "key_valid": valid}
    if row.implementation == "stock":
        kernel = functools.partial(stock.hybrid_attention, platform="gpu" if on_gpu else "cpu", **options)
    else:
        attend = gpu.hybrid_attention if row.function is None else in_parts
        kernel = functools.partial(attend, **how(on_gpu), **options)
    y, gradients = jax.jit(functools.partial(value_and_gradients, kernel))(arguments, dy)
    with jax.default_matmul_precision("highest"):
        exact, wide_dy = jax.tree.map(lambda x: x.astype(jnp.float32), (arguments, dy))
        plain = functools.partial(reference.hybrid_attention, **options)
        expected_y, expected_gradients = jax.jit(functools.partial(value_and_gradients, plain))(exact, wide_dy)
        control_errors = {name: relative(wrong(), expected_y) for name, wrong in controls(exact, options).items()}
    error = relative(y, expected_y)
    gradient_error = max(map(relative, by_argument(gradients), by_argument(expected_gradients)))
    tolerance, gradient_tolerance = TOLERANCES[scale.dtype]
    # A NaN error fails: comparisons with NaN are false.
    good = error <= tolerance and gradient_error <= gradient_tolerance
    return {
        "error": error,
        "tolerance": tolerance,
        "gradient_error": gradient_error,
        "gradient_tolerance": gradient_tolerance,
        "control_errors": control_errors,
        "dtype": scale.dtype,
        "interpreted": row.implementation == "gpu" and not on_gpu,
        "passed": good and min(control_errors.values()) > tolerance,
    }


def how(on_gpu: bool) -> dict[str, Any]:
    """How our kernels run: without a GPU interpreted, in blocks so small that a few tokens need several."""
    return {"block_sizes": None if on_gpu else TOY_BLOCKS, "interpret": not on_gpu}


def in_parts(q, k, v, query_map, key_map, *, num_softmax, key_valid, stabilizer, **how: Any) -> jax.Array:
    """`hybrid_attention` by `linear_state` and `attend_with_state`."""
    cut = lambda keys: jax.tree.map(lambda x: x[:, keys], (k, v, key_valid))
    (k_S, v_S, valid_S), (k_L, v_L, valid_L) = cut(slice(num_softmax)), cut(slice(num_softmax, None))
    state = gpu.linear_state(k_L, v_L, key_map, key_valid=valid_L, **how)
    return gpu.attend_with_state(q, k_S, v_S, query_map, state, key_valid=valid_S, stabilizer=stabilizer, **how)


def zones_test(row: Row, scale: Scale, on_gpu: bool) -> dict[str, Any]:
    """Like `kernel_test`, for `softmax_zones`, which has no gradients. Its error is that of the worst result."""
    (q, k, v, *_), _, valid = problem(row, scale.dtype)
    bounds = tuple(-(-k.shape[1] // rate) for rate in (8, 4, 2, 1))
    found = jax.jit(functools.partial(gpu.softmax_zones, bounds=bounds, key_valid=valid, **how(on_gpu)))(q, k, v)
    with jax.default_matmul_precision("highest"):
        exact = [x.astype(jnp.float32) for x in (q, k, v)]
        plain = jax.jit(functools.partial(reference.softmax_zones, bounds=bounds))
        expected, unmasked = plain(*exact, key_valid=valid), plain(*exact)
    error, tolerance = max(map(relative, found, expected)), TOLERANCES[scale.dtype][0]
    control_errors = {"other prefixes": relative(expected[0][:-1], expected[0][1:])}
    if valid is not None:
        control_errors["padding not masked"] = relative(unmasked[0], expected[0])
    return {
        "error": error,
        "tolerance": tolerance,
        "control_errors": control_errors,
        "dtype": scale.dtype,
        "interpreted": not on_gpu,
        "passed": error <= tolerance and min(control_errors.values()) > tolerance,
    }


def num_softmax(row: Row) -> int:
    assert row.tokens is not None and row.rate is not None
    return 0 if isinstance(row.rate, str) else -(-row.tokens // row.rate)


def problem(row: Row, dtype: str) -> tuple[tuple, jax.Array, jax.Array | None]:
    """(q, k, v, query map, key map), the cotangent of y, and a mask of valid keys. The first key is always valid."""
    assert row.tokens is not None and row.head_dim is not None
    rng = np.random.default_rng(0)
    shape = BATCH, row.tokens, HEADS, row.head_dim
    q, k, v, dy = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    # Rounded to the kernels' dtype, so that rounding the weights adds nothing to the error.
    rounded = lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), dtype).astype(jnp.float32)
    maps = [init_polynomial_map(jax.random.key(seed), HEADS, row.head_dim) for seed in (1, 2)]
    query_map, key_map = (None, None) if row.rate == 1 else jax.tree.map(rounded, maps)
    valid = jnp.asarray(rng.random(shape[:2]) < 0.7).at[:, 0].set(True) if row.masked else None
    if row.rate not in (1, "linear"):
        key_map = balanced(row, q, k, query_map, key_map, valid)
    return (q, k, v, query_map, key_map), dy, valid


def balanced(row: Row, q: jax.Array, k: jax.Array, query_map: Any, key_map: Any, valid: jax.Array | None) -> Any:
    """The key map, scaled so that softmax and linear keys get about the same attention mass, as after distillation."""
    options = {"num_softmax": num_softmax(row), "key_valid": valid, "stabilizer": row.stabilizer}
    share = reference.softmax_share(q.astype(jnp.float32), k.astype(jnp.float32), query_map, key_map, **options)
    return dataclasses.replace(key_map, log_scale=key_map.log_scale - jnp.log(1 / share - 1).mean())


def value_and_gradients(attend: Callable, arguments: tuple, dy: jax.Array) -> tuple[jax.Array, tuple]:
    y, pullback = jax.vjp(attend, *arguments)
    return y, pullback(dy)


def controls(arguments: tuple, options: dict[str, Any]) -> dict[str, Callable[[], jax.Array]]:
    """Wrong attentions, computed by the reference. Each must differ from the right one, or the test proves nothing."""
    q, k, v, *maps = arguments
    count, length, valid = options["num_softmax"], k.shape[1], options["key_valid"]
    attend = functools.partial(reference.hybrid_attention, **options)
    wrong: dict[str, Callable[[], jax.Array]] = {}
    if 0 < count < length:
        prefix = {"num_softmax": count, "key_valid": None if valid is None else valid[:, :count]}
        wrong["without the linear term"] = lambda: attend(q, k[:, :count], v[:, :count], None, None, **prefix)
        rolled = [jnp.roll(x, 1, axis=1) for x in (k, v)]
        mask = None if valid is None else jnp.roll(valid, 1, axis=1).at[:, 0].set(True)
        wrong["another lattice"] = lambda: attend(q, *rolled, *maps, key_valid=mask)
    if valid is not None:
        wrong["padding not masked"] = lambda: attend(q, k, v, *maps, key_valid=None)
    if count == 0:
        wrong["softmax in place of it"] = lambda: attend(q, k, v, None, None, num_softmax=length)
    return wrong


def by_argument(cotangents: tuple) -> list[jax.Array]:
    """One vector for each argument that has a gradient. All of a map's leaves are one vector: the gradient of its scale
    alone may be nothing but noise."""
    leaves = [[leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(cotangent)] for cotangent in cotangents]
    return [jnp.concatenate(parts) for parts in leaves if parts]


def relative(actual: jax.Array, expected: jax.Array) -> float:
    """|actual - expected| / |expected|, Euclidean norms in float64."""
    actual64, expected64 = (np.asarray(x.astype(jnp.float32), np.float64) for x in (actual, expected))
    return float(np.linalg.norm(actual64 - expected64) / np.linalg.norm(expected64))
