"""Rates: at rate R, every R-th token of a block keeps softmax attention; the others use the linear branch."""

from collections.abc import Sequence

# How configs, plans and checkpoints spell what a block's attention is: 1 is full softmax, "linear" has no softmax
# token, and other families of kinds have names, such as "C3O1" (`jsurgery.attention.kinds.registry`).
Rate = int | str


def rate_chain(rates: Sequence[Rate]) -> tuple[int, ...]:
    """The rates of the nested zones that the token order needs: (2, 8, "linear", "C3O1") -> (1, 2, 8)."""
    return tuple(sorted({1, *(rate for rate in rates if isinstance(rate, int))}))
