"""Prefix order: which tokens keep softmax at a rate, and an order in which they come first at every rate."""

import dataclasses
import itertools
from functools import cached_property

import numpy as np

from jsurgery.errors import InputError
from jsurgery.rates import Rate

LATTICES = ("strided", "staggered", "staggered_rows")


@dataclasses.dataclass(frozen=True)
class TokenOrder:
    """Prefix order of a video's tokens under a chain of hybrid rates.

    Rate R keeps softmax for the tokens whose lattice position is a multiple of R (Attention Surgery,
    T_S = { j : j mod R = 0 }). On the strided lattice a token's position is j, its index in raster order over (frame,
    row, column). On the staggered lattice it is j + t, where t is the token's frame. On the lattice staggered by rows
    it is j + r, where r counts the rows of all frames.

    Rates that divide one another give nested sets. First come the tokens of the highest rate, then the tokens that the
    next lower rate adds, and so on, then the rest. Each of these zones is in raster order.

    A strided rate that divides `tokens_per_frame` keeps the same sites in every frame. The staggered lattice moves them
    by one column per frame. A strided rate that also divides `tokens_per_row` keeps whole columns, and none of the
    others. The lattice staggered by rows moves the sites by one column per row.

    With several shards, each zone is cut into equal runs, one per shard; the last runs are filled up with padding. A
    shard's own tokens are then in prefix order too, and the softmax tokens of a rate are the prefixes of all shards.

    Attributes:
        num_tokens: N.
        rates: the candidate rates, in any order: integers, each a divisor of the next higher one, and possibly
            "linear".
        lattice: "strided", "staggered" or "staggered_rows".
        tokens_per_frame: N / frames; only the staggered lattice needs it.
        shards: the number of devices over which the tokens are spread.
        tokens_per_row: the width of a frame; only the lattice staggered by rows needs it.

    Raises:
        InputError: rates that form no divisibility chain, or a lattice or frame size that does not fit.
    """

    num_tokens: int
    rates: tuple[Rate, ...] = (1, 2, 4, 8)
    lattice: str = "strided"
    tokens_per_frame: int | None = None
    shards: int = 1
    tokens_per_row: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "rates", tuple(self.rates))
        if self.num_tokens < 1:
            raise InputError(f"num_tokens: expected at least 1, found {self.num_tokens}")
        if self.lattice not in LATTICES:
            raise InputError(f"lattice: expected one of {', '.join(LATTICES)}, found {self.lattice!r}")
        for rate in self.rates:
            if rate != "linear" and (isinstance(rate, bool) or not isinstance(rate, int) or rate < 1):
                raise InputError(f'rates: expected integers of at least 1 or "linear", found {rate!r}')
        if self.shards < 1:
            raise InputError(f"shards: expected at least 1, found {self.shards}")
        chain = self._chain
        for lower, higher in itertools.pairwise(chain):
            if higher % lower:
                raise InputError(f"rates: expected each to divide the next, found {lower} and {higher}")
        if self.lattice != "strided":
            name = "tokens_per_row" if self.lattice == "staggered_rows" else "tokens_per_frame"
            size = getattr(self, name)
            if size is None or size < 1 or self.num_tokens % size:
                raise InputError(f"{name}: expected a divisor of the {self.num_tokens} tokens, found {size}")

    @cached_property
    def permutation(self) -> np.ndarray:
        """int [P]: the natural index of the i-th token in prefix order; `tokens[:, permutation]` is in prefix order.

        P is N, plus padding if there are several shards. At padding, token 0 is repeated.
        """
        return np.maximum(self._places, 0)

    @cached_property
    def valid(self) -> np.ndarray | None:
        """bool [P], False at padding; None if there is no padding."""
        return None if (self._places >= 0).all() else self._places >= 0

    @cached_property
    def inverse(self) -> np.ndarray:
        """int [N]: the place of token j in prefix order; `prefix_tokens[:, inverse]` is in natural order again."""
        places = np.flatnonzero(self._places >= 0)
        return places[np.argsort(self._places[places])]

    def num_softmax(self, rate: Rate) -> int:
        """The number of tokens that keep softmax at `rate`, the first in prefix order: N at rate 1, 0 at "linear".

        It is ceil(N / R) on the strided lattice, and may differ by a few on the staggered ones. With several shards
        it is the number in each shard, padding included.

        Raises:
            InputError: a rate that is not among `rates` (1 and "linear" always are).
        """
        if rate == "linear":
            return 0
        if rate != 1 and rate not in self._chain:
            raise InputError(f"rate: expected one of {list(self.rates)}, found {rate!r}")
        kept = self._zones if rate == 1 else self._zones[: len(self._chain) - self._chain.index(int(rate))]
        return sum(map(self._per_shard, kept))

    @property
    def _chain(self) -> list[int]:
        return sorted({rate for rate in self.rates if isinstance(rate, int)})

    @cached_property
    def _positions(self) -> np.ndarray:
        positions = np.arange(self.num_tokens)
        group = {"staggered": self.tokens_per_frame, "staggered_rows": self.tokens_per_row}.get(self.lattice)
        return positions if group is None else positions + positions // group

    @cached_property
    def _zones(self) -> list[np.ndarray]:
        """The natural indices of the tokens in each zone, from the highest rate's zone to the rest."""
        zone = np.zeros(self.num_tokens, int)
        for rate in self._chain:
            zone += self._positions % rate != 0
        return [np.flatnonzero(zone == number) for number in range(len(self._chain) + 1)]

    def _per_shard(self, zone: np.ndarray) -> int:
        return -(-len(zone) // self.shards)

    @cached_property
    def _places(self) -> np.ndarray:
        """int [P]: the natural index of the token at every place of the prefix order, -1 at padding."""
        dealt = []
        for zone in self._zones:
            padding = self.shards * self._per_shard(zone) - len(zone)
            dealt.append(np.pad(zone, (0, padding), constant_values=-1).reshape(self.shards, -1))
        return np.concatenate(dealt, axis=1).reshape(-1)
