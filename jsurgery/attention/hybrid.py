"""Hybrid attention in a network: which block keeps how much softmax, and the maps that stand in for the rest."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
from flax import nnx

from jsurgery.attention.token_order import LATTICES, Rate, TokenOrder
from jsurgery.config import check_rates
from jsurgery.errors import InputError
from jsurgery.model_config import check_fields
from pallas_kernels import (
    HedgehogMap,
    PolynomialMap,
    hybrid_attention,
    init_hedgehog_map,
    init_polynomial_map,
)
from pallas_kernels.api import STABILIZERS
from pallas_kernels.feature_map import ACTIVATIONS

FORMAT_VERSION = 1
HEDGEHOG = HedgehogMap.activation
LearnedMap = PolynomialMap | HedgehogMap


@dataclasses.dataclass(frozen=True)
class FeatureMapConfig:
    """phi of eq. 8: `layers` per-head layers, powers 1 to `degree` of a non-negative `activation`.

    The activation `HEDGEHOG` is that map instead, of one layer and no powers.
    """

    degree: int = 2
    layers: int = 2
    activation: str = "relu"


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """What surgery changed in a network: one rate per block, and how the hybrid blocks are built."""

    rates: tuple[Rate, ...]
    chain: tuple[int, ...] = (1, 2, 4, 8)  # the nested softmax zones of the token order
    lattice: str = "strided"
    stabilizer: str = "lse"
    linear_branch: bool = True
    feature_map: FeatureMapConfig = FeatureMapConfig()

    @classmethod
    def from_json(cls, fields: Any, source: str) -> Self:
        """The "hybrid" part of a model's config.json. Raises InputError on a format that this version does not know."""
        if not isinstance(fields, dict):
            raise InputError(f"{source}: hybrid: expected what surgery changed, as an object; found {fields!r}")
        fields = dict(fields)
        if (found := fields.pop("format_version", None)) != FORMAT_VERSION:
            raise InputError(f"{source}: hybrid.format_version: this jsurgery reads {FORMAT_VERSION}, found {found}")
        try:
            phi = FeatureMapConfig(**fields.pop("feature_map"))
            config = cls(rates=tuple(fields.pop("rates")), chain=tuple(fields.pop("chain")), feature_map=phi, **fields)
        except (KeyError, TypeError) as error:
            raise InputError(f"{source}: hybrid: {error}") from None
        check_fields(phi, f"{source}: hybrid.feature_map")
        check_fields(config, f"{source}: hybrid")
        check_rates(f"{source}: hybrid.chain", config.chain)
        for name, found, choices in (
            ("lattice", config.lattice, LATTICES),
            ("stabilizer", config.stabilizer, STABILIZERS),
            ("activation", phi.activation, (*ACTIVATIONS, HEDGEHOG)),
        ):
            if found not in choices:
                raise InputError(f"{source}: hybrid: {name}: expected one of {', '.join(choices)}, found {found!r}")
        allowed = (1, *config.chain, *(["linear"] if config.linear_branch else []))
        if unknown := [rate for rate in config.rates if rate not in allowed]:
            names = ", ".join(map(str, dict.fromkeys(allowed)))
            raise InputError(f"{source}: hybrid.rates: expected rates of {names}, found {unknown[0]!r}")
        return config

    @property
    def converted(self) -> tuple[int, ...]:
        """Indices of the blocks that are not full softmax."""
        return tuple(i for i, rate in enumerate(self.rates) if rate != 1)

    def token_order(self, grid: tuple[int, int, int], shards: int = 1) -> TokenOrder | None:
        """The prefix order of a (time, height, width) token grid; None when no block needs one."""
        if not self.converted:
            return None
        return token_order(grid, self.chain, self.lattice, shards)


def token_order(grid: tuple[int, int, int], chain: Sequence[int], lattice: str, shards: int = 1) -> TokenOrder:
    """The order in which the softmax tokens of every rate of `chain` are a prefix, in each of `shards`."""
    frames, height, width = grid
    size = height * width
    return TokenOrder(frames * size, tuple(chain), lattice=lattice, tokens_per_frame=size, shards=shards)


def rate_chain(rates: Sequence[Rate]) -> tuple[int, ...]:
    """The nested zones that the token order needs for these rates."""
    return tuple(sorted({1, *(rate for rate in rates if isinstance(rate, int))}))


class FeatureMap(nnx.Module):
    """One learned map phi; `maps` is the pytree that kernels take. Leaves may be stacked: [S, ...] over blocks."""

    def __init__(self, maps: LearnedMap):
        self.kernels = nnx.List([nnx.Param(kernel) for kernel in maps.kernels])
        self.biases = nnx.List([nnx.Param(bias) for bias in maps.biases])
        self.log_scale = nnx.Param(maps.log_scale)
        self.degree, self.activation = maps.degree, maps.activation

    @property
    def maps(self) -> LearnedMap:
        config = FeatureMapConfig(self.degree, len(self.kernels), self.activation)
        leaves = {f"kernels.{j}": kernel for j, kernel in enumerate(self.kernels)}
        leaves |= {f"biases.{j}": bias for j, bias in enumerate(self.biases)} | {"log_scale": self.log_scale}
        return feature_map(config, lambda name: leaves[name][...])


def feature_map(config: FeatureMapConfig, leaf: Callable[[str], jax.Array]) -> LearnedMap:
    """The map of the leaves "kernels.0", "biases.0", ..., "log_scale"."""
    if config.activation == HEDGEHOG:
        return HedgehogMap(leaf("kernels.0"), leaf("log_scale"))
    return PolynomialMap(
        kernels=tuple(leaf(f"kernels.{j}") for j in range(config.layers)),
        biases=tuple(leaf(f"biases.{j}") for j in range(config.layers)),
        log_scale=leaf("log_scale"),
        degree=config.degree,
        activation=config.activation,
    )


def init_feature_maps(key: jax.Array, count: int, heads: int, head_dim: int, config: FeatureMapConfig) -> LearnedMap:
    """`count` freshly initialised maps, stacked on the first axis of every leaf."""

    def make(key: jax.Array) -> LearnedMap:
        if config.activation == HEDGEHOG:
            return init_hedgehog_map(heads, head_dim)
        return init_polynomial_map(key, heads, head_dim, config.degree, config.layers, config.activation)

    return jax.vmap(make)(jax.random.split(key, count))


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
    """Eq. 5 on tokens in prefix order; without maps, softmax over the prefix alone."""
    if key_map is None:
        k_BxNxHxD, v_BxNxHxD = k_BxNxHxD[:, :num_softmax], v_BxNxHxD[:, :num_softmax]
    options = {"num_softmax": num_softmax, "stabilizer": stabilizer}
    return hybrid_attention(q_BxNxHxD, k_BxNxHxD, v_BxNxHxD, query_map, key_map, **options)
