"""Block-sparse softmax on TPU: kernels that keep a head's keys and values in VMEM and pick blocks out of them.

A block of 64 keys that is fetched from HBM for 64 queries does 64 FLOPs a byte, where a v5e needs 240 and a v6e 560 to
be busy. In VMEM, where all query blocks of a head find them, keys and values are read from HBM once. The lists of
blocks lie in scalar memory.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.reference import SPARSE_EPSILON
from pallas_kernels.tpu_forward import add_tile
from pallas_kernels.tpu_problem import (
    LANES,
    LOG2_E,
    MASKED,
    VMEM_LIMIT,
    Problem,
    lane_sums,
    take,
    whole,
    within,
    zero_at,
)

TILE_SCORES = 2**19  # about the scores of one tile, forward: one chain of products for most lists
BACKWARD_TILE_KEYS = 256
STATE_KEYS = 2048  # of a step of the linear branch's state
IN_TURN = 4  # query blocks whose products and exponentials may run beside each other: a divisor of 8
STEP_QUERIES = 1024  # about the queries of one step of the grid
ROWS = 16  # tokens of which blocks are multiples: two rows of sublanes in bfloat16
RESIDENT = VMEM_LIMIT * 3 // 4  # bytes of a head's keys and values
SEGMENT_KEYS = 16384  # about the keys whose gradients the backward keeps in VMEM, in float32


@dataclasses.dataclass(frozen=True)
class Routed:
    """The static arguments of one call, beside those of the `Problem`."""

    block_q: int
    block_k: int
    top_k: int
    step_queries: int = STEP_QUERIES
    segment_keys: int = SEGMENT_KEYS

    @property
    def group(self) -> int:
        """Query blocks of a step: at most those in turn, or whole rows of them."""
        blocks = max(self.step_queries // self.block_q, 1)
        return blocks if blocks <= IN_TURN else max(blocks // 8, 1) * 8

    @property
    def in_turn(self) -> int:
        return min(self.group, IN_TURN)

    @property
    def rows(self) -> int:
        """Queries of a step."""
        return self.group * self.block_q

    def blocks_of(self, keys: int) -> int:
        """Key blocks of a tile of about so many keys, in whole lanes."""
        step = LANES // math.gcd(LANES, self.block_k)
        return max(keys // self.block_k // step, 1) * step

    def groups(self, lists: jax.Array, steps: int) -> jax.Array:
        """Numbers of every query block, int32 [B, H, query blocks, X] -> [B, H, steps, 1, group * X], zeros at the end.

        A row of numbers per step, since scalar memory pads every row.
        """
        batch, heads, blocks, count = lists.shape
        lists = jnp.pad(lists, ((0, 0), (0, 0), (0, steps * self.group - blocks), (0, 0)))
        return lists.reshape(batch, heads, steps, 1, self.group * count)


def _scalars(count: int, index) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, None, 1, count), lambda b, h, *g: (b, h, index(*g), 0, 0), memory_space=pltpu.SMEM)


def _resident(problem: Problem, size: int, index) -> pl.BlockSpec:
    """`Problem.tokens` for blocks that stay, in one buffer where two would take more than half of VMEM."""
    spec = problem.tokens(size, index)
    if 4 * size * problem.width * jnp.dtype(problem.dtype).itemsize <= VMEM_LIMIT // 2 + VMEM_LIMIT // 8:
        return spec
    return pl.BlockSpec(spec.block_shape, spec.index_map, pipeline_mode=pl.Buffered(1))


def _per_block(routed: Routed, index) -> pl.BlockSpec:
    """The block spec for a number of every query, [B, H, query blocks, block_q]."""
    return pl.BlockSpec((None, None, routed.group, routed.block_q), lambda b, h, *g: (b, h, index(*g), 0))


def _rows_of(ref, number: Any, size: int) -> jax.Array:
    return ref[pl.ds(pl.multiple_of(number * size, size), size), :]


def zero_tail(now: Any, length: int, *refs: Any) -> None:
    """Fills the rows of blocks from `length` on with zeros."""

    @pl.when(now)
    def _():
        for ref in refs:
            ref[length:, :] = jnp.zeros((ref.shape[0] - length, ref.shape[1]), ref.dtype)


def _only_tile(problem: Problem, s_QxS: jax.Array, v_SxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`add_tile` where there is one tile."""
    peak = jnp.broadcast_to(s_QxS.max(axis=1, keepdims=True), (s_QxS.shape[0], LANES))
    p_QxS = jnp.exp2(s_QxS - jnp.concatenate([peak] * (s_QxS.shape[1] // LANES), axis=1))
    o_QxD, total = problem.weigh(p_QxS, v_SxD)
    return peak, total, o_QxD


def linear_state(problem: Problem, k, v) -> tuple[jax.Array, jax.Array]:
    """S [B, H, D, D] and z [B, H, D] of all keys, packed, where phi is the softmax over channels; float32."""
    size, width = STATE_KEYS, problem.width

    def kernel(k_ref, v_ref, state_ref, z_ref):
        step = pl.program_id(2)
        zero_at(step == 0, [state_ref, z_ref])
        # Channels along sublanes: sums over them need no shuffle of lanes, and the product no transpose.
        phi_DxT, v_TxD = jax.nn.softmax(k_ref[...].astype(jnp.float32).T, axis=0), v_ref[...]
        if problem.num_keys % size:
            phi_DxT = jnp.where(within(step * size, size, 0, problem.num_keys, 1), phi_DxT, 0.0)
            v_TxD = jnp.where(within(step * size, size, 0, problem.num_keys, 0), v_TxD, 0)
        state_ref[...] += problem.dot(phi_DxT, v_TxD)
        z_ref[...] += lane_sums(phi_DxT)

    tokens = problem.tokens(size, lambda step: step)
    f32 = lambda *shape: jax.ShapeDtypeStruct((problem.batch, problem.heads, *shape), jnp.float32)
    state, z = problem.call(
        kernel,
        "sparse_state",
        (pl.cdiv(problem.num_keys, size),),
        parallel=0,
        flops=2 * problem.num_keys * width * width,
        exps=problem.num_keys * width,
        in_specs=[tokens, tokens],
        out_specs=[whole(width, width, per_batch=True), whole(width, LANES, per_batch=True)],
        out_shape=[f32(width, width), f32(width, LANES)],
    )(k, v)
    return state, z.sum(axis=-1)


def attend_to_lists(
    problem: Problem, routed: Routed, q, k, v, lists, state, z, bias, *, with_stats: bool
) -> tuple[jax.Array, jax.Array | None]:
    """y, packed, and with_stats the log-sum-exps in log 2, float32 [B, H, query blocks, block_q].

    Args:
        q, k, v: packed.
        lists: int32 [B, H, query blocks, top-k].
        state, z: the projected state [B, H, D, D] and z [B, H, D] of the linear branch.
        bias: of the projection, [D].
    """
    block_q, block_k, top_k, width = routed.block_q, routed.block_k, routed.top_k, problem.width
    key_blocks = -(-problem.num_keys // block_k)
    steps = -(-problem.num_queries // routed.rows)
    per_tile = routed.blocks_of(TILE_SCORES // block_q)
    smallest, alone = routed.blocks_of(1), top_k <= routed.blocks_of(TILE_SCORES // block_q)
    scale = width**-0.5 * LOG2_E
    resident, ragged = key_blocks * block_k, problem.num_keys % block_k > 0

    def kernel(list_ref, q_ref, k_ref, v_ref, state_ref, z_ref, bias_ref, *refs):
        refs = iter(refs)
        (y_ref,) = take(refs, 1)
        (lse_ref,) = take(refs, 1, with_stats)
        if ragged:  # what lies beyond the last key may be anything, NaN too
            zero_tail(pl.program_id(2) == 0, problem.num_keys, v_ref)

        def tile(block, q_QxD, first):
            """Scores of a block of queries to its keys from entry `first` on, and these keys' values."""
            real = min(per_tile, top_k - first)
            count = -(-real // smallest) * smallest
            numbers = [list_ref[0, block * top_k + min(first + i, top_k - 1)] for i in range(count)]
            k_SxD, v_SxD = (jnp.concatenate([_rows_of(x, n, block_k) for n in numbers]) for x in (k_ref, v_ref))
            s = problem.dot(q_QxD, k_SxD, (1, 1)) * scale
            if first + real == top_k and (ragged or count > real):  # as lists ascend, all others are whole
                there = jnp.minimum(problem.num_keys - numbers[real - 1] * block_k, block_k)
                end, start = (real - 1) * block_k, (real - 1) * block_k // LANES * LANES
                inside = within(start, count * block_k - start, 0, end + there, 1)
                masked = jnp.where(inside, s[:, start:], MASKED)
                s = jnp.concatenate([s[:, :start], masked], axis=1) if start else masked
            return s, v_SxD

        def attend(turn, _):
            """Blocks of queries in turn, so that one's products run beside the other's exponentials."""
            blocks = [turn * routed.in_turn + i for i in range(routed.in_turn)]
            rows = [pl.ds(pl.multiple_of(block * block_q, block_q), block_q) for block in blocks]
            queries = [q_ref[each, :] for each in rows]
            column, wide = jnp.zeros((block_q, LANES), jnp.float32), jnp.zeros((block_q, width), jnp.float32)
            sums = [(column + MASKED, column, wide)] * len(blocks)
            for first in range(0, top_k, per_tile):
                tiles = [tile(block, q_QxD, first) for block, q_QxD in zip(blocks, queries, strict=True)]
                if alone:
                    sums = [_only_tile(problem, *each) for each in tiles]
                else:
                    sums = [add_tile(problem, *each, *before) for each, before in zip(tiles, sums, strict=True)]
            for block, each, q_QxD, (peak, total, o) in zip(blocks, rows, queries, sums, strict=True):
                mass = total.sum(axis=1, keepdims=True)
                phi_QxD = jax.nn.softmax(q_QxD.astype(jnp.float32), axis=-1)
                n_L = SPARSE_EPSILON + (phi_QxD * z_ref[...]).sum(axis=1, keepdims=True)
                linear_QxD = problem.dot(phi_QxD, state_ref[...]) / n_L + bias_ref[...]
                y_ref[each, :] = (o / mass + linear_QxD).astype(y_ref.dtype)
                if with_stats:
                    lse_ref[pl.ds(block, 1), :] = (peak + jnp.log2(mass)).T[:1]

        if routed.group == routed.in_turn:
            attend(0, None)
        else:
            lax.fori_loop(0, routed.group // routed.in_turn, attend, None)

    tokens = problem.tokens(routed.rows, lambda g: g)
    keys = _resident(problem, resident, lambda g: 0)
    out_specs = [tokens]
    out_shape = [jax.ShapeDtypeStruct(problem.packed_shape(problem.num_queries), problem.dtype)]
    if with_stats:
        out_specs.append(_per_block(routed, lambda g: g))
        shape = problem.batch, problem.heads, steps * routed.group, block_q
        out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    pairs = problem.num_queries * top_k * block_k
    y, *stats = problem.call(
        kernel,
        "sparse_attend",
        (steps,),
        parallel=0,
        flops=4 * pairs * width + 2 * problem.num_queries * width * (width + 1),
        exps=pairs + problem.num_queries * width,
        in_specs=[
            _scalars(routed.group * top_k, lambda g: g),
            tokens,
            keys,
            keys,
            whole(width, width, per_batch=True),
            whole(1, width, per_batch=True),
            pl.BlockSpec((1, width), lambda b, h, g: (0, 0)),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
    )(routed.groups(lists, steps), q, k, v, state.astype(problem.dtype), z[:, :, None], bias[None])
    return y, stats[0][:, :, : lists.shape[2]] if stats else None


def lists_backward(problem: Problem, routed: Routed, q, k, v, lists, dy, lse, delta) -> tuple[Any, Any, Any]:
    """(dq, dk, dv), packed, of the softmax branch.

    The gradients of a segment of keys stay in VMEM while the kernel runs over the queries. Lists are ascending, so a
    query block's entries of a segment come one after another. dq is summed over the segments.

    Args:
        lse, delta: float32 [B, H, query blocks, block_q], zero after the last query; delta = dy . (softmax output).
    """
    block_q, block_k, top_k, width = routed.block_q, routed.block_k, routed.top_k, problem.width
    key_blocks = -(-problem.num_keys // block_k)
    segment = min(key_blocks, max(routed.segment_keys // block_k, 1))
    segments = -(-key_blocks // segment)
    segment = -(-key_blocks // segments)
    steps = -(-problem.num_queries // routed.rows)
    per_tile = routed.blocks_of(BACKWARD_TILE_KEYS)
    scale = width**-0.5
    size = segment * block_k
    edges = segment * jnp.arange(segments + 1)
    first_entries = (lists[..., None, :] < edges[None, None, None, :, None]).sum(axis=-1, dtype=jnp.int32)

    def kernel(list_ref, entry_ref, q_ref, dy_ref, lse_ref, delta_ref, k_ref, v_ref, *refs):
        dq_ref, dk_ref, dv_ref, dk_sum, dv_sum = refs
        part, step = pl.program_id(2), pl.program_id(3)
        zero_at(step == 0, [dk_sum, dv_sum])
        tail = problem.num_keys - (segments - 1) * size
        if tail < size:
            zero_tail((step == 0) & (part == segments - 1), tail, k_ref, v_ref)

        def backward(block, _):
            queries = pl.ds(pl.multiple_of(block * block_q, block_q), block_q)
            q_QxD, dy_QxD = q_ref[queries, :], dy_ref[queries, :]
            if problem.num_queries % routed.rows:
                inside = within(step * routed.rows + block * block_q, block_q, 0, problem.num_queries, 0)
                q_QxD, dy_QxD = jnp.where(inside, q_QxD, 0), jnp.where(inside, dy_QxD, 0)
            lse, delta = lse_ref[pl.ds(block, 1), :], delta_ref[pl.ds(block, 1), :]
            start = entry_ref[0, block * (segments + 1) + part]
            stop = entry_ref[0, block * (segments + 1) + part + 1]

            def tile(number, dq_QxD):
                entries = [start + number * per_tile + i for i in range(per_tile)]
                listed = [list_ref[0, block * top_k + jnp.minimum(entry, top_k - 1)] for entry in entries]
                places = [jnp.clip(j - part * segment, 0, segment - 1) for j in listed]
                k_SxD, v_SxD = (jnp.concatenate([_rows_of(x, n, block_k) for n in places]) for x in (k_ref, v_ref))
                row = lax.broadcasted_iota(jnp.int32, (block_k, 1), 0)
                ends = [
                    jnp.where(entry < stop, problem.num_keys - j * block_k, 0)
                    for entry, j in zip(entries, listed, strict=True)
                ]
                counts = jnp.concatenate([jnp.where(row < end, 1, 0) for end in ends])
                s = problem.dot(k_SxD, q_QxD, (1, 1)) * (scale * LOG2_E)
                p = jnp.exp2(jnp.where(counts > 0, s, MASKED) - lse)
                ds = (p * (problem.dot(v_SxD, dy_QxD, (1, 1)) - delta)).astype(problem.dtype)
                dk_SxD, dv_SxD = problem.dot(ds, q_QxD), problem.dot(p, dy_QxD)
                for i, place in enumerate(places):
                    rows = pl.ds(pl.multiple_of(place * block_k, block_k), block_k)
                    dk_sum[rows, :] += dk_SxD[i * block_k : (i + 1) * block_k]
                    dv_sum[rows, :] += dv_SxD[i * block_k : (i + 1) * block_k]
                return dq_QxD + problem.dot(ds, k_SxD, (0, 0))

            tiles = lax.div(stop - start + per_tile - 1, per_tile)
            dq_QxD = lax.fori_loop(0, tiles, tile, jnp.zeros((block_q, width), jnp.float32))
            dq_ref[queries, :] = (dq_QxD * scale).astype(dq_ref.dtype)

        lax.fori_loop(0, routed.group, backward, None)

        @pl.when(step == steps - 1)
        def _():
            dk_ref[...] = (dk_sum[...] * scale).astype(dk_ref.dtype)
            dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    tokens = problem.tokens(routed.rows, lambda s, g: g)
    numbers = _per_block(routed, lambda s, g: g)
    keys = problem.tokens(size, lambda s, g: s)
    part = problem.tokens(routed.rows, lambda s, g: g)
    shape = (segments, *problem.packed_shape(problem.num_queries))
    of_segment = pl.BlockSpec((None, *part.block_shape), lambda b, h, s, g: (s, *part.index_map(b, h, s, g)))  # type: ignore[misc]
    blocks = steps * routed.group
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, blocks - x.shape[2]), (0, 0)))
    dkv = jax.ShapeDtypeStruct(problem.packed_shape(problem.num_keys), problem.dtype)
    pairs = problem.num_queries * top_k * block_k
    dq, dk, dv = problem.call(
        kernel,
        "sparse_attend_backward",
        (segments, steps),
        parallel=0,
        flops=10 * pairs * width,
        exps=pairs,
        in_specs=[
            _scalars(routed.group * top_k, lambda s, g: g),
            _scalars(routed.group * (segments + 1), lambda s, g: g),
            tokens,
            tokens,
            numbers,
            numbers,
            keys,
            keys,
        ],
        out_specs=[of_segment, keys, keys],
        out_shape=[jax.ShapeDtypeStruct(shape, problem.dtype), dkv, dkv],
        scratch_shapes=[pltpu.VMEM((size, width), jnp.float32)] * 2,
    )(
        routed.groups(lists, steps),
        routed.groups(first_entries, steps),
        q,
        dy,
        pad(lse),
        pad(delta),
        k,
        v,
    )
    return (dq[0] if segments == 1 else dq.sum(axis=0, dtype=jnp.float32).astype(dq.dtype)), dk, dv
