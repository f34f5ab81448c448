"""The interface of a kind: what a block's attention is.

Planner, distillation, cost model, checkpoints, report and export know a block's attention by this interface alone. A
new kind is a class, in a file of its own, and one call of `registry.register`.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Literal, Self

import jax
from jax.sharding import NamedSharding

from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.map_sizes import map_parameters, map_weights, num_features
from jsurgery.attention.token_order import TokenOrder
from jsurgery.attention.token_shards import SoftmaxBranch, TokenShards
from jsurgery.rates import Rate

Range = tuple[int, int]  # the first token, and one past the last


@dataclasses.dataclass(frozen=True)
class AttentionSize:
    """What the cost of one block's attention depends on.

    Attributes:
      tokens: N, the tokens of a video.
      frames: the latent frames that they make up.
      heads, head_dim: H and D.
      feature_map: phi; None without a linear branch.
    """

    tokens: int
    frames: int
    heads: int
    head_dim: int
    feature_map: FeatureMapConfig | None


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one block's attention reads and multiplies, in tokens.

    Attributes:
      softmax_pairs: pairs of a query and a key with a softmax weight.
      softmax_keys: keys read for them. A key counts once for each run of queries that reads the same keys.
      linear_queries: queries that have linear keys.
      linear_keys: keys that are a linear key of any query.
      states: sums over linear keys that are written and read.
    """

    softmax_pairs: int
    softmax_keys: int
    linear_queries: int = 0
    linear_keys: int = 0
    states: int = 0


@dataclasses.dataclass(frozen=True)
class TokenPlace:
    """Where the tokens are that a block's attention gets.

    Attributes:
      grid: the tokens' (time, height, width).
      order: the order in which they lie; None: raster order.
      stabilizer: as in `pallas_kernels.hybrid_attention`.
      sharding: of q, k and v [B, N, H, D] over a mesh; None on one device.
      exchange: how R-hybrids reach the keys in other shards of the sequence: "gather" or "all_to_all".
    """

    grid: tuple[int, int, int]
    order: TokenOrder | None
    stabilizer: str
    sharding: NamedSharding | None = None
    exchange: str = "gather"


@dataclasses.dataclass(frozen=True)
class TeacherBlock:
    """One block in a forward of the teacher, as distillation sees it; on a mesh, the piece of one device.

    Attributes:
      q, k, v: [B, N, H, D], in the order of `tokens`.
      grid: the (time, height, width) of all tokens.
      prefixes: the softmax branch of every R-hybrid, from one pass over the keys.
      full: softmax over all keys.
      inverse_rope: cos, -sin [N, D/2], if phi sees queries and keys before RoPE.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    grid: tuple[int, int, int]
    tokens: TokenShards
    stabilizer: str
    prefixes: dict[Rate, SoftmaxBranch]
    full: SoftmaxBranch
    inverse_rope: tuple[jax.Array, jax.Array] | None = None


class Kind(abc.ABC):
    """What a block's attention is. Kinds are immutable, and equal if their spellings are.

    Attributes:
      family: what the model card and the overview call it.
      spelling: how kinds of this family are written in configs, for messages.
      needs_prefix: a network with such a block keeps its tokens in prefix order.
      by_heads: over a mesh with a context axis the block exchanges sequence for heads, which must divide.
      has_softmax, has_linear: which branches there are.
      learns: what its blocks learn: maps of queries and keys for every head, or a projection that all heads share.
      losses: the losses by which it can be distilled, of `config.distill.loss`.
      format_version: of the first checkpoints that may hold it.
      exportable: whether `jsurgery export` and its torch module compute it.
    """

    family: ClassVar[str]
    spelling: ClassVar[str]
    needs_prefix: ClassVar[bool] = False
    by_heads: ClassVar[bool] = True
    has_softmax: ClassVar[bool] = True
    has_linear: ClassVar[bool] = True
    learns: ClassVar[Literal["feature_maps", "projection"]] = "feature_maps"
    losses: ClassVar[tuple[str, ...]] = ("value",)
    format_version: ClassVar[int] = 2
    exportable: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def parse(cls, rate: Rate) -> Self | None:
        """The kind that configs, plans and checkpoints spell `rate`; None if it is none of this family."""

    @classmethod
    def parse_plan_name(cls, name: str) -> Self | None:
        """The kind of a name in plans, what follows the number of blocks: of "R2" in "15R2"."""
        return cls.parse(name)

    @property
    @abc.abstractmethod
    def rate(self) -> Rate:
        """Its spelling in configs, plans and checkpoints: the inverse of `parse`. Letters, digits and underscores."""

    @property
    def name(self) -> str:
        """Its name in tables and charts."""
        return str(self.rate)

    @property
    def plan_name(self) -> str:
        """Its name in plans, after the number of blocks; the inverse of `parse_plan_name`."""
        return str(self.rate)

    @property
    def cell(self) -> str:
        """Its sign in a plan that is drawn as a strip of cells."""
        return str(self.rate)

    @property
    @abc.abstractmethod
    def description(self) -> str:
        """What it does with a block's keys, in a few words."""

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """Orders kinds in tables: softmax first, linear last, R-hybrids before other families."""
        return 1.0, str(self.rate)

    @abc.abstractmethod
    def counts(self, size: AttentionSize) -> Counts:
        """What the attention reads and multiplies."""

    def parameters(self, size: AttentionSize) -> int:
        """Parameters that surgery adds to a block: two maps, each with one calibrated scale per head."""
        if not (self.has_linear and size.feature_map):
            return 0
        return 2 * (map_parameters(size.feature_map, size.heads, size.head_dim) + size.heads)

    def flops(self, size: AttentionSize) -> int:
        """FLOPs of one block's attention core, without projections.

        phi is counted without biases, on linear queries and on linear keys. The state sum phi_k^T v and the normaliser
        sum phi_k are summed over the linear keys; every linear query reads both.
        """
        counts = self.counts(size)
        flops = 4 * counts.softmax_pairs * size.heads * size.head_dim
        if counts.linear_keys and size.feature_map:
            features = size.heads * num_features(size.feature_map, size.head_dim)
            phi = 2 * map_weights(size.feature_map, size.heads, size.head_dim)
            state = 2 * features * size.head_dim
            flops += counts.linear_queries * (phi + state + 2 * features)
            flops += counts.linear_keys * (phi + state + features)
        return flops

    def core_values(self, size: AttentionSize) -> int:
        """The least numbers that the attention core moves to and from memory: q, y, keys, values, maps and states."""
        counts, dim = self.counts(size), size.heads * size.head_dim
        values = 2 * (size.tokens + max(counts.softmax_keys, size.tokens)) * dim
        if counts.linear_keys and size.feature_map:
            state = size.heads * num_features(size.feature_map, size.head_dim) * (size.head_dim + 1)
            values += 2 * map_weights(size.feature_map, size.heads, size.head_dim) + 2 * state * counts.states
        return values

    def prefix_keys(self, size: AttentionSize) -> int | None:
        """The softmax keys, if they are a prefix of the token order: distillation then takes this branch from the
        teacher's own pass over the keys. None: the branch is computed on its own."""
        return None

    def distillation_flops(self, size: AttentionSize) -> int:
        """FLOPs of one candidate in a step of distillation, beside the teacher's: its linear branch forward, and
        backward at twice the FLOPs, and its softmax branch unless the teacher's pass gives it."""
        softmax = 4 * self.counts(size).softmax_pairs * size.heads * size.head_dim
        return 3 * (self.flops(size) - softmax) + (softmax if self.prefix_keys(size) is None else 0)

    def distillation_values(self, size: AttentionSize) -> tuple[int, int]:
        """The numbers of 16 and of 32 bits, for each channel, that one candidate moves in a step of distillation.

        Linear keys and their values are read forward and backward, queries once, and so are the softmax branch and the
        teacher's output, in float32. A softmax branch of its own takes a pass that reads q, k and v and writes it.
        """
        counts, own = self.counts(size), self.has_softmax and self.prefix_keys(size) is None
        halves, singles = 4 * counts.linear_keys + size.tokens, (2 if counts.softmax_pairs else 1) * size.tokens
        return (halves + size.tokens + 2 * counts.softmax_keys, singles + size.tokens) if own else (halves, singles)

    def areas(self, frames: int, tokens_per_frame: int) -> list[tuple[Range, Range, bool]] | None:
        """Runs of queries in raster order, a run of keys that they read, and whether by softmax, for a drawing. None
        where that depends on the data, or is drawn otherwise."""
        return None

    @abc.abstractmethod
    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, maps: Any, place: TokenPlace) -> jax.Array:
        """The attention [B, N, H, D] of a block whose tokens lie in `place`. `maps` are those that it `learns`; without
        them, its softmax branch."""

    @abc.abstractmethod
    def observe(self, block: TeacherBlock) -> Any:
        """What the losses and statistics of all maps of this kind share: its softmax branch, mainly."""

    @abc.abstractmethod
    def loss(self, name: str, maps: Any, at: Any) -> jax.Array:
        """[H]: one of `losses`. `at` is of `observe`. On a mesh, one device's part: the loss is their sum.

        A projection comes with an axis for heads, one copy for each, so that gradients are of one head, too.
        """

    @abc.abstractmethod
    def statistics(self, maps: Any, at: Any) -> dict[str, jax.Array]:
        """Statistics of one block, each [H], likewise.

        error, size: sums of the absolute error and of the absolute output. share, teacher_share: the part of the
        attention mass that falls on the softmax keys, in this attention and in the teacher. mass, teacher_mass: the
        mass of the linear keys, likewise, in units of the stabiliser.
        """
