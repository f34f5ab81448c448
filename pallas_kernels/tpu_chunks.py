"""Forward of chunked attention on TPU: flash attention of a chunk's queries over its window, with a state per chunk.

A window is cut out of K and V where it lies, at any multiple of 8 tokens, and stays in VMEM while the chunk's queries
go by. Windows that reach beyond the first or the last token are moved inside; how many of a window's keys count is then
known when the program is compiled, so that no score is computed only to be masked.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.feature_map import PolynomialMap
from pallas_kernels.tpu_feature_map import features_rows, map_flops, rows
from pallas_kernels.tpu_forward import add_tile
from pallas_kernels.tpu_problem import LANES, LOG2_E, MASKED, Problem, take, within

ROWS = 8  # windows and blocks of queries begin at multiples of this
MOST_QUERIES = 2304  # of a step
MOST_KEYS = 24576  # of a window: K and V, twice each, take 24 MiB of VMEM at width 128


class Kind(NamedTuple):
    """Chunks `first` to `last`, whose softmax keys are the window's keys from `start` to `stop`."""

    first: int
    last: int
    start: int
    stop: int
    linear: bool


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The static arguments of one call, beside those of the `Problem` for all tokens."""

    chunk: int
    overlap: int
    causal: bool
    length: int

    @property
    def count(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def window(self) -> int:
        return self.chunk + self.overlap

    @property
    def back(self) -> int:
        """How many chunks before a chunk its window begins, if to begin at a chunk's end is to begin in that chunk."""
        return self.overlap // self.chunk + 1

    @property
    def queries(self) -> int:
        """The queries of a step."""
        return self.blocks(MOST_QUERIES)

    def blocks(self, most: int) -> int:
        """The tokens, at most `most`, of blocks of whole rows that divide a chunk; 0 if none do."""
        sizes = range(ROWS, min(self.chunk, most) + 1, ROWS)
        return max((size for size in sizes if self.chunk % size == 0), default=0)

    def refusal(self) -> str | None:
        """Why the kernel cannot cut windows and blocks out of the tokens, or None if it can."""
        if self.chunk % ROWS or self.overlap % ROWS or self.length % ROWS:
            return (
                f"chunks of {self.chunk} and overlaps of {self.overlap} of {self.length} tokens, not all of whole rows"
            )
        if self.queries < min(self.chunk, LANES):
            return f"chunks of {self.chunk} tokens, which no large block of queries divides"
        if not self.window <= min(self.length, MOST_KEYS):
            return f"windows of {self.window} tokens"
        return None

    def window_start(self, chunk: Any) -> Any:
        """The first token of a chunk's window as it is cut out."""
        start = jnp.clip(chunk * self.chunk - self.overlap, 0, self.length - self.window)
        return pl.multiple_of(start, ROWS)

    def with_states(self) -> "Chunks":
        """The chunks whose linear states others read: if causal, all to the one in which the last window begins."""
        used = self.count - self.back * self.causal
        return dataclasses.replace(self, length=min(used * self.chunk, self.length))

    @property
    def cut(self) -> int:
        """Where a later chunk's window begins within a chunk, or at its end."""
        return self.chunk - self.overlap % self.chunk

    def kinds(self) -> list[Kind]:
        kinds: list[Kind] = []
        for chunk in range(self.count):
            start, stop = max(chunk * self.chunk - self.overlap, 0), min((chunk + 1) * self.chunk, self.length)
            cut = min(max(chunk * self.chunk - self.overlap, 0), self.length - self.window)
            linear = start > 0 or (not self.causal and stop < self.length)
            kind = Kind(chunk, chunk, start - cut, stop - cut, linear)
            if kinds and kinds[-1][2:] == kind[2:]:
                kinds[-1] = kinds[-1]._replace(last=chunk)
            else:
                kinds.append(kind)
        return kinds


def attend_to_windows(
    problem: Problem, chunks: Chunks, query_map: PolynomialMap, q, k, v, valid, state, z, *, with_stats: bool
) -> tuple[jax.Array, jax.Array | None]:
    """y, packed, and with_stats base and shift of every query, float32 [B, H, 2, N]; see `tpu_forward.attend`.

    Args:
        valid: float32 [B, T, 1, window in whole lanes], of the windows as they are cut out; None unless the problem is
            `masked`.
        state, z: [B*T, H, F, D] and [B*T, H, F] of T chunks, with the scales of both maps.
    """
    queries, tile, window = chunks.queries, problem.blocks.key_chunk, chunks.window
    scale = problem.width**-0.5 * LOG2_E
    features = query_map.biases[-1].shape[-1]
    steps, count, kinds = chunks.chunk // queries, chunks.count, chunks.kinds()
    weights, weight_specs = rows(query_map, problem.dtype)

    def kernel(q_ref, k_ref, v_ref, *refs):
        refs = iter(refs)
        (valid_ref,) = take(refs, 1, problem.masked)
        weight_refs = take(refs, len(weights))
        state_ref, z_ref, y_ref = take(refs, 3)
        (stats_ref,) = take(refs, 1, with_stats)
        chunk = pl.program_id(2)

        def run(kind: Kind):
            q_QxD = q_ref[...]
            peak = jnp.full((queries, LANES), MASKED)
            total, o = jnp.zeros((queries, LANES), jnp.float32), jnp.zeros((queries, problem.width), jnp.float32)
            for start in range(kind.start // LANES * LANES, kind.stop, tile):
                size = min(tile, -(-(kind.stop - start) // LANES) * LANES)
                k_SxD, v_SxD = piece(k_ref, start, size), piece(v_ref, start, size)
                s = problem.dot(q_QxD, k_SxD, (1, 1)) * scale
                if start < kind.start or start + size > kind.stop:
                    s = jnp.where(within(start, size, kind.start, kind.stop, 1), s, MASKED)
                if problem.masked:
                    s = jnp.where(valid_ref[:, start : start + size] > 0, s, MASKED)
                peak, total, o = add_tile(problem, s, v_SxD, peak, total, o)
            num, den, base = o, total.sum(axis=1, keepdims=True), peak
            if problem.stabilizer == "lse":
                num, den, base = num / den, jnp.ones_like(den), base + jnp.log2(den)
            if kind.linear:
                phi_QxF = features_rows(problem, q_QxD, weight_refs)
                num += problem.dot(phi_QxF, state_ref[...])
                den += (phi_QxF * z_ref[...]).sum(axis=1, keepdims=True)
            y_ref[...] = (num / den).astype(y_ref.dtype)
            if with_stats:
                first_lane = lax.broadcasted_iota(jnp.int32, base.shape, 1) == 0
                stats_ref[...] = jnp.where(first_lane, base, base + jnp.log2(den)).T[:2]

        for kind in kinds:
            if len(kinds) == 1:
                run(kind)
            else:
                pl.when((chunk >= kind.first) & (chunk <= kind.last))(lambda kind=kind: run(kind))

    def piece(ref, start: int, size: int) -> jax.Array:
        """Tokens of the window, with zeros beyond its end."""
        if start + size <= window:
            return ref[start : start + size, :]
        rest = ref[start:window, :]
        return jnp.concatenate([rest, jnp.zeros((start + size - window, problem.width), rest.dtype)])

    last = -(-chunks.length // queries) - 1  # past it, if the last chunk is short, its last block is computed again
    tokens = problem.tokens(queries, lambda t, i: jnp.minimum(t * steps + i, last))
    per_chunk = lambda *shape: pl.BlockSpec(
        (None, None, *shape), lambda b, h, t, i: (b * count + t, h, *(0,) * len(shape))
    )
    masks = [valid] if problem.masked else []
    mask_specs = [pl.BlockSpec((None, None, *mask.shape[2:]), lambda b, h, t, i: (b, t, 0, 0)) for mask in masks]
    out_specs, out_shape = [tokens], [jax.ShapeDtypeStruct(problem.packed_shape(chunks.length), problem.dtype)]
    if with_stats:
        out_specs.append(pl.BlockSpec((None, None, None, 2, queries), lambda b, h, t, i: (b, h, t * steps + i, 0, 0)))
        shape = problem.batch, problem.heads, count * steps, 2, queries
        out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    pairs = chunks.chunk * sum((kind.last - kind.first + 1) * (kind.stop - kind.start) for kind in kinds)
    per_query = map_flops(query_map) + 2 * features * (problem.width + 1)
    y, *stats = problem.call(
        kernel,
        "chunk_attend",
        (count, steps),
        parallel=2,
        flops=4 * pairs * problem.width + chunks.length * per_query,
        exps=pairs,
        in_specs=[
            tokens,
            *[tokens_from(problem, window, lambda t, i: chunks.window_start(t))] * 2,
            *mask_specs,
            *weight_specs,
            per_chunk(features, problem.width),
            per_chunk(1, features),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
    )(q, k, v, *masks, *weights, state.astype(problem.dtype), z[:, :, None])
    if not with_stats:
        return y, None
    stats_BxHx2xN = stats[0].swapaxes(2, 3).reshape(problem.batch, problem.heads, 2, -1)
    return y, stats_BxHx2xN[..., : chunks.length]


def tokens_from(problem: Problem, count: int, start: Callable[..., Any]) -> pl.BlockSpec:
    """The block spec for `count` tokens of packed keys or values, from any row on.

    `start` maps the grid's indices after (B, H) to the first token.
    """
    size, width = pl.Element(count), pl.Element(problem.width)
    if problem.packed:
        return pl.BlockSpec((None, size, width), lambda b, h, *g: (b, start(*g), h * problem.width))
    return pl.BlockSpec((None, None, size, width), lambda b, h, *g: (b, h, start(*g), 0))


def masks_from(valid: jax.Array, count: int, starts: Sequence[Any]) -> jax.Array:
    """float32 [B, S, 1, count in whole lanes] of valid [B, M]: `count` tokens from each of the S starts."""
    cut = lambda start: lax.dynamic_slice_in_dim(valid, start, count, axis=1)
    masks_BxSxN = jax.vmap(cut, out_axes=1)(jnp.stack(starts))
    return jnp.pad(masks_BxSxN, ((0, 0), (0, 0), (0, -count % LANES)))[:, :, None].astype(jnp.float32)
