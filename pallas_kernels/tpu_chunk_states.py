"""The linear states of chunks on TPU, in one pass over the keys, which are read where they lie.

The window of a later chunk begins at one point of a chunk, the cut. The states of causal chunks are running sums: what
lies before the cut is in the state of the later chunk, what lies after it in those of the chunks after that.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunk_windows import State
from pallas_kernels.feature_map import PolynomialMap
from pallas_kernels.tpu_chunks import ROWS, Chunks, masks_from, tokens_from
from pallas_kernels.tpu_feature_map import features_rows, map_flops, rows
from pallas_kernels.tpu_problem import LANES, Problem, within

MOST_KEYS = 5120  # of a step


def summarize_chunks(problem: Problem, chunks: Chunks, key_map: PolynomialMap, k, v, valid) -> list[State]:
    """S [B*T, H, F, D] and z [B*T, H, F] of T chunks, float32, without phi's scale; k and v are packed.

    If the chunks are causal, each has one state: of all keys before its cut, and so of earlier chunks too. Otherwise
    it has that of its own keys before the cut and, if there are any, that of its keys after it.

    Args:
        chunks: those that have states, which may be fewer than the tokens make up.
        valid: bool [B, M]; None unless the problem is `masked`.
    """
    chunk, count, width, causal = chunks.chunk, chunks.count, problem.width, chunks.causal
    size, cut = chunks.blocks(MOST_KEYS), chunks.cut
    padded, steps, ragged = -(-size // LANES) * LANES, chunk // size, chunks.length % chunk > 0
    cut_step, states = (cut - 1) // size, 1 if causal or cut == chunk else 2
    weights, weight_specs = rows(key_map, problem.dtype)
    features = key_map.biases[-1].shape[-1]

    def first_key(t, step):
        """Of the keys that a step reads: if the last chunk is short, its last block begins before the chunk does."""
        return pl.multiple_of(jnp.minimum(t * chunk + step * size, problem.num_keys - size), ROWS)

    def kernel(k_ref, v_ref, *refs):
        *inputs, state_ref, z_ref, sum_ref = refs
        t, step = pl.program_id(2), pl.program_id(3)

        @pl.when((step == 0) & (t == 0) if causal else step == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        def run(cut: int):
            """Adds the step's keys, those before `cut` first; at a cut within it or at its end, writes a state."""
            k_TxD, v_TxD = (jnp.pad(ref[...], ((0, padded - size), (0, 0))) for ref in (k_ref, v_ref))
            phi_TxF = features_rows(problem, k_TxD, inputs[: len(weights)]).astype(problem.dtype)
            values_ExT = jnp.concatenate([v_TxD.T.astype(jnp.float32), jnp.ones((ROWS, padded), jnp.float32)])
            if ragged:
                low = t * chunk + step * size
                inside = within(first_key(t, step), padded, low, jnp.minimum(low + size, chunks.length), 1)
                values_ExT = jnp.where(inside, values_ExT, 0.0)
            if problem.masked:
                values_ExT = jnp.where(inputs[-1][...] > 0, values_ExT, 0.0)
            if cut:
                add(values_ExT, phi_TxF, 0, cut)
                write(0)
                if states == 2:
                    sum_ref[...] = jnp.zeros_like(sum_ref)
            if cut < size:
                add(values_ExT, phi_TxF, cut, size)

        def add(values_ExT, phi_TxF, start: int, stop: int):
            whole = slice(start // LANES * LANES, -(-stop // LANES) * LANES)
            part_ExT = values_ExT[:, whole]
            if (start, stop) != (whole.start, whole.stop):
                part_ExT = jnp.where(within(whole.start, part_ExT.shape[1], start, stop, 1), part_ExT, 0.0)
            sum_ref[...] += problem.dot(part_ExT, phi_TxF[whole])

        def write(state: int):
            state_ref[state], z_ref[state] = sum_ref[:width].T, sum_ref[width : width + 1]

        if steps == 1:
            run(cut)
        else:
            pl.when(step == cut_step)(lambda: run(cut - cut_step * size))
            pl.when(step != cut_step)(lambda: run(0))
        if states == 2:
            pl.when(step == steps - 1)(lambda: write(1))

    tokens = tokens_from(problem, size, first_key)
    per_chunk = lambda *shape: pl.BlockSpec(
        (None, None, states, *shape), lambda b, h, t, i: (b * count + t, h, 0, 0, 0)
    )
    masks, mask_specs = [], []
    if problem.masked:
        masks = [masks_from(valid, size, [first_key(t, step) for t in range(count) for step in range(steps)])]
        mask_specs = [pl.BlockSpec((None, None, 1, padded), lambda b, h, t, i: (b, t * steps + i, 0, 0))]
    shape = problem.batch * count, problem.heads, states
    state, z = problem.call(
        kernel,
        "chunk_state",
        (count, steps),
        parallel=0,
        flops=chunks.length * (map_flops(key_map) + 2 * features * width),
        exps=0,
        in_specs=[tokens, tokens, *weight_specs, *mask_specs],
        out_specs=[per_chunk(features, width), per_chunk(1, features)],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, features, width), jnp.float32),
            jax.ShapeDtypeStruct((*shape, 1, features), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((width + ROWS, features), jnp.float32)],
    )(k, v, *weights, *masks)
    return [(state[:, :, number], z[:, :, number, 0]) for number in range(states)]
