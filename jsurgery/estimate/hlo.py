"""Reads a compiled program's HLO text: its instructions, how often they run, and the traffic between devices.

Also reads XLA's report for the largest buffers.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16} | {f"{kind}{8 * n}": n for kind in "suf" for n in (1, 2, 4, 8)}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_VALUE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")  # {{0,1},{2,3}} or [2,2]<=[4]
_BUFFER = re.compile(r"^ +[\d.]+\w+\( *\d+%\); +([\d.]+)(B|KiB|MiB|GiB); .*; (.+)$", re.MULTILINE)
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Value:
    """An array in an instruction's result. `layout` is the text in braces after its shape, like "1,0:T(8,128)S(1)"."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def nbytes(self) -> int:
        return BYTES.get(self.dtype, 0) * math.prod(self.shape)

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in HBM: memory space 0, which the text leaves out."""
        return "S(" not in self.layout

    @property
    def stored_bytes(self) -> int:
        """`nbytes` with the padding of the two minor dimensions to whole tiles."""
        order, _, tiles = self.layout.partition(":")
        tile = [int(size) for size in tiles[2 : tiles.find(")")].split(",")] if tiles.startswith("T(") else []
        minor_first = [self.shape[int(axis)] for axis in order.split(",")] if order else list(self.shape)[::-1]
        padded = [-(-size // unit) * unit for size, unit in zip(minor_first, tile[::-1], strict=False)]
        return BYTES.get(self.dtype, 0) * math.prod(padded + minor_first[len(padded) :])


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = result operation(rest`; `rest` holds the operands, the closing parenthesis and the attributes."""

    name: str
    result: str
    operation: str
    rest: str
    is_root: bool = False

    @functools.cached_property
    def values(self) -> tuple[Value, ...]:
        """The arrays of the result, those of a tuple in order."""
        return tuple(
            Value(dtype, tuple(int(size) for size in shape.split(",") if size), layout)
            for dtype, shape, layout in _VALUE.findall(self.result)
        )

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        depth = 1
        for position, character in enumerate(self.rest):
            depth += (character == "(") - (character == ")")
            if depth == 0:
                return tuple(_OPERAND.findall(self.rest[:position]))
        return tuple(_OPERAND.findall(self.rest))

    @property
    def constant(self) -> int | None:
        """The value of an integer constant."""
        number = re.match(r"\d+\)", self.rest) if self.operation == "constant" else None
        return int(number[0][:-1]) if number else None

    @property
    def bytes_out(self) -> int:
        """Bytes that a collective produces on a device; of a reduce-scatter the bytes that it takes."""
        sizes = [value.nbytes for value in self.values]
        if self.operation == "reduce-scatter" and (groups := _GROUPS.search(self.rest)):
            return sum(sizes) * (int(groups[2]) if groups[2] else 1 + groups[1].count(","))
        if self.operation in ("all-gather-start", "collective-permute-start"):  # the result also lists the inputs
            return sum(sizes[len(sizes) // 2 :]) if self.operation == "all-gather-start" else sizes[1]
        return sum(sizes)


class Computation(dict[str, Instruction]):
    """The instructions of a computation by name, in their order."""

    @functools.cached_property
    def root(self) -> Instruction:
        return next((each for each in self.values() if each.is_root), list(self.values())[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by number."""
        return {int(each.rest.partition(")")[0]): each for each in self.values() if each.operation == "parameter"}

    @functools.cached_property
    def starts_collective(self) -> bool:
        """Whether a collective begins here that TPUs split into steps, to run beside other work."""
        return any('"AsyncCollectiveStart"' in each.rest for each in self.values())

    def is_later_step(self, collective: Instruction) -> bool:
        """Whether a collective is such a step, and not the first."""
        return "chain_id=" in collective.rest and not self.starts_collective

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read an instruction's result, by its name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self}
        for each in self.values():
            for operand in dict.fromkeys(each.operands):
                users.setdefault(operand, []).append(each)
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program by name; `entry` is the name of the one that is run."""

    computations: dict[str, Computation]
    entry: str

    def total(
        self,
        count: Callable[[Instruction, Computation], Counter | None],
        weigh: Callable[[Counter], float],
        branch_shares: Sequence[float] = (),
    ) -> Counter:
        """The sum of `count(instruction, its computation)` over one run of the program.

        Where `count` returns None, the computations that the instruction calls are counted: the body of a loop as often
        as it runs, or once where that is not known; the branches of a conditional by their share of its runs, if there
        are as many as `branch_shares`, otherwise only the branch of most weight by `weigh`.
        """
        return self._total(self.entry, count, weigh, branch_shares, {})

    def _total(self, name: str, count, weigh, shares: Sequence[float], known: dict[str, Counter]) -> Counter:
        if name not in known:
            known[name] = Counter()
            computation = self.computations.get(name, Computation())
            for instruction in computation.values():
                own = count(instruction, computation)
                if own is not None:
                    known[name] += own
                    continue
                times, called, branches = self.calls(instruction)
                inside = lambda name: self._total(name, count, weigh, shares, known)
                totals: list[tuple[float, Counter]] = [(times, inside(each)) for each in called]
                taken = [inside(each) for each in branches]
                if len(taken) == len(shares):
                    totals += zip(shares, taken, strict=True)
                elif taken:
                    totals.append((1, max(taken, key=weigh)))
                for runs, each in totals:
                    known[name] += Counter({key: runs * n for key, n in each.items()})
        return known[name]

    def calls(self, instruction: Instruction) -> tuple[int, list[str], list[str]]:
        """How often an instruction runs what it calls, the computations that it calls, and those of which it takes
        one."""
        branches = [
            name.strip().lstrip("%") for names in _BRANCHES.findall(instruction.rest) for name in names.split(",")
        ]
        called = []
        for role, name in _CALLED.findall(instruction.rest):
            (branches if role in ("true_computation", "false_computation") else called).append(name)
        return self.trips(instruction) if instruction.operation == "while" else 1, called, branches

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: by the compiler's note, else by the only constant in its condition, else once.

        The counter starts at 0 and may go up by more than 1: loops that overlap products with exchange are unrolled.
        """
        if noted := _TRIPS.search(loop.rest):
            return int(noted[1])
        of = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        condition = self.computations.get(of[1], Computation()) if of else Computation()
        limits = [number for each in condition.values() if (number := each.constant) is not None]
        return -(-limits[0] // self._step(loop, condition)) if len(limits) == 1 else 1

    def _step(self, loop: Instruction, condition: Computation) -> int:
        """By how much a loop's body raises the counter that the condition compares; 1 where that is not plain."""
        (name,) = [each for role, each in _CALLED.findall(loop.rest) if role == "body"]
        body = self.computations[name]
        for compared in (condition[operand] for operand in condition.root.operands if operand in condition):
            index = re.search(r"index=(\d+)", compared.rest)
            if index and int(index[1]) < len(body.root.operands):
                raised = body[body.root.operands[int(index[1])]]
                added = [body[operand].constant for operand in raised.operands if operand in body]
                if raised.operation == "add" and (steps := [number for number in added if number]):
                    return steps[0]
        return 1


def parse(text: str) -> Module:
    """The computations of HLO text, as `compiled.as_text()` has it."""
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[1], Computation())
            entry = match[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, result, operation, rest = match.groups()
            current[name] = Instruction(name, result, operation, rest, root is not None)
    return Module(computations, entry)


def collectives(text: str, branch_shares: Sequence[float] = ()) -> dict[str, dict[str, int]]:
    """By kind of collective: `count`, and `bytes` produced on one device, in one run of the program.

    A reduce-scatter counts the bytes that it takes. A collective that TPUs split into steps, to run beside other work,
    counts once. For loops and conditionals see `Module.total`.
    """

    def count(instruction: Instruction, computation: Computation) -> Counter | None:
        kind = instruction.operation.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None
        if computation.is_later_step(instruction):
            return Counter()
        return Counter({(kind, "count"): 1, (kind, "bytes"): instruction.bytes_out})

    weigh = lambda total: sum(n for (_, unit), n in total.items() if unit == "bytes")
    totals = parse(text).total(count, weigh, branch_shares)
    kinds = sorted({kind for kind, _ in totals})
    return {kind: {unit: round(totals[kind, unit]) for unit in ("count", "bytes")} for kind in kinds}


def largest_buffers(report: str, count: int) -> list[tuple[int, str]]:
    """(bytes, shapes of the values that share the buffer) of the `count` largest buffers in XLA's memory usage report.

    Only the report's first memory space is read: on a TPU that is HBM.
    """
    space = re.split(r"^Memory Space: ", report, flags=re.MULTILINE)[1:2]
    rows = _BUFFER.findall("".join(space))
    buffers = [(int(float(size) * _UNITS[unit]), shapes) for size, unit, shapes in rows]
    return sorted(buffers, key=lambda buffer: -buffer[0])[:count]
