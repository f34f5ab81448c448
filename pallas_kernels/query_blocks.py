"""Hybrid attention whose softmax and linear keys differ from one block of queries to the next.

`hybrid_attention` is the special case of one block with all queries, softmax over a prefix of the keys, and a linear
branch over the rest. Another case is a video in chunks, each of which attends to itself by softmax and to earlier
chunks through a linear state.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.api import attend_with_state, hybrid_attention, linear_state
from pallas_kernels.feature_map import FeatureMap

Range = tuple[int, int]


class QueryBlock(NamedTuple):
    """A run of queries and the keys that it attends to; every range is (first token, one past the last).

    Attributes:
        queries: the block's queries.
        softmax: keys of the softmax branch.
        linear: disjoint ranges of keys of the linear branch.
    """

    queries: Range
    softmax: Range
    linear: tuple[Range, ...] = ()


def attention_by_query_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap | None,
    key_map: FeatureMap | None,
    *,
    blocks: Sequence[QueryBlock],
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
) -> jax.Array:
    """Eq. 5 of Attention Surgery, in which every query's S and L are those of its block.

    phi_k is computed once for each linear key: the ends of all ranges cut the keys into pieces, each piece has one
    state, and a block adds up the states of its pieces. The kernels are those of `hybrid_attention`. Blocks are
    unrolled, so compile time grows with their number.

    Args:
        q: queries [B, N, H, D], not yet scaled.
        k: keys [B, M, H, D].
        v: values [B, M, H, D].
        query_map: phi_q; None if no block has linear keys.
        key_map: phi_k; likewise.
        blocks: in the order of their queries; together they hold every query once.
        key_valid: bool [B, M], False at padding.
        stabilizer: as in `hybrid_attention`.

    Returns:
        [B, N, H, D] in v's dtype.

    Raises:
        ValueError: blocks that leave out or repeat queries, ranges beyond the keys, ranges of one block that overlap, a
            block without keys, or linear keys without maps.
    """
    _check(blocks, q.shape[1], k.shape[1], query_map is not None and key_map is not None)
    edges = sorted({edge for block in blocks for keys in block.linear for edge in keys})
    within = lambda piece, block: any(first <= piece[0] and piece[1] <= last for first, last in block.linear)
    pieces = [piece for piece in pairwise(edges) if any(within(piece, block) for block in blocks)]
    cut = lambda x, tokens: x[:, slice(*tokens)]
    valid = lambda tokens: None if key_valid is None else cut(key_valid, tokens)

    def state(piece: Range) -> tuple[jax.Array, jax.Array]:
        assert key_map is not None
        return linear_state(cut(k, piece), cut(v, piece), key_map, key_valid=valid(piece))

    states = {piece: state(piece) for piece in pieces}

    def attend(block: QueryBlock) -> jax.Array:
        queries, keys, values = cut(q, block.queries), cut(k, block.softmax), cut(v, block.softmax)
        mask = valid(block.softmax)
        parts = [states[piece] for piece in pieces if within(piece, block)]
        if not parts:
            return hybrid_attention(queries, keys, values, None, None, num_softmax=keys.shape[1], key_valid=mask)
        assert query_map is not None
        total = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *parts)
        return attend_with_state(queries, keys, values, query_map, total, key_valid=mask, stabilizer=stabilizer)

    return jnp.concatenate([attend(block) for block in blocks], axis=1)


def _check(blocks: Sequence[QueryBlock], num_queries: int, num_keys: int, has_maps: bool) -> None:
    edges = [0, *(edge for block in blocks for edge in block.queries), num_queries]
    if any(edges[i] != edges[i + 1] for i in range(0, len(edges), 2)):
        raise ValueError(f"blocks must cover queries 0..{num_queries} in order, found {[b.queries for b in blocks]}")
    for number, block in enumerate(blocks):
        for first, last in (block.softmax, *block.linear):
            if not 0 <= first <= last <= num_keys:
                raise ValueError(f"blocks[{number}]: key ranges must lie in 0..{num_keys}, found {(first, last)}")
        filled = sorted(keys for keys in (block.softmax, *block.linear) if keys[0] < keys[1])
        if not filled:
            raise ValueError(f"blocks[{number}] has no keys")
        if any(before[1] > after[0] for before, after in pairwise(filled)):
            raise ValueError(f"blocks[{number}]: key ranges overlap: {filled}")
        if not has_maps and any(first < last for first, last in block.linear):
            raise ValueError(f"blocks[{number}] has linear keys, which need a query_map and a key_map, found None")
