"""Hybrid attention in a network: the rate of every block, and how its softmax and linear branches are built."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
from ml_collections import ConfigDict

from jsurgery.attention.feature_maps import HEDGEHOG, FeatureMapConfig, LearnedMap
from jsurgery.attention.token_order import LATTICES, TokenOrder
from jsurgery.errors import InputError
from jsurgery.io.fields import check_fields
from jsurgery.rates import Rate, check_rates, rate_chain
from pallas_kernels.api import STABILIZERS, hybrid_attention
from pallas_kernels.feature_map import ACTIVATIONS

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """What surgery changes in a network: one rate per block, and how the hybrid blocks are built."""

    rates: tuple[Rate, ...]
    chain: tuple[int, ...] = (1, 2, 4, 8)  # the rates whose softmax tokens are nested zones of the token order
    lattice: str = "strided"
    stabilizer: str = "lse"
    linear_branch: bool = True
    feature_map: FeatureMapConfig = dataclasses.field(default_factory=FeatureMapConfig)

    @classmethod
    def of(cls, config: ConfigDict, rates: Sequence[Rate]) -> Self:
        """The hybrid model of a plan: `rates`, one per block, and the settings of `config.hybrid`."""
        hybrid = config.hybrid
        return cls(
            rates=tuple(rates),
            chain=rate_chain(hybrid.rates),
            lattice=hybrid.lattice,
            stabilizer=hybrid.stabilizer,
            linear_branch=hybrid.linear_branch,
            feature_map=FeatureMapConfig.of(config),
        )

    @classmethod
    def from_json(cls, fields: Any, source: str) -> Self:
        """The hybrid model in `fields`, the "hybrid" part of the config.json that messages call `source`.

        Raises InputError for another format version, an unknown or missing field, and a bad value.
        """
        if not isinstance(fields, dict):
            raise InputError(f"{source}: hybrid: expected what surgery changed, as an object; found {fields!r}")
        fields = dict(fields)
        if (version := fields.pop("format_version", None)) != FORMAT_VERSION:
            raise InputError(f"{source}: hybrid.format_version: this jsurgery reads {FORMAT_VERSION}, found {version}")
        try:
            phi = FeatureMapConfig(**fields.pop("feature_map"))
            config = cls(rates=tuple(fields.pop("rates")), chain=tuple(fields.pop("chain")), feature_map=phi, **fields)
        except (KeyError, TypeError) as error:
            raise InputError(f"{source}: hybrid: {error}") from None
        check_fields(phi, f"{source}: hybrid.feature_map")
        check_fields(config, f"{source}: hybrid")
        check_rates(f"{source}: hybrid.chain", config.chain)
        for name, choice, choices in (
            ("lattice", config.lattice, LATTICES),
            ("stabilizer", config.stabilizer, STABILIZERS),
            ("activation", phi.activation, (*ACTIVATIONS, HEDGEHOG)),
        ):
            if choice not in choices:
                raise InputError(f"{source}: hybrid: {name}: expected one of {', '.join(choices)}, found {choice!r}")
        allowed = (1, *config.chain, *(["linear"] if config.linear_branch else []))
        if unknown := [rate for rate in config.rates if rate not in allowed]:
            names = ", ".join(map(str, dict.fromkeys(allowed)))
            raise InputError(f"{source}: hybrid.rates: expected rates of {names}, found {unknown[0]!r}")
        return config

    @property
    def converted(self) -> tuple[int, ...]:
        """The indices of the blocks that are not full softmax."""
        return tuple(i for i, rate in enumerate(self.rates) if rate != 1)

    def token_order(self, grid: tuple[int, int, int], shards: int = 1) -> TokenOrder | None:
        """The prefix order of a (time, height, width) token grid; None if no block needs one."""
        if not self.converted:
            return None
        return token_order(grid, self.chain, self.lattice, shards)


def token_order(grid: tuple[int, int, int], chain: Sequence[int], lattice: str, shards: int = 1) -> TokenOrder:
    """The order of a (time, height, width) token grid in which each rate's softmax tokens come first in every shard."""
    frames, height, width = grid
    size = height * width
    return TokenOrder(frames * size, tuple(chain), lattice, size, shards, tokens_per_row=width)


def attend(
    q_BxNxHxD: jax.Array,
    k_BxNxHxD: jax.Array,
    v_BxNxHxD: jax.Array,
    query_map: LearnedMap | None,
    key_map: LearnedMap | None,
    *,
    num_softmax: int,
    stabilizer: str,
) -> jax.Array:
    """Eq. 5 on tokens in prefix order. Without maps, softmax attention to the first `num_softmax` keys alone."""
    if key_map is None:
        k_BxNxHxD, v_BxNxHxD = k_BxNxHxD[:, :num_softmax], v_BxNxHxD[:, :num_softmax]
    options = {"num_softmax": num_softmax, "stabilizer": stabilizer}
    return hybrid_attention(q_BxNxHxD, k_BxNxHxD, v_BxNxHxD, query_map, key_map, **options)
