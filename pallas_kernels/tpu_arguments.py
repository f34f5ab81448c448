"""Arguments of the public functions on TPU: what the kernels support, and the static `Problem` they make up."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.feature_map import FeatureMap, PolynomialMap
from pallas_kernels.tpu_problem import BlockSizes, Problem

# The sizes that are others on a chip in static estimates. A v6e's matrix units have 256 rows and columns.
BLOCKS_OF_CHIP = {"v6e": {"value_columns": 256, "key_chunk": 256}}


def default_blocks(chip: str) -> BlockSizes:
    """The best sizes in static estimates, whatever the problem."""
    return BlockSizes(**BLOCKS_OF_CHIP.get(chip, {}))


def blocks_for(chip: str, num_keys: int, num_softmax: int) -> BlockSizes:
    """The sizes that `tuning` has for a chip, or else the best in static estimates for v6e and v5e.

    If all softmax keys are one step of the backward pass, no dq is kept in VMEM, which leaves room for more queries.
    """
    defaults = default_blocks(chip)
    one_step = {"backward_query": 2048} if num_softmax <= defaults.backward_key else {}
    return dataclasses.replace(defaults, **(one_step | tuning.lookup(chip, num_keys, num_softmax)))


def problem_of(q, k, phi, num_softmax, key_valid, stabilizer, block_sizes, interpret) -> Problem:
    batch, num_queries, heads, width = q.shape
    num_keys = k.shape[1]
    if block_sizes is None:
        block_sizes = blocks_for(tuning.current_chip(), num_keys, num_softmax)
    return Problem(
        batch=batch,
        num_queries=num_queries,
        num_keys=num_keys,
        num_softmax=num_softmax,
        heads=heads,
        width=width,
        dtype=q.dtype,
        stabilizer=stabilizer,
        masked=key_valid is not None,
        degree=phi.degree if phi else 1,
        activation=phi.activation if phi else "relu",
        blocks=block_sizes.fit(num_queries, num_keys, num_softmax),
        interpret=interpret,
    )


def as_row(key_valid: jax.Array | None) -> jax.Array | None:
    """key_valid as the kernels take it: float32 [B, 1, M]."""
    return None if key_valid is None else key_valid[:, None].astype(jnp.float32)


def polynomial(name: str, phi: FeatureMap | None) -> PolynomialMap | None:
    if phi is None or isinstance(phi, PolynomialMap):
        return phi
    raise NotImplementedError(
        f"implementation 'tpu': {name} is a {type(phi).__name__}; the kernels compute PolynomialMap alone"
    )


def check(q, k, v, query_map, key_map, interpret) -> None:
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


def scaled(state_and_z: tuple[jax.Array, jax.Array], log_scale_H: jax.Array) -> tuple[jax.Array, jax.Array]:
    (state, z), scale_H = state_and_z, jnp.exp(log_scale_H)
    return state * scale_H[None, :, None, None], z * scale_H[None, :, None]


def head_product(x_BxHx: jax.Array, y_BxHx: jax.Array) -> jax.Array:
    """[H]: the sum of x y over all axes but the second."""
    return (x_BxHx * y_BxHx).sum(axis=(0, *range(2, x_BxHx.ndim)))
