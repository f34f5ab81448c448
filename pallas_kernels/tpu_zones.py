"""Softmax over nested prefixes of the keys on TPU: one flash kernel, which leaves a result where each prefix ends."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_forward import add_tile
from pallas_kernels.tpu_problem import LANES, LOG2_E, MASKED, Problem, row, within


@dataclasses.dataclass(frozen=True)
class Segment:
    """Keys `low` to `high` of a step's block; `prefix` is the number of the prefix that ends there, or None."""

    low: int
    high: int
    prefix: int | None


def segments_of_steps(bounds: tuple[int, ...], keys: int) -> list[list[Segment]]:
    """For every block of `keys` keys, its parts between the ends of prefixes. The last block may be partial."""
    steps = []
    for start in range(0, bounds[-1], keys):
        stop, low, parts = min(start + keys, bounds[-1]), 0, []
        for number, bound in enumerate(bounds):
            if start < bound <= stop:
                parts.append(Segment(low, bound - start, number))
                low = bound - start
        if start + low < stop:
            parts.append(Segment(low, stop - start, None))
        steps.append(parts)
    return steps


def softmax_zones(problem: Problem, bounds: tuple[int, ...], q, k, v, valid) -> tuple[list[jax.Array], jax.Array]:
    """For every prefix the output, packed, float32, and all log-sum-exps and largest scores, [B, H, Z, 2, N].

    q, k, v are packed. `bounds` ascend. A step without the end of a prefix, of which there are most, has one body of
    code; each of the others has its own.
    """
    queries, keys, chunk = problem.blocks.query, problem.blocks.key, problem.blocks.key_chunk
    steps, scale = segments_of_steps(bounds, keys), problem.width**-0.5 * LOG2_E
    whole, masks = [Segment(0, keys, None)], [valid] if problem.masked else []
    special = {number: parts for number, parts in enumerate(steps) if parts != whole}

    def kernel(q_ref, k_ref, v_ref, *refs):
        valid_refs, refs = refs[: len(masks)], refs[len(masks) :]
        *y_refs, stats_ref, max_ref, sum_ref, out_ref = refs
        step = pl.program_id(3)

        @pl.when(step == 0)
        def _():
            max_ref[...] = jnp.full_like(max_ref, MASKED)
            sum_ref[...] = jnp.zeros_like(sum_ref)
            out_ref[...] = jnp.zeros_like(out_ref)

        def attend_to(low, high):
            q_QxD = q_ref[...]
            peak, total, o = max_ref[...], sum_ref[...], out_ref[...]
            stop = -(-high // LANES) * LANES
            for start in range(low // LANES * LANES, stop, chunk):  # at most a tile of LANES keys is taken twice
                size = min(chunk, stop - start)
                piece = pl.ds(start, size)
                s = problem.dot(q_QxD, k_ref[piece, :], (1, 1)) * scale
                v_SxD = v_ref[piece, :]
                if start < low or start + size > high:
                    s = jnp.where(within(start, size, low, high, 1), s, MASKED)
                if start + size > high:  # past the last key the block holds anything, even NaN
                    v_SxD = jnp.where(within(start, size, 0, high, 0), v_SxD, 0)
                for valid_ref in valid_refs:
                    s = jnp.where(valid_ref[:, piece] > 0, s, MASKED)
                peak, total, o = add_tile(problem, s, v_SxD, peak, total, o)
            max_ref[...], sum_ref[...], out_ref[...] = peak, total, o

        def leave(prefix):
            mass = sum_ref[...].sum(axis=1, keepdims=True)
            y_refs[prefix][...] = out_ref[...] / mass
            peak = max_ref[...]
            first_lane = lax.broadcasted_iota(jnp.int32, peak.shape, 1) == 0
            stats_ref[prefix] = jnp.where(first_lane, peak + jnp.log2(mass), peak).T[:2] / LOG2_E

        def run(parts):
            for part in parts:
                attend_to(part.low, part.high)
                if part.prefix is not None:
                    leave(part.prefix)

        if len(special) < len(steps):
            ordinary = step >= 0
            for number in special:
                ordinary &= step != number
            pl.when(ordinary)(lambda: run(whole))
        for number, parts in special.items():
            pl.when(step == number)(lambda parts=parts: run(parts))

    prefixes, lanes = len(bounds), pltpu.VMEM((queries, LANES), jnp.float32)
    *outputs, stats = problem.call(
        kernel,
        "softmax_zones",
        (pl.cdiv(problem.num_queries, queries), len(steps)),
        parallel=1,
        flops=4 * problem.num_queries * bounds[-1] * problem.width,
        exps=problem.num_queries * bounds[-1],
        in_specs=[
            problem.tokens(queries, lambda i, j: i),
            problem.tokens(keys, lambda i, j: j),
            problem.tokens(keys, lambda i, j: j),
            *(row(keys, lambda i, j: j) for _ in masks),
        ],
        out_specs=[
            *(problem.tokens(queries, lambda i, j: i) for _ in bounds),
            pl.BlockSpec((None, None, prefixes, 2, queries), lambda b, h, i, j: (b, h, 0, 0, i)),
        ],
        out_shape=[
            *(jax.ShapeDtypeStruct(problem.packed_shape(problem.num_queries), jnp.float32) for _ in bounds),
            jax.ShapeDtypeStruct((problem.batch, problem.heads, prefixes, 2, problem.num_queries), jnp.float32),
        ],
        scratch_shapes=[lanes, lanes, pltpu.VMEM((queries, problem.width), jnp.float32)],
    )(q, k, v, *masks)
    return outputs, stats
