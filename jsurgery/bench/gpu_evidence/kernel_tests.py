"""Attention kernels and their gradients beside the plain reference in float32, and controls that must not agree."""

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
# Largest relative error (of the Euclidean norm) of y, and of the cotangent of any argument: five times what the kernels
# interpreted on a CPU differ by in bfloat16, a thousand times in float32.
TOLERANCES = {"bfloat16": (0.01, 0.02), "float32": (1e-4, 1e-3)}
TOY_BLOCKS = gpu.BlockSizes(query=16, key=16, backward=16)


def kernel_test(row: Row, scale: Scale, on_gpu: bool) -> dict[str, Any]:
    """Errors of y and of gradients, and the least error of a control: {"passed": ...} beside the numbers."""
    arguments, dy, valid = problem(row, scale.dtype)
    options = {"num_softmax": num_softmax(row), "stabilizer": row.stabilizer, "key_valid": valid}
    if row.implementation == "stock":
        kernel = functools.partial(stock.hybrid_attention, platform="gpu" if on_gpu else "cpu", **options)
    else:
        blocks = None if on_gpu else TOY_BLOCKS
        kernel = functools.partial(gpu.hybrid_attention, block_sizes=blocks, interpret=not on_gpu, **options)
    found = jax.jit(functools.partial(value_and_gradients, kernel))(arguments, dy)
    with jax.default_matmul_precision("highest"):
        exact, wide_dy = jax.tree.map(lambda x: x.astype(jnp.float32), (arguments, dy))
        plain = functools.partial(reference.hybrid_attention, **options)
        expected = jax.jit(functools.partial(value_and_gradients, plain))(exact, wide_dy)
        y = expected[0]
        control_errors = {name: relative(wrong(), y) for name, wrong in controls(exact, options).items()}
    error, gradient_error = relative(found[0], y), max(map(relative, whole(found[1]), whole(expected[1])))
    tolerance, gradient_tolerance = TOLERANCES[scale.dtype]
    # Written so that an error that is NaN fails.
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


def num_softmax(row: Row) -> int:
    assert row.tokens is not None and row.rate is not None
    return 0 if isinstance(row.rate, str) else -(-row.tokens // row.rate)


def problem(row: Row, dtype: str) -> tuple[tuple, jax.Array, jax.Array | None]:
    """(q, k, v and two maps), the cotangent of y, and which keys are valid: of all the first is."""
    assert row.tokens is not None and row.head_dim is not None
    rng = np.random.default_rng(0)
    shape = BATCH, row.tokens, HEADS, row.head_dim
    q, k, v, dy = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    # In numbers that the kernels' products represent, so that none of the error is that of rounding the weights.
    rounded = lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), dtype).astype(jnp.float32)
    maps = [init_polynomial_map(jax.random.key(seed), HEADS, row.head_dim) for seed in (1, 2)]
    query_map, key_map = (None, None) if row.rate == 1 else jax.tree.map(rounded, maps)
    valid = jnp.asarray(rng.random(shape[:2]) < 0.7).at[:, 0].set(True) if row.masked else None
    if row.rate not in (1, "linear"):
        key_map = balanced(row, q, k, query_map, key_map, valid)
    return (q, k, v, query_map, key_map), dy, valid


def balanced(row: Row, q: jax.Array, k: jax.Array, query_map: Any, key_map: Any, valid: jax.Array | None) -> Any:
    """The key's map, scaled so that softmax and linear keys weigh alike, as distillation leaves them."""
    options = {"num_softmax": num_softmax(row), "key_valid": valid, "stabilizer": row.stabilizer}
    share = reference.softmax_share(q.astype(jnp.float32), k.astype(jnp.float32), query_map, key_map, **options)
    return dataclasses.replace(key_map, log_scale=key_map.log_scale - jnp.log(1 / share - 1).mean())


def value_and_gradients(attend: Callable, arguments: tuple, dy: jax.Array) -> tuple[jax.Array, tuple]:
    y, pullback = jax.vjp(attend, *arguments)
    return y, pullback(dy)


def controls(arguments: tuple, options: dict[str, Any]) -> dict[str, Callable[[], jax.Array]]:
    """What is not the attention that was asked for, by the reference: a test that takes it for right tests nothing."""
    q, k, v, *maps = arguments
    count, length, valid = options["num_softmax"], k.shape[1], options["key_valid"]
    attend = functools.partial(reference.hybrid_attention, **options)
    found: dict[str, Callable[[], jax.Array]] = {}
    if 0 < count < length:
        prefix = {"num_softmax": count, "key_valid": None if valid is None else valid[:, :count]}
        found["without the linear term"] = lambda: attend(q, k[:, :count], v[:, :count], None, None, **prefix)
        rolled = [jnp.roll(x, 1, axis=1) for x in (k, v)]
        mask = None if valid is None else jnp.roll(valid, 1, axis=1).at[:, 0].set(True)
        found["another lattice"] = lambda: attend(q, *rolled, *maps, key_valid=mask)
    if valid is not None:
        found["padding not masked"] = lambda: attend(q, k, v, *maps, key_valid=None)
    if count == 0:
        found["softmax in place of it"] = lambda: attend(q, k, v, None, None, num_softmax=length)
    return found


def whole(cotangents: tuple) -> list[jax.Array]:
    """One vector for each argument that has a cotangent: that of a map's scale alone may be nothing but noise."""
    leaves = [[leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(cotangent)] for cotangent in cotangents]
    return [jnp.concatenate(parts) for parts in leaves if parts]


def relative(found: jax.Array, expected: jax.Array) -> float:
    """The norm of the difference in units of the norm of what is expected."""
    found64, expected64 = (np.asarray(x.astype(jnp.float32), np.float64) for x in (found, expected))
    return float(np.linalg.norm(found64 - expected64) / np.linalg.norm(expected64))
