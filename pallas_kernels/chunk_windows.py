"""Chunked attention by an implementation's own kernels: chunks lie along the batch axis, so that one call does all.

Each chunk's softmax keys are a window of `overlap` + `chunk` keys, masked where the video does not reach. The linear
states of all chunks come from the states of pieces, which begin where chunks or windows begin. Nothing is subtracted,
and no key is counted twice: phi_k is computed once for each linear key.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.feature_map import FeatureMap

State = tuple[jax.Array, jax.Array]


class Kernels(NamedTuple):
    """An implementation's functions; see `pallas_kernels.api`."""

    hybrid_attention: Callable[..., jax.Array]
    linear_state: Callable[..., State]
    attend_with_state: Callable[..., jax.Array]


def attend_to_chunks(
    kernels: Kernels,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap | None,
    key_map: FeatureMap | None,
    *,
    chunk: int,
    overlap: int,
    causal: bool,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
) -> jax.Array:
    """See `pallas_kernels.chunked_attention`."""
    length = q.shape[1]
    chunks = -(-length // chunk)
    chunk = min(chunk, length)
    overlap = min(overlap, (chunks - 1) * chunk)
    valid = jnp.ones(k.shape[:2], bool) if key_valid is None else key_valid
    needs_mask = overlap > 0 or length % chunk > 0 or key_valid is not None
    window = lambda x: windows(x, chunk, overlap, chunks)
    queries, keys, values = windows(q, chunk, 0, chunks), window(k), window(v)
    window_valid = window(valid) if needs_mask else None
    if not has_linear_keys(length, chunk, overlap, causal):
        count = keys.shape[1]
        y = kernels.hybrid_attention(queries, keys, values, None, None, num_softmax=count, key_valid=window_valid)
    else:
        assert query_map is not None and key_map is not None
        state = chunk_states(kernels, k, v, key_map, valid, chunk=chunk, overlap=overlap, causal=causal)
        y = kernels.attend_with_state(
            queries, keys, values, query_map, state, key_valid=window_valid, stabilizer=stabilizer
        )
    return y.reshape(q.shape[0], chunks * chunk, *y.shape[2:])[:, :length]


def has_linear_keys(length: int, chunk: int, overlap: int, causal: bool) -> bool:
    """Whether any chunk of `length` tokens has keys outside its window, of earlier chunks if `causal`."""
    return (-(-length // chunk) - 1) * chunk > (overlap if causal else 0)


def chunk_states(
    kernels: Kernels,
    k: jax.Array,
    v: jax.Array,
    key_map: FeatureMap,
    valid: jax.Array,
    *,
    chunk: int,
    overlap: int,
    causal: bool,
) -> State:
    """The `linear_state` of each chunk's linear keys, [B*T, H, F, D] and [B*T, H, F] for T chunks.

    A window begins `rest` = overlap mod chunk tokens before the end of a chunk, the one `back` chunks earlier, so the
    states of two pieces of every chunk are all that sums need. `chunk` and `overlap` are at most the tokens.
    """
    batch, length = k.shape[:2]
    chunks = -(-length // chunk)
    back, rest = overlap // chunk + 1, overlap % chunk
    used = chunks - back if causal else chunks
    padding = used * chunk - length
    pieces = (padded(x, 0, max(padding, 0))[:, : used * chunk] for x in (k, v, valid))
    pieces = [x.reshape(batch * used, chunk, *x.shape[2:]) for x in pieces]

    def states(tokens: slice) -> State:
        k_piece, v_piece, valid_piece = (x[:, tokens] for x in pieces)
        found = kernels.linear_state(k_piece, v_piece, key_map, key_valid=valid_piece)
        return jax.tree.map(lambda x: x.reshape(batch, used, *x.shape[1:]), found)

    before_rest = states(slice(chunk - rest))
    rest_alone = states(slice(chunk - rest, chunk)) if rest else None
    return sums_of_pieces(before_rest, rest_alone, chunks, back, causal)


def sums_of_pieces(before_rest: State, rest_alone: State | None, chunks: int, back: int, causal: bool) -> State:
    """Every chunk's linear state, [B*T, H, ...], from the states of its two pieces, [B, T or fewer, H, ...].

    `rest_alone` is None where an overlap is of whole chunks. At chunk t, the sum is that of the whole chunks before
    chunk t - back, and of that one what lies before t's window; and if not causal, of all chunks after t.
    """
    whole = before_rest if rest_alone is None else jax.tree.map(jnp.add, before_rest, rest_alone)

    def total(before_rest: jax.Array, whole: jax.Array) -> jax.Array:
        earlier = _sums_before(whole)[:, : chunks - back] + before_rest[:, : chunks - back]
        none = jnp.zeros_like(earlier, shape=(earlier.shape[0], back, *earlier.shape[2:]))
        states = jnp.concatenate([none, earlier], axis=1)
        if not causal:
            states += _sums_before(whole[:, ::-1])[:, ::-1]
        return states.reshape(-1, *states.shape[2:])

    state, z = (total(*leaves) for leaves in zip(before_rest, whole, strict=True))
    return state, z


def _sums_before(x: jax.Array) -> jax.Array:
    """Along axis 1, the sum of all earlier entries."""
    return jnp.cumsum(padded(x[:, :-1], 1, 0), axis=1)


def windows(x: jax.Array, chunk: int, overlap: int, chunks: int) -> jax.Array:
    """[B, N, ...] -> [B*T, overlap + chunk, ...]: each chunk after the tokens before it, zeros (False) beyond the ends.

    A window is put together from whole chunks and the end of one: a gather's gradient would be a scatter, and cuts at
    other places than the ends of chunks would move every token.
    """
    x_chunks = padded(x, 0, chunks * chunk - x.shape[1]).reshape(x.shape[0], chunks, chunk, *x.shape[2:])
    whole, rest = divmod(overlap, chunk)
    parts = [(whole + 1, x_chunks[:, :, chunk - rest :])] if rest else []
    parts += [(back, x_chunks) for back in range(whole, -1, -1)]
    shifted = [padded(part[:, : chunks - back], back, 0) for back, part in parts]
    together = shifted[0] if len(shifted) == 1 else jnp.concatenate(shifted, axis=2)
    return together.reshape(-1, overlap + chunk, *x.shape[2:])


def padded(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2))) if before or after else x
