"""Rates: at rate R, every R-th token of a block keeps softmax attention; the others use the linear branch."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jsurgery.errors import InputError

# 1 is full softmax attention; "linear" has no softmax token.
Rate = int | str

# A plan's budget by name; see `parse_block_budget`.
BLOCK_BUDGET = re.compile(r"(\d+)R(\d+|linear)")


def check_rates(field: str, rates: Iterable[Any]) -> None:
    """Raises InputError unless rates are distinct integers, each a divisor of the next larger one, or "linear".

    `field` is the rates' name in the message.
    """
    rates = tuple(rates)
    for rate in rates:
        if rate != "linear" and (type(rate) is not int or rate < 1):
            raise InputError(f"{field}: expected integers from 1 or 'linear', found {rate!r}")
    numeric = sorted(rate for rate in rates if rate != "linear")
    if not rates or len(set(rates)) != len(rates):
        raise InputError(f"{field}: expected distinct rates, found {rates}")
    for small, large in itertools.pairwise(numeric):
        if large % small:
            raise InputError(f"{field}: expected a divisibility chain, but {small} does not divide {large}")


def rate_chain(rates: Sequence[Rate]) -> tuple[int, ...]:
    """The rates of the nested zones that the token order needs: (2, 8, "linear") -> (1, 2, 8)."""
    return tuple(sorted({1, *(rate for rate in rates if isinstance(rate, int))}))


def rate_key(rate: Rate) -> float:
    """A sort key that orders rates from full softmax to "linear"."""
    return math.inf if rate == "linear" else float(rate)


def rate_name(rate: Rate) -> str:
    """1 -> "softmax", 2 -> "R2", "linear" -> "linear". A rate may also be a string, "2", as in the keys of JSON."""
    return {"1": "softmax", "linear": "linear"}.get(str(rate), f"R{rate}")


def parse_block_budget(text: str) -> tuple[int, Rate] | None:
    """ "15R2" -> (15, 2): as much compute as 15 blocks at rate 2 and softmax in the others. None for any other text."""
    match = BLOCK_BUDGET.fullmatch(text)
    return None if match is None else (int(match[1]), "linear" if match[2] == "linear" else int(match[2]))
