"""Softmax over nested prefixes of the keys on GPUs: one flash kernel, which leaves a result where each prefix ends."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.gpu_forward import (
    LOG2_E,
    MASKED,
    Options,
    add_tile,
    as_mask,
    attended_keys,
    block_range,
    call_kernel,
    head_spec,
    input_specs,
    load_rows,
    nbytes,
    scores,
)
from pallas_kernels.reference import Zones


def softmax_zones(options: Options, bounds: tuple[int, ...], q, k, v, valid) -> Zones:
    """See `pallas_kernels.softmax_zones`; `bounds` ascend, and the last of them is the number of softmax keys."""
    batch, num_queries, heads, width = q.shape
    per_row = jax.ShapeDtypeStruct((len(bounds), batch, heads, num_queries), jnp.float32)
    outs = jax.ShapeDtypeStruct((len(bounds), *q.shape), jnp.float32), per_row, per_row
    arguments = q, k, v, as_mask(valid)
    pairs = batch * heads * num_queries * bounds[-1]
    y, lse, largest = call_kernel(
        partial(zones_kernel, bounds=bounds, options=options),
        (pl.cdiv(num_queries, options.blocks.query), heads, batch),
        arguments,
        input_specs(*arguments),
        outs,
        tuple(head_spec(out, axes) for out, axes in zip(outs, ("zbnhd", "zbhn", "zbhn"), strict=True)),
        pl.CostEstimate(
            flops=4 * pairs * width,
            transcendentals=pairs,
            bytes_accessed=nbytes((q, outs)) + nbytes((k, v)) * bounds[-1] // k.shape[1],
        ),
        options.interpret,
    )
    return y, lse.swapaxes(2, 3), largest.swapaxes(2, 3)


def zones_kernel(q_ref, k_ref, v_ref, valid_ref, y_ref, lse_ref, largest_ref, *, bounds, options: Options):
    """Flash attention of one block of queries, whose tiles of keys start anew where a prefix ends."""
    num_queries, block = q_ref.shape[0], options.blocks.key
    rows, in_range = block_range(pl.program_id(0), options.blocks.query, num_queries)
    q = load_rows(q_ref, rows, in_range)
    n = jnp.zeros(in_range.shape, jnp.float32)
    sums = jnp.zeros(q.shape, jnp.float32), n, jnp.full_like(n, MASKED)
    for zone, (start, stop) in enumerate(pairwise((0, *bounds))):

        def tile(number, sums, start=start, stop=stop):
            keys, attended = block_range(number, block, stop, start)
            k, v = load_rows(k_ref, keys, attended), load_rows(v_ref, keys, attended)
            return add_tile(scores(q, k, attended_keys(valid_ref, keys, attended)), v, *sums)

        sums = lax.fori_loop(0, pl.cdiv(stop - start, block), tile, sums)
        o, n, highest = sums
        zone = jnp.int32(zone)  # the interpreter has no indices that are Python's
        triton.store(y_ref.at[zone, rows, :], o / n[:, None], mask=in_range[:, None])
        triton.store(lse_ref.at[zone, rows], (highest + jnp.log2(n)) / LOG2_E, mask=in_range)
        triton.store(largest_ref.at[zone, rows], highest / LOG2_E, mask=in_range)
