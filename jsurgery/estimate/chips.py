"""Published figures of TPUs and GPUs: memory, peak rates, links; and the machines that presets are named after."""

import dataclasses
import math
import re

from jsurgery.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip or GPU.

    Attributes:
      memory: bytes of HBM, or of a GPU's memory.
      flops: bfloat16 FLOP/s, without sparsity.
      bandwidth: bytes/s between that memory and the chip.
      link: bytes/s of the link to a neighbour, both directions together: the rate of a ring on one torus axis. Of GPUs
        NVLink, or PCI Express where they have none.
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
    "h100": Chip(int(79.6 * GIB), 989e12, 3.35e12, 9e11),
    "rtx4090": Chip(24 * GIB, 165e12, 1.01e12, 6.4e10),
    "l4": Chip(int(22.5 * GIB), 121e12, 3.0e11, 6.4e10),
    "t4": Chip(15 * GIB, 65e12, 3.2e11, 3.2e10),  # 65 TFLOP/s in float16; it has no bfloat16
}
GPUS = ("h100", "rtx4090", "l4", "t4")  # no compiler for them is at hand: estimates are arithmetic alone

# Names of machines -> chips, and the topology of TPUs or the number of GPUs.
MACHINES = {
    "v5e-1": "v5e:1x1",
    "v5e-8": "v5e:2x4",
    "v6e-8": "v6e:2x4",
    "h100": "h100:1",
    "8xh100": "h100:8",
    "4090": "rtx4090:1",
    "l4": "l4:1",
    "t4": "t4:1",
}


def parse_topology(topology: str) -> tuple[Chip, int]:
    """ "v5e:4x4" -> (the v5e, 16); also a name in MACHINES. Raises InputError for other texts and unknown chips."""
    name, _, shape = MACHINES.get(topology, topology).partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        known = f"of {', '.join(CHIPS)}, or one of {', '.join(MACHINES)}"
        raise InputError(f"--topology: expected one like v5e:4x4, {known}; found {topology!r}")
    return CHIPS[name], math.prod(int(size) for size in shape.split("x"))
