"""The families of kinds, and what files and commands call them."""

import functools
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from jsurgery.attention.kinds.base import Kind
from jsurgery.attention.kinds.chunked import Chunked
from jsurgery.attention.kinds.prefix import Linear, RateHybrid, Softmax
from jsurgery.attention.kinds.sparse import SparseLinear
from jsurgery.errors import InputError, shortened
from jsurgery.rates import Rate

FAMILIES: list[type[Kind]] = [Softmax, RateHybrid, Linear, Chunked, SparseLinear]

# A part of a plan's budget by name; see `parse_block_budget`.
BUDGET_PART = re.compile(r"(\d+)([A-Za-z]\w*)", re.ASCII)


def register(family: type[Kind]) -> type[Kind]:
    """Makes a family known to all of jsurgery. Also a decorator of its class."""
    if family not in FAMILIES:
        FAMILIES.append(family)
        kind_or_none.cache_clear()
    return family


@functools.lru_cache(maxsize=1024, typed=True)
def kind_or_none(rate: Rate) -> Kind | None:
    """The kind that is spelled `rate`; None for what no family knows."""
    return next((kind for family in FAMILIES if (kind := family.parse(rate)) is not None), None)


def kind_of(rate: Any) -> Kind:
    """The kind that configs, plans and checkpoints spell `rate`: 1, 2, "linear", "C3O1".

    Raises InputError for what no family knows.
    """
    kind = kind_or_none(rate) if type(rate) in (int, str) else None
    if kind is None:
        raise InputError(f"rate: expected {spellings()}, found {rate!r}")
    return kind


def spellings() -> str:
    """How kinds are spelled, for messages: "integers from 1 or 'linear' or ..."."""
    return " or ".join(dict.fromkeys(family.spelling for family in FAMILIES))


def check_rate(field: str, rate: Any) -> None:
    """Raises InputError, which calls it `field`, unless some family knows the rate."""
    if type(rate) not in (int, str) or kind_or_none(rate) is None:
        raise InputError(f"{field}: expected {spellings()}, found {shortened(rate)}")


def check_rates(field: str, rates: Iterable[Any]) -> None:
    """Raises InputError unless rates are distinct kinds, and each number is a divisor of the next larger one.

    `field` is the rates' name in the message.
    """
    rates = tuple(rates)
    for rate in rates:
        check_rate(field, rate)
    if not rates or len(set(rates)) != len(rates):
        raise InputError(f"{field}: expected distinct rates, found {rates}")
    for small, large in pairwise(sorted(rate for rate in rates if isinstance(rate, int))):
        if large % small:
            raise InputError(f"{field}: expected a divisibility chain, but {small} does not divide {large}")


def rate_key(rate: Rate) -> tuple[Any, ...]:
    """A sort key that orders rates from full softmax to "linear"."""
    return kind_of(rate).sort_key


def rate_name(rate: Rate) -> str:
    """1 -> "softmax", 2 -> "R2", "linear" -> "linear". A number may also be a string, "2", as in the keys of JSON."""
    return kind_of(int(rate) if isinstance(rate, str) and rate.isdecimal() else rate).name


def parse_block_budget(text: str) -> tuple[tuple[int, Rate], ...] | None:
    """ "15R2" -> ((15, 2),); "8R2+4C3O1" -> ((8, 2), (4, "C3O1")). None for any other text.

    Such a name stands for as much compute as so many blocks of these kinds, and softmax in the others.
    """
    parts = []
    for part in text.split("+"):
        match = BUDGET_PART.fullmatch(part)
        kinds = (family.parse_plan_name(match[2]) for family in FAMILIES) if match else ()
        kind = next((kind for kind in kinds if kind is not None), None)
        if match is None or kind is None:
            return None
        parts.append((int(match[1]), kind.rate))
    return tuple(parts)


def plan_of_budget(budget: tuple[tuple[int, Rate], ...], blocks: int) -> tuple[Rate, ...] | None:
    """A plan that costs what a budget by name allows: its blocks, in its order, then softmax. None: too many blocks."""
    converted = [rate for count, rate in budget for _ in range(min(count, blocks + 1))]
    return None if len(converted) > blocks else (*converted, *[1] * (blocks - len(converted)))
