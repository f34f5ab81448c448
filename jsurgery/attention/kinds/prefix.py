"""Softmax, R-hybrids and linear attention: kinds whose softmax keys are a prefix of the token order.

At rate R, every R-th token of a block keeps softmax attention; the others use the linear branch (Attention Surgery,
arXiv 2509.24899, eq. 5).
"""

import abc
import dataclasses
import math
import re
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jsurgery.attention.feature_maps import FeatureMapPair
from jsurgery.attention.kinds.base import AttentionSize, Counts, Kind, TeacherBlock, TokenPlace
from jsurgery.attention.kinds.prefix_losses import LOSSES, AttentionInputs, attention_statistics
from jsurgery.rates import Rate
from pallas_kernels.api import hybrid_attention
from pallas_kernels.sharded import sharded_self_attention


class PrefixKind(Kind):
    """What the three families share."""

    needs_prefix, by_heads, losses = True, False, ("value", "attention")
    format_version, exportable = 1, True

    @abc.abstractmethod
    def prefix_keys(self, size: AttentionSize) -> int:
        """The softmax keys, ceil(N / R) on the strided lattice."""

    def counts(self, size: AttentionSize) -> Counts:
        keys = self.prefix_keys(size)
        linear = size.tokens - keys
        return Counts(size.tokens * keys, keys, size.tokens if linear else 0, linear, 1 if linear else 0)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, maps: FeatureMapPair | None, place: TokenPlace
    ) -> jax.Array:
        order = place.order
        num_softmax = k.shape[1] if order is None else order.num_softmax(self.rate)
        query_map, key_map = (None, None) if maps is None or not self.has_linear else maps
        if place.sharding is None:
            return attend(q, k, v, query_map, key_map, num_softmax=num_softmax, stabilizer=place.stabilizer)
        return sharded_self_attention(
            q,
            k,
            v,
            query_map,
            key_map,
            sharding=place.sharding,
            num_softmax=num_softmax,
            key_valid=None if order is None or order.valid is None else jnp.asarray(order.valid),
            stabilizer=place.stabilizer,
            exchange=place.exchange,
        )

    def observe(self, block: TeacherBlock) -> AttentionInputs:
        shared = block.full, block.tokens, block.stabilizer, block.inverse_rope
        return AttentionInputs(self.rate, block.q, block.k, block.v, block.prefixes.get(self.rate), *shared)

    def loss(self, name: str, maps: FeatureMapPair, at: AttentionInputs) -> jax.Array:
        return LOSSES[name](maps, at)

    def statistics(self, maps: FeatureMapPair, at: AttentionInputs) -> dict[str, jax.Array]:
        return attention_statistics(maps, at)


@dataclasses.dataclass(frozen=True)
class RateHybrid(PrefixKind):
    """Eq. 5 at rate R: every R-th token keeps softmax."""

    R: int
    family: ClassVar[str] = "hybrid"
    spelling: ClassVar[str] = "integers from 1"

    @classmethod
    def parse(cls, rate: Rate) -> Self | None:
        return cls(rate) if type(rate) is int and rate > 1 else None

    @classmethod
    def parse_plan_name(cls, name: str) -> Self | None:
        match = re.fullmatch(r"R([1-9]\d*)", name)
        return cls.parse(int(match[1])) if match else None

    @property
    def rate(self) -> int:
        return self.R

    @property
    def name(self) -> str:
        return f"R{self.R}"

    @property
    def plan_name(self) -> str:
        return self.name

    @property
    def description(self) -> str:
        return f"one token in {self.R} keeps softmax"

    @property
    def sort_key(self) -> tuple[Any, ...]:
        return 0.0, float(self.R)

    def prefix_keys(self, size: AttentionSize) -> int:
        return -(-size.tokens // self.R)


@dataclasses.dataclass(frozen=True)
class Softmax(PrefixKind):
    """Full softmax attention: a block that is left as it is."""

    family: ClassVar[str] = "softmax"
    spelling: ClassVar[str] = "integers from 1"
    rate: ClassVar[Rate] = 1
    name: ClassVar[str] = "softmax"
    plan_name: ClassVar[str] = "R1"
    cell: ClassVar[str] = "S"
    description: ClassVar[str] = "full softmax"
    sort_key: ClassVar[tuple[Any, ...]] = (0.0, 1.0)
    needs_prefix: ClassVar[bool] = False
    has_linear: ClassVar[bool] = False

    @classmethod
    def parse(cls, rate: Rate) -> Self | None:
        return cls() if type(rate) is int and rate == 1 else None

    @classmethod
    def parse_plan_name(cls, name: str) -> Self | None:
        return cls() if name == "R1" else None

    def prefix_keys(self, size: AttentionSize) -> int:
        return size.tokens


@dataclasses.dataclass(frozen=True)
class Linear(PrefixKind):
    """Attention without softmax: all keys go through the linear branch."""

    family: ClassVar[str] = "linear"
    spelling: ClassVar[str] = "'linear'"
    rate: ClassVar[Rate] = "linear"
    name: ClassVar[str] = "linear"
    plan_name: ClassVar[str] = "Rlinear"
    cell: ClassVar[str] = "L"
    description: ClassVar[str] = "linear, no token keeps softmax"
    sort_key: ClassVar[tuple[Any, ...]] = (math.inf,)
    has_softmax: ClassVar[bool] = False

    @classmethod
    def parse(cls, rate: Rate) -> Self | None:
        return cls() if rate == "linear" else None

    @classmethod
    def parse_plan_name(cls, name: str) -> Self | None:
        return cls() if name == "Rlinear" else None

    def prefix_keys(self, size: AttentionSize) -> int:
        return 0


def attend(
    q_BxNxHxD: jax.Array,
    k_BxNxHxD: jax.Array,
    v_BxNxHxD: jax.Array,
    query_map,
    key_map,
    *,
    num_softmax: int,
    stabilizer: str,
) -> jax.Array:
    """Eq. 5 on tokens in prefix order. Without maps, softmax attention to the first `num_softmax` keys alone."""
    if key_map is None:
        k_BxNxHxD, v_BxNxHxD = k_BxNxHxD[:, :num_softmax], v_BxNxHxD[:, :num_softmax]
    options = {"num_softmax": num_softmax, "stabilizer": stabilizer}
    return hybrid_attention(q_BxNxHxD, k_BxNxHxD, v_BxNxHxD, query_map, key_map, **options)
