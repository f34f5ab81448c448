"""The work of a compiled program on one device: FLOPs, bytes of HBM traffic, bytes exchanged with other devices.

Counted in the HLO text of a program that was compiled for TPUs, as the compiler lays values out. Nothing is measured.
Bodies of loops count as often as they run; XLA's own `cost_analysis` counts them once.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence

from jsurgery.estimate.chips import Chip
from jsurgery.estimate.hlo import COLLECTIVES, Computation, Instruction, Module, Value, collectives, parse

# Operations that move nothing: they name, group or reinterpret values, or end what a "-start" began.
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
)
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")
SLICES = ("slice", "dynamic-slice", "gather")  # of the first operand they read what they return
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place; by the number of the operand that is written
RELAYOUTS = ("bitcast", "convert", "copy", "reshape", "transpose")  # inside a fusion: element by element, as needed

_COST = re.compile(r'"cost_estimate":\{([^}]*)\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"(size|stride|pad|lhs_dilate|rhs_dilate)=([\d_x\-]+)")


@dataclasses.dataclass(frozen=True)
class ProgramWork:
    """The work of one device in one run of a program.

    Attributes:
        flops: of matrix products and convolutions, and what kernels declare; 1 multiply-add is 2 FLOP.
        hbm_bytes: read from and written to HBM; see `hbm_bytes`.
        exchanged_bytes: produced by collectives; see `hlo.collectives`.
    """

    flops: float
    hbm_bytes: float
    exchanged_bytes: float

    def seconds(self, chip: Chip) -> dict[str, float]:
        """The least time of each: FLOPs at the peak rate, HBM traffic at full bandwidth, exchange over one ring."""
        return {
            "compute": self.flops / chip.flops,
            "memory": self.hbm_bytes / chip.bandwidth,
            "exchange": self.exchanged_bytes / chip.link,
        }


def bound_by(seconds: dict[str, float]) -> str:
    """The name of the longest of the times."""
    return max(seconds, key=seconds.__getitem__)


def program_work(text: str, branch_shares: Sequence[float] = ()) -> ProgramWork:
    """The work of a program, from its HLO text: `jax.stages.Compiled.as_text()`.

    `branch_shares` says how often each branch is taken of conditionals that have as many branches; of any other
    conditional the heaviest branch counts.
    """
    program = parse(text)
    flops = program.total(_flops, Counter.total, branch_shares)
    hbm = lambda instruction, computation: _hbm(program, instruction, computation)
    moved = program.total(hbm, Counter.total, branch_shares)
    exchanged = sum(kind["bytes"] for kind in collectives(text, branch_shares).values())
    return ProgramWork(flops["flops"], moved["bytes"], exchanged)


def _hbm(program: Module, instruction: Instruction, computation: Computation) -> Counter | None:
    """HBM traffic of an instruction; None if that is the traffic of the computations that it calls."""
    operation = instruction.operation
    if operation in ("while", "conditional", "call", "async-start"):
        return None
    return Counter({"bytes": hbm_bytes(program, instruction, computation)})


def hbm_bytes(program: Module, instruction: Instruction, computation: Computation) -> int:
    """Bytes that an instruction reads from HBM and writes to it.

    Operands and results count once, with the padding of their tiles, unless they lie in the chip's own memory. A fusion
    counts at its boundary. What slices a value counts the slice, and what updates a slice in place counts the slice,
    also inside a fusion. A kernel counts what its `cost_estimate` says, in proportion to how much of its operands and
    results lies in HBM, since the estimate does not tell them apart.
    """
    operation = instruction.operation.removesuffix("-start")
    if operation in FREE or operation.endswith(("-done", "-update")):
        return 0
    if operation == "custom-call" and (target := _TARGET.search(instruction.rest)) and target[1] in FREE_CALLS:
        return 0
    operands = [computation[name] for name in instruction.operands if name in computation]
    sizes = [_stored(each.values) for each in operands]
    results = _results(instruction)
    if cost := _kernel_cost(instruction):
        everything = _size(results) + sum(_size(each.values) for each in operands)
        return round(cost.get("bytes_accessed", 0) * (sum(sizes) + _stored(results)) / max(everything, 1))
    if operation in SLICES:
        return (_size(results) if sizes[0] else 0) + _stored(results) + sum(sizes[1:])
    if operation in UPDATES:
        update = operands[UPDATES[operation]].values
        return sum(sizes[1:]) + (_size(update) if results[0].in_hbm else 0)
    if operation == "fusion":
        called = program.computations[program.calls(instruction)[1][0]]
        shares = [_read_share(program, called, called.parameters[i].name) for i in range(len(sizes))]
        read = sum(round(size * share) for size, share in zip(sizes, shares, strict=True))
        return read + _written(called, called.root)
    return sum(sizes) + _stored(results)


def _results(instruction: Instruction) -> tuple[Value, ...]:
    """The values that an instruction writes: not the operands that the result of a "-start" lists first."""
    values = instruction.values
    if not instruction.operation.endswith("-start"):
        return values
    if instruction.operation == "copy-start":
        return values[:1]  # (destination, source, context)
    kind = instruction.operation.removesuffix("-start")
    if kind == "all-reduce":
        return values
    if kind in COLLECTIVES:
        return values[len(values) // 2 :] if kind == "all-gather" else values[1:2]
    return values[len(instruction.operands) : len(instruction.operands) + 1]


def _size(values: tuple[Value, ...]) -> int:
    return sum(value.stored_bytes for value in values)


def _stored(values: tuple[Value, ...]) -> int:
    """Bytes of those values that lie in HBM."""
    return sum(value.stored_bytes for value in values if value.in_hbm)


def _read_share(program: Module, fused: Computation, name: str) -> float:
    """The share of a value that a fusion reads of it, at most 1."""
    value = fused[name]
    if value.is_root:
        return 1.0
    share = 0.0
    for user in fused.users[name]:
        if user.operation in SLICES and user.operands[0] == name:
            share += _elements(user) / max(_elements(value), 1)
        elif user.operation in RELAYOUTS:
            share += _read_share(program, fused, user.name)
        elif user.operation == "fusion":
            called = program.computations[program.calls(user)[1][0]]
            positions = [i for i, operand in enumerate(user.operands) if operand == name]
            share += sum(_read_share(program, called, called.parameters[i].name) for i in positions)
        elif not _leaves_alone(fused, user, name):
            share += 1.0
    return min(share, 1.0)


def _leaves_alone(fused: Computation, user: Instruction, name: str) -> bool:
    """Whether a user in a fusion only hands a value on: to an update in place, or to a later step of a collective."""
    if user.operation in UPDATES:
        return user.operands[0] == name
    if user.operation == "tuple":
        return fused[name].operation == "parameter"
    return fused.is_later_step(user) or '"AsyncCollective' in user.rest


def _written(fused: Computation, value: Instruction) -> int:
    """Bytes that a fusion writes to HBM for a value of its computation: the root, or a part of it."""
    if value.operation == "tuple":
        return sum(_written(fused, fused[operand]) for operand in value.operands)
    handed_on = value.operation == "parameter" and not value.is_root
    if handed_on or fused.is_later_step(value) or '"AsyncCollectiveDone"' in value.rest:
        return 0
    if '"AsyncCollectiveStart"' in value.rest:
        return sum(_stored(fused[operand].values) for operand in value.operands)
    updating = fused[value.operands[0]] if value.operation == "bitcast" else value
    if updating.operation in UPDATES and value.values[0].in_hbm:
        return _size(fused[updating.operands[UPDATES[updating.operation]]].values)
    return _stored(value.values)


def _elements(instruction: Instruction) -> int:
    return sum(math.prod(value.shape) for value in instruction.values)


def _kernel_cost(instruction: Instruction) -> dict[str, int]:
    """What a Pallas kernel's call says of its cost (`pl.CostEstimate`), by name; {} if it says nothing."""
    found = _COST.search(instruction.rest)
    return {name: int(n) for name, n in re.findall(r'"(\w+)":"?(\d+)', found[1])} if found else {}


def _flops(instruction: Instruction, computation: Computation) -> Counter | None:
    """FLOPs of a product, a convolution or a kernel; None for what calls computations."""
    if instruction.operation == "custom-call":
        return Counter(flops=_kernel_cost(instruction).get("flops", 0))
    if instruction.operation == "dot":
        lhs, _ = (computation[name].values[0] for name in instruction.operands)
        axes = _CONTRACTED.search(instruction.rest)
        contracted = math.prod(lhs.shape[int(axis)] for axis in axes[1].split(",") if axis) if axes else 1
        return Counter(flops=2 * _elements(instruction) * contracted)
    if instruction.operation == "convolution":
        return Counter(flops=_convolution_flops(instruction, computation))
    return None


def _convolution_flops(instruction: Instruction, computation: Computation) -> int:
    """2 FLOP for each pair of an input and a weight that meet: padding and the gaps of a dilation do not count."""
    labels = _LABELS.search(instruction.rest)
    assert labels is not None
    lhs, rhs = (computation[name].values[0].shape for name in instruction.operands)
    out = instruction.values[0].shape
    window = dict(_WINDOW.findall(instruction.rest))
    meeting = 1
    for axis in sorted(digit for digit in labels[1] if digit.isdigit()):
        own = {name: values.split("x")[int(axis)] for name, values in window.items()}
        stride, gap, spread = (int(own.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(own.get("pad", "0_0").partition("_")[0])
        inputs, outputs, taps = lhs[labels[1].index(axis)], out[labels[3].index(axis)], rhs[labels[2].index(axis)]
        places = [i * stride + tap * spread - low for i in range(outputs) for tap in range(taps)]
        meeting *= sum(place % gap == 0 and 0 <= place // gap < inputs for place in places)
    batch_groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
    batch = lhs[labels[1].index("b")] // (int(batch_groups[1]) if batch_groups else 1)
    return 2 * batch * rhs[labels[2].index("i")] * rhs[labels[2].index("o")] * meeting
