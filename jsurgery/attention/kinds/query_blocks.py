"""Kinds whose softmax and linear keys differ from one run of queries to the next, in raster order.

Such a kind says for each run of queries which keys it reads (`QueryBlockKind.blocks`). Its forward, its distillation
and its cost follow from that.
"""

import abc
import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from jsurgery.attention.feature_maps import FeatureMapPair
from jsurgery.attention.kinds.base import AttentionSize, Counts, Range, TeacherBlock, TokenPlace
from jsurgery.attention.kinds.raster import RasterKind
from jsurgery.attention.rope import apply_rope
from jsurgery.attention.token_shards import SoftmaxBranch, TokenShards
from pallas_kernels import (
    EPSILON,
    QueryBlock,
    attention_by_query_blocks,
    hybrid_error,
    linear_state,
    softmax_zones,
)


class QueryBlockKind(RasterKind):
    """A kind that is given by `blocks`."""

    @abc.abstractmethod
    def blocks(self, frames: int, tokens_per_frame: int) -> list[QueryBlock]:
        """Runs of queries in raster order, together all queries, each with its softmax keys and its linear keys."""

    def attend_in_raster_order(
        self, q: jax.Array, k: jax.Array, v: jax.Array, maps: FeatureMapPair | None, place: TokenPlace
    ) -> jax.Array:
        frames, height, width = place.grid
        blocks = self.blocks(frames, height * width)
        if maps is None:
            blocks = [block._replace(linear=()) for block in blocks]
        query_map, key_map = maps or (None, None)
        return attention_by_query_blocks(q, k, v, query_map, key_map, blocks=blocks, stabilizer=place.stabilizer)

    def counts(self, size: AttentionSize) -> Counts:
        blocks = self.blocks(size.frames, size.tokens // size.frames)
        length = lambda keys: keys[1] - keys[0]
        linear = [block for block in blocks if any(map(length, block.linear))]
        return Counts(
            softmax_pairs=sum(length(block.queries) * length(block.softmax) for block in blocks),
            softmax_keys=sum(length(block.softmax) for block in blocks),
            linear_queries=sum(length(block.queries) for block in linear),
            linear_keys=sum(map(length, state_pieces(blocks))),
            states=len(linear),
        )

    def areas(self, frames: int, tokens_per_frame: int) -> list[tuple[Range, Range, bool]]:
        found = []
        for block in self.blocks(frames, tokens_per_frame):
            found.append((block.queries, block.softmax, True))
            found += [(block.queries, keys, False) for keys in block.linear]
        return found

    def observe(self, block: TeacherBlock) -> "ObservedBlocks":
        frames, height, width = block.grid
        tokens, blocks = block.tokens, self.blocks(frames, height * width)
        q, k, v = (tokens.raster(x) for x in (block.q, block.k, block.v))
        phi_q, phi_k = q, k
        if block.inverse_rope is not None:
            phi_q, phi_k = (tokens.raster(apply_rope(x, *block.inverse_rope)) for x in (block.q, block.k))
        full = jax.tree.map(tokens.raster, block.full)
        branches = []
        for each in blocks:
            queries, keys = slice(*each.queries), slice(*each.softmax)
            found = softmax_zones(q[:, queries], k[:, keys], v[:, keys], [keys.stop - keys.start])
            branches.append(SoftmaxBranch(*(x[0] for x in found)))
        return ObservedBlocks(self, blocks, q, k, v, phi_q, phi_k, branches, full, tokens, block.stabilizer)

    def loss(self, name: str, maps: FeatureMapPair, at: "ObservedBlocks") -> jax.Array:
        assert name == "value", name
        examples = len(at.q) * at.tokens.batch_pieces
        error_H = jnp.stack([error for _, error, _ in at.errors(maps)]).sum(axis=0)
        return at.tokens.all_heads(error_H) / (examples * at.tokens.order.num_tokens * at.q.shape[-1])

    def statistics(self, maps: FeatureMapPair, at: "ObservedBlocks") -> dict[str, jax.Array]:
        return at.statistics(maps)


@dataclasses.dataclass(frozen=True)
class ObservedBlocks:
    """One block's attention in a forward of the teacher: all tokens [B, N, H, D] of some heads, in raster order.

    `branches` are the softmax branches of `blocks`; phi_q and phi_k are the queries and keys as the maps see them.
    """

    kind: QueryBlockKind
    blocks: list[QueryBlock]
    q: jax.Array
    k: jax.Array
    v: jax.Array
    phi_q: jax.Array
    phi_k: jax.Array
    branches: list[SoftmaxBranch]
    full: SoftmaxBranch
    tokens: TokenShards
    stabilizer: str

    @property
    def rate(self):
        return self.kind.rate

    def shift(self, number: int) -> jax.Array:
        """c_i of eq. 5 for the queries of a block, [B, n, H]."""
        return self.branches[number].largest if self.stabilizer == "max" else self.branches[number].lse

    def errors(self, maps: FeatureMapPair) -> Iterator[tuple[int, jax.Array, jax.Array]]:
        """For each block of queries: its number, the sum [H] of its absolute errors, and n_L [B, n, H]."""
        query_map, key_map = self.tokens.own_heads(maps)
        states = {
            piece: linear_state(
                self.phi_k[:, slice(*piece)], self.v[:, slice(*piece)], key_map, token_gradients=False
            )
            for piece in state_pieces(self.blocks)
        }  # fmt: skip
        for number, (block, branch) in enumerate(zip(self.blocks, self.branches, strict=True)):
            target = self.full.output[:, slice(*block.queries)]
            parts = [state for piece, state in states.items() if is_within(piece, block)]
            if not parts:
                yield number, jnp.abs(branch.output - target).sum(axis=(0, 1, 3)), jnp.zeros_like(branch.lse)
                continue
            total = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *parts)
            softmax = branch.output, jnp.exp(branch.lse - self.shift(number))
            queries = self.phi_q[:, slice(*block.queries)]
            yield number, *hybrid_error(queries, query_map, total, softmax, target)

    def statistics(self, maps: FeatureMapPair) -> dict[str, jax.Array]:
        """See `Kind.statistics`. Masses are means over the queries that have linear keys, times their share."""
        sums: dict[str, Any] = dict.fromkeys(("error", "share", "teacher_share", "mass", "teacher_mass"), 0.0)
        for number, error_H, n_L in self.errors(maps):
            block, branch, shift = self.blocks[number], self.branches[number], self.shift(number)
            full_lse, n_S = self.full.lse[:, slice(*block.queries)], jnp.exp(branch.lse - shift)
            of_queries = {
                "share": n_S / (n_S + n_L + EPSILON),
                "teacher_share": jnp.exp(branch.lse - full_lse),
                "mass": n_L,
                "teacher_mass": self.linear_mass(number),
            }
            sums["error"] += error_H
            for name, values_BxNxH in of_queries.items():
                sums[name] += values_BxNxH.sum(axis=(0, 1))
        queries = len(self.q) * self.tokens.batch_pieces * self.tokens.order.num_tokens
        means = {name: total if name == "error" else total / queries for name, total in sums.items()}
        means["size"] = jnp.abs(self.full.output).sum(axis=(0, 1, 3))
        return {name: self.tokens.all_heads(values) for name, values in means.items()}

    def linear_mass(self, number: int) -> jax.Array:
        """The teacher's mass on the linear keys of a block's queries, in units of the stabiliser, [B, n, H]."""
        block, branch, shift = self.blocks[number], self.branches[number], self.shift(number)
        seen = merged([block.softmax, *block.linear])
        if seen == [(0, self.k.shape[1])]:
            lse = self.full.lse[:, slice(*block.queries)]
        else:
            keys, values = (jnp.concatenate([x[:, slice(*part)] for part in seen], axis=1) for x in (self.k, self.v))
            lse = softmax_zones(self.q[:, slice(*block.queries)], keys, values, [keys.shape[1]])[1][0]
        return jnp.exp(lse - shift) - jnp.exp(branch.lse - shift)


def state_pieces(blocks: list[QueryBlock]) -> list[Range]:
    """The runs of keys whose states, added up, are those of every block: no key is in two of them."""
    edges = sorted({edge for block in blocks for keys in block.linear for edge in keys})
    return [piece for piece in pairwise(edges) if any(is_within(piece, block) for block in blocks)]


def is_within(piece: Range, block: QueryBlock) -> bool:
    """Whether the keys of a piece are linear keys of a block."""
    return any(first <= piece[0] and piece[1] <= last for first, last in block.linear)


def merged(ranges: list[Range]) -> list[Range]:
    """Disjoint ranges in order, without empty ones; those that touch are one."""
    found: list[Range] = []
    for first, last in sorted(ranges):
        if first < last:
            start = found.pop()[0] if found and found[-1][1] == first else first
            found.append((start, last))
    return found
