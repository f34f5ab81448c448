"""What surgery changes in a network: the kind of every block's attention, and how its branches are built."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from ml_collections import ConfigDict

from jsurgery.attention.feature_maps import HEDGEHOG, FeatureMapConfig
from jsurgery.attention.kinds.base import Kind
from jsurgery.attention.kinds.registry import check_rate, check_rates, kind_of
from jsurgery.attention.token_order import LATTICES, TokenOrder
from jsurgery.errors import InputError
from jsurgery.io.fields import check_fields
from jsurgery.rates import Rate, rate_chain
from pallas_kernels.api import STABILIZERS
from pallas_kernels.feature_map import ACTIVATIONS

FORMAT_VERSIONS = (1, 2)  # 1: numbers and "linear" alone; 2: any kind


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """What surgery changes in a network: one kind per block, and how the hybrid blocks are built.

    A kind is given by its rate, that is, by its spelling: 1 (softmax), 2, "linear", "C3O1".
    """

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
        if (version := fields.pop("format_version", None)) not in FORMAT_VERSIONS:
            known = " and ".join(map(str, FORMAT_VERSIONS))
            raise InputError(f"{source}: hybrid.format_version: this jsurgery reads {known}, found {version}")
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
        for rate in config.rates:
            config._check_rate(source, rate, version)
        return config

    def to_json(self) -> dict[str, Any]:
        """The "hybrid" part of config.json, in the oldest format that can hold it, which an older jsurgery reads."""
        version = max((kind.format_version for kind in self.kinds), default=1)
        return {"format_version": version, **dataclasses.asdict(self)}

    def _check_rate(self, source: str, rate: Any, version: int) -> None:
        """Raises InputError unless a block of this model may have the rate, in a file of this format."""
        field = f"{source}: hybrid.rates"
        numbers = (1, *self.chain)
        if isinstance(rate, int) and rate not in numbers:
            allowed = (*numbers, *(["linear"] if self.linear_branch else []))
            names = ", ".join(map(str, dict.fromkeys(allowed)))
            raise InputError(f"{field}: expected rates of {names}, found {rate!r}")
        check_rate(field, rate)
        kind = kind_of(rate)
        if not (kind.has_softmax or self.linear_branch):
            raise InputError(f"{field}: expected rates with softmax, as linear_branch is false; found {rate!r}")
        if kind.format_version > version:
            raise InputError(f"{field}: format {version} knows numbers and 'linear', found {rate!r}")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of every block."""
        return tuple(map(kind_of, self.rates))

    @property
    def converted(self) -> tuple[int, ...]:
        """The indices of the blocks that are not full softmax."""
        return tuple(i for i, rate in enumerate(self.rates) if rate != 1)

    @property
    def mapped(self) -> tuple[int, ...]:
        """The indices of the blocks that have feature maps."""
        return self._learning("feature_maps")

    @property
    def projected(self) -> tuple[int, ...]:
        """The indices of the blocks that have a projection."""
        return self._learning("projection")

    def _learning(self, what: str) -> tuple[int, ...]:
        return tuple(i for i in self.converted if self.linear_branch and self.kinds[i].learns == what)

    def token_order(self, grid: tuple[int, int, int], shards: int = 1) -> TokenOrder | None:
        """The prefix order of a (time, height, width) token grid; None if no block needs one."""
        if not any(kind.needs_prefix for kind in self.kinds):
            return None
        return token_order(grid, self.chain, self.lattice, shards)


def token_order(grid: tuple[int, int, int], chain: Sequence[int], lattice: str, shards: int = 1) -> TokenOrder:
    """The order of a (time, height, width) token grid in which each rate's softmax tokens come first in every shard."""
    frames, height, width = grid
    size = height * width
    return TokenOrder(frames * size, tuple(chain), lattice, size, shards, tokens_per_row=width)
