"""Reads a compiled program's HLO text for the traffic between devices, and XLA's report for the largest buffers."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*?)\[([\d,]*)\]")
_CALLED = re.compile(r"(body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")  # {{0,1},{2,3}} or [2,2]<=[4]
_BUFFER = re.compile(r"^ +[\d.]+\w+\( *\d+%\); +([\d.]+)(B|KiB|MiB|GiB); .*; (.+)$", re.MULTILINE)
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    result: str
    operation: str
    rest: str

    @property
    def bytes_out(self) -> int:
        """Bytes that a collective produces on a device; of a reduce-scatter the bytes that it takes."""
        sizes = [_nbytes(*shape) for shape in _SHAPE.findall(self.result)]
        if self.operation == "reduce-scatter" and (groups := _GROUPS.search(self.rest)):
            return sum(sizes) * (int(groups[2]) if groups[2] else 1 + groups[1].count(","))
        if self.operation in ("all-gather-start", "collective-permute-start"):  # the result also lists the inputs
            return sum(sizes[len(sizes) // 2 :]) if self.operation == "all-gather-start" else sizes[1]
        return sum(sizes)


def collectives(text: str) -> dict[str, dict[str, int]]:
    """By kind of collective: `count`, and `bytes` produced on one device, in one run of the program.

    The body of a loop counts as often as it runs, or once where that is not known. Of a conditional only the branch
    that moves most bytes counts. A reduce-scatter counts the bytes that it takes. A collective that TPUs split into
    steps, to run beside other work, counts once.
    """
    computations, entry = _parse(text)
    totals = _total(entry, computations, {})
    kinds = sorted({kind for kind, _ in totals})
    return {kind: {unit: totals[kind, unit] for unit in ("count", "bytes")} for kind in kinds}


def largest_buffers(report: str, count: int) -> list[tuple[int, str]]:
    """(bytes, shapes of the values that share the buffer) of the `count` largest buffers in XLA's memory usage report.

    Only the report's first memory space is read: on a TPU that is HBM.
    """
    space = re.split(r"^Memory Space: ", report, flags=re.MULTILINE)[1:2]
    rows = _BUFFER.findall("".join(space))
    buffers = [(int(float(size) * _UNITS[unit]), shapes) for size, unit, shapes in rows]
    return sorted(buffers, key=lambda buffer: -buffer[0])[:count]


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation by its name, and the name of the entry computation."""
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(Instruction(*match.groups()))
    return computations, entry


def _total(name: str, computations: dict[str, list[Instruction]], known: dict[str, Counter]) -> Counter:
    """(kind, "count" | "bytes") -> total of a computation and all that it calls; `known` keeps totals by name."""
    if name not in known:
        known[name] = Counter()
        instructions = computations.get(name, [])
        starts = any("AsyncCollectiveStart" in instruction.rest for instruction in instructions)
        for instruction in instructions:
            kind = instruction.operation.removesuffix("-start")
            if kind in COLLECTIVES:
                if starts or "chain_id=" not in instruction.rest:
                    known[name] += Counter({(kind, "count"): 1, (kind, "bytes"): instruction.bytes_out})
            else:
                for times, called in _called(instruction, computations, known):
                    known[name] += Counter({key: times * n for key, n in called.items()})
    return known[name]


def _called(instruction: Instruction, computations, known) -> Iterator[tuple[int, Counter]]:
    """(how often it runs, its totals) of each computation that an instruction calls."""
    times = _trips(instruction, computations) if instruction.operation == "while" else 1
    branches = [name.strip().lstrip("%") for names in _BRANCHES.findall(instruction.rest) for name in names.split(",")]
    for role, name in _CALLED.findall(instruction.rest):
        if role in ("true_computation", "false_computation"):
            branches.append(name)
        else:
            yield times, _total(name, computations, known)
    if branches:
        totals = [_total(name, computations, known) for name in branches]
        yield 1, max(totals, key=lambda total: sum(n for (_, unit), n in total.items() if unit == "bytes"))


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """How often a loop runs: the compiler's note, else the only constant in the loop's condition, else 1."""
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    compared = computations.get(condition[1], []) if condition else []
    constants = [instruction.rest for instruction in compared if instruction.operation == "constant"]
    numbers = [int(digits[0]) for text in constants if (digits := re.match(r"\d+", text))]
    return numbers[0] if len(numbers) == 1 else 1


def _nbytes(dtype: str, dimensions: str) -> int:
    return BYTES.get(dtype, 0) * math.prod(int(size) for size in dimensions.split(",") if size)
