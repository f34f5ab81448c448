"""Published figures of TPU chips: memory, peak rates, links."""

import dataclasses
import math
import re

from jsurgery.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip.

    Attributes:
      memory: bytes of HBM.
      flops: bfloat16 FLOP/s.
      bandwidth: bytes/s between HBM and the chip.
      link: bytes/s of the link to a neighbour, both directions together: the rate of a ring on one torus axis.
    """

    memory: int
    flops: float
    bandwidth: float
    link: float


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.2e12, 1e11),
    "v5e": Chip(16 * GIB, 197e12, 8.0e11, 1e11),
    "v5p": Chip(95 * GIB, 459e12, 2.77e12, 2e11),
    "v6e": Chip(32 * GIB, 918e12, 1.6e12, 2e11),
}


def parse_topology(topology: str) -> tuple[Chip, int]:
    """ "v5e:4x4" -> (the v5e, 16). Raises InputError for other texts and unknown chips."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise InputError(f"--topology: expected one like v5e:4x4, of {', '.join(CHIPS)}; found {topology!r}")
    return CHIPS[name], math.prod(int(size) for size in shape.split("x"))
