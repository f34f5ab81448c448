"""Sparse + linear attention: softmax to the key blocks with the best pooled scores, linear attention to all keys.

SLA as its authors ship it; see `pallas_kernels.sparse`. The routing depends on the data, and has no gradient. What a
block learns is the projection of its linear branch.
"""

import dataclasses
import functools
import re
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp

from jsurgery.attention.feature_maps import Projection
from jsurgery.attention.kinds.base import AttentionSize, Counts, TeacherBlock, TokenPlace
from jsurgery.attention.kinds.raster import RasterKind
from jsurgery.attention.token_shards import SoftmaxBranch, TokenShards
from jsurgery.rates import Rate
from pallas_kernels.sparse import linear_to_all_keys, sparse_branch_lse, sparse_linear_attention

SPELLING = re.compile(r"S([1-9]\d?)(?:B([1-9]\d{0,3}))?", re.ASCII)
PUBLISHED_BLOCKS = 128, 64  # tokens of a block of queries and of keys


@dataclasses.dataclass(frozen=True)
class SparseLinear(RasterKind):
    """ "S10": softmax to 10 % of the key blocks, of 64 keys for each 128 queries. "S10B16": both of 16 tokens."""

    percent: int
    block: int | None = None  # tokens of the blocks of queries and of keys; None: `PUBLISHED_BLOCKS`

    family: ClassVar[str] = "sparse + linear"
    spelling: ClassVar[str] = "names like 'S10' and 'S10B16'"
    learns: ClassVar[Literal["feature_maps", "projection"]] = "projection"

    @classmethod
    def parse(cls, rate: Rate) -> Self | None:
        match = SPELLING.fullmatch(str(rate))
        return cls(int(match[1]), int(match[2]) if match[2] else None) if match else None

    @property
    def rate(self) -> Rate:
        return f"S{self.percent}" + (f"B{self.block}" if self.block else "")

    @property
    def blocks(self) -> tuple[int, int]:
        """Tokens of a block of queries, and of keys."""
        return (self.block, self.block) if self.block else PUBLISHED_BLOCKS

    @property
    def description(self) -> str:
        queries, keys = self.blocks
        return (
            f"softmax to the {self.percent} % of the blocks of {keys} keys that score best with a block of {queries} "
            "queries, and linear attention to all keys"
        )

    def counts(self, size: AttentionSize) -> Counts:
        """The last block counts as a whole one, except where it is the only one."""
        block_q, block_k = self.blocks
        chosen = max(1, int(self.percent / 100 * -(-size.tokens // block_k)))  # as `routing` rounds
        keys = min(chosen * block_k, size.tokens)
        return Counts(size.tokens * keys, -(-size.tokens // block_q) * keys, size.tokens, size.tokens, 1)

    def parameters(self, size: AttentionSize) -> int:
        """The projection's, if there is a linear branch."""
        return size.head_dim * (size.head_dim + 1) if size.feature_map else 0

    def flops(self, size: AttentionSize) -> int:
        """Softmax, the pooled scores, the sums over all keys, their projection, and reading them for all queries."""
        counts, dim = self.counts(size), size.head_dim
        block_q, block_k = self.blocks
        pairs = 4 * counts.softmax_pairs + 2 * -(-size.tokens // block_q) * -(-size.tokens // block_k)
        if not size.feature_map:
            return pairs * size.heads * dim
        linear = size.tokens * (2 * dim + 1) + 2 * dim**2 + size.tokens * (2 * dim + 2)
        return (pairs + linear) * size.heads * dim

    def core_values(self, size: AttentionSize) -> int:
        """q, y, the chosen keys and values, the permutations, and the state of every head."""
        counts, dim = self.counts(size), size.heads * size.head_dim
        state = 2 * dim * (size.head_dim + 1) if size.feature_map else 0
        return (10 * size.tokens + 2 * max(counts.softmax_keys, size.tokens)) * dim + state

    def attend_in_raster_order(
        self, q: jax.Array, k: jax.Array, v: jax.Array, maps: Projection | None, place: TokenPlace
    ) -> jax.Array:
        return self.attention(q, k, v, maps)

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, projection: Projection | None = None) -> jax.Array:
        """The attention [B, N, H, D] of tokens in raster order; without a projection, its softmax branch."""
        if projection is None:
            projection = Projection(jnp.zeros((q.shape[-1], q.shape[-1])), jnp.zeros(q.shape[-1]))
        return sparse_linear_attention(q, k, v, projection, **self.routing)

    @property
    def routing(self):
        """Arguments of the kernels."""
        block_q, block_k = self.blocks
        return {"share": self.percent / 100, "block_q": block_q, "block_k": block_k}

    def observe(self, block: TeacherBlock) -> "ObservedSparse":
        raster = block.tokens.raster
        full = jax.tree.map(raster, block.full)
        return ObservedSparse(self, raster(block.q), raster(block.k), raster(block.v), full, block.tokens)

    def loss(self, name: str, maps: Projection, at: "ObservedSparse") -> jax.Array:
        assert name == "value", name
        examples = len(at.q) * at.tokens.batch_pieces
        return at.tokens.all_heads(at.error(maps)) / (examples * at.tokens.order.num_tokens * at.q.shape[-1])

    def statistics(self, maps: Projection, at: "ObservedSparse") -> dict[str, jax.Array]:
        """See `Kind.statistics`. The branches are added, not weighed against each other: the softmax keys have all the
        mass of their branch, and no mass of linear keys has to be calibrated."""
        lse_BxNxH = sparse_branch_lse(at.q, at.k, at.v, **self.routing)
        queries = len(at.q) * at.tokens.batch_pieces * at.tokens.order.num_tokens
        found = {
            "error": at.error(maps),
            "size": jnp.abs(at.full.output).sum(axis=(0, 1, 3)),
            "share": jnp.ones_like(lse_BxNxH).sum(axis=(0, 1)) / queries,
            "teacher_share": jnp.exp(lse_BxNxH - at.full.lse).sum(axis=(0, 1)) / queries,
        }
        found |= {name: jnp.zeros_like(found["share"]) for name in ("mass", "teacher_mass")}
        return {name: at.tokens.all_heads(values) for name, values in found.items()}


@dataclasses.dataclass(frozen=True)
class ObservedSparse:
    """One block's attention in a forward of the teacher: all tokens [B, N, H, D] of some heads, in raster order."""

    kind: SparseLinear
    q: jax.Array
    k: jax.Array
    v: jax.Array
    full: SoftmaxBranch
    tokens: TokenShards

    @property
    def rate(self) -> Rate:
        return self.kind.rate

    @functools.cached_property
    def softmax(self) -> jax.Array:
        """The softmax branch [B, N, H, D]."""
        return jax.lax.stop_gradient(self.kind.attention(self.q, self.k, self.v))

    @functools.cached_property
    def linear(self) -> jax.Array:
        """The linear branch before its projection, [B, N, H, D] in float32."""
        return jax.lax.stop_gradient(linear_to_all_keys(self.q, self.k, self.v))

    def error(self, projection: Projection) -> jax.Array:
        """The sum [heads] of absolute differences to the teacher's attention. The leaves begin with all heads."""
        kernel_HxDxE, bias_HxE = self.tokens.own_heads(projection)
        options = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        projected = jnp.einsum("bnhd,hde->bnhe", self.linear, kernel_HxDxE, **options) + bias_HxE[None, None]
        return jnp.abs(self.softmax + projected - self.full.output).sum(axis=(0, 1, 3))
