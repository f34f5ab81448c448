"""The linear states of chunks on TPU: one pass over the keys gives those of every chunk's pieces.

A later chunk's window begins within a chunk, so its state needs the keys before that point alone. Steps begin at the
chunk and at that point, at any multiple of 8 tokens, and each reads its keys where they lie.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunk_windows import State
from pallas_kernels.feature_map import PolynomialMap
from pallas_kernels.tpu_chunks import ROWS, Chunks
from pallas_kernels.tpu_feature_map import columns, map_flops
from pallas_kernels.tpu_forward import weigh_keys
from pallas_kernels.tpu_problem import LANES, Problem, within


def summarize_pieces(problem: Problem, chunks: Chunks, key_map: PolynomialMap, k, v, valid) -> list[State]:
    """S [B*T, H, F, D] and z [B*T, H, F] of the pieces of T chunks, float32, without phi's scale; k and v are packed.

    Args:
        chunks: those that have states, which may be fewer than the tokens make up.
        valid: bool [B, M]; None unless the problem is `masked`.
    """
    chunk, count, pieces = chunks.chunk, chunks.count, chunks.pieces()
    size = block_size([length for _, length in pieces], problem.blocks.state)
    padded = -(-size // LANES) * LANES
    starts = [(piece, start + at) for piece, (start, length) in enumerate(pieces) for at in range(0, length, size)]
    tail = sum(piece == 0 for piece, _ in starts)  # the first step of the second piece
    divides = chunks.length % chunk == 0 and all(length % size == 0 for _, length in pieces)
    weights, weight_specs = columns(key_map, problem.dtype)
    features = key_map.biases[-1].shape[-1]

    def first_key(t, step):
        """The first key that step `step` of chunk `t` counts."""
        return t * chunk + step * size + (step >= tail) * (starts[-1][1] - (len(starts) - 1) * size)

    def first_read(t, step):
        """The first key that it reads: before the first that counts where the keys would end within the block."""
        return pl.multiple_of(jnp.minimum(first_key(t, step), problem.num_keys - size), ROWS)

    def kernel(k_ref, v_ref, *refs):
        *inputs, state_ref, z_ref, lanes_ref = refs
        t, step = pl.program_id(2), pl.program_id(3)

        @pl.when((step == 0) | (step == tail))
        def _():
            state_ref[...] = jnp.zeros_like(state_ref)
            lanes_ref[...] = jnp.zeros_like(lanes_ref)

        k_TxD, v_TxD = (jnp.pad(ref[...], ((0, padded - size), (0, 0))) for ref in (k_ref, v_ref))
        inside = None
        if not divides:
            low = first_key(t, step)
            end = t * chunk + jnp.where(step >= tail, chunk, pieces[0][1])
            high = jnp.minimum(jnp.minimum(low + size, end), chunks.length)
            inside = within(first_read(t, step), padded, low, high, 1)
        elif padded > size:
            inside = within(0, padded, 0, size, 1)
        if problem.masked:
            counts = inputs[-1][...] > 0
            inside = counts if inside is None else inside & counts
        values_FxD, sums_FxL = weigh_keys(problem, inputs[: len(weights)], k_TxD, v_TxD, inside)
        state_ref[...] += values_FxD
        lanes_ref[...] += sums_FxL

        @pl.when((step == tail - 1) | (step == len(starts) - 1))
        def _():
            z_ref[...] = lanes_ref[...].T.sum(axis=0, keepdims=True)

    if problem.packed:
        block = (None, pl.Element(size), pl.Element(problem.width))
        tokens = pl.BlockSpec(block, lambda b, h, t, i: (b, first_read(t, i), h * problem.width))
    else:
        block = (None, None, pl.Element(size), pl.Element(problem.width))
        tokens = pl.BlockSpec(block, lambda b, h, t, i: (b, h, first_read(t, i), 0))
    of_piece = lambda *shape: pl.BlockSpec(
        (None, None, None, *shape), lambda b, h, t, i: (b * count + t, (i >= tail) * 1, h, *(0,) * len(shape))
    )
    masks, mask_specs = [], []
    if problem.masked:
        at = jnp.stack([first_read(t, step) for t in range(count) for step in range(len(starts))])
        cut = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(valid, start, size, axis=1), out_axes=1)(at)
        masks = [jnp.pad(cut, ((0, 0), (0, 0), (0, padded - size)))[:, :, None].astype(jnp.float32)]
        mask_specs = [pl.BlockSpec((None, None, 1, padded), lambda b, h, t, i: (b, t * len(starts) + i, 0, 0))]
    shape = problem.batch * count, len(pieces), problem.heads
    state, z = problem.call(
        kernel,
        "chunk_state",
        (count, len(starts)),
        parallel=1,
        flops=chunks.length * (map_flops(key_map) + 2 * features * problem.width),
        exps=0,
        in_specs=[tokens, tokens, *weight_specs, *mask_specs],
        out_specs=[of_piece(features, problem.width), of_piece(1, features)],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, features, problem.width), jnp.float32),
            jax.ShapeDtypeStruct((*shape, 1, features), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((features, LANES), jnp.float32)],
    )(k, v, *weights, *masks)
    return [(state[:, piece], z[:, piece, :, 0]) for piece in range(len(pieces))]


def block_size(lengths: list[int], most: int) -> int:
    """The keys of a step, at most `most`: whole rows, which cover pieces of these lengths at the least cost.

    A step computes whole lanes of keys, and costs about as much as LANES keys beside them.
    """

    def cost(size: int) -> int:
        return sum(-(-length // size) for length in lengths) * (-(-size // LANES) + 1)

    return min(range(ROWS, min(max(lengths), most) + 1, ROWS), key=cost)
