"""What a compiled program says of itself: HLO text, read for the traffic between devices."""

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
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    result: str
    operation: str
    rest: str

    @property
    def largest(self) -> int:
        """Bytes of the largest array of its result: an asynchronous start returns its input beside its output."""
        return max((_nbytes(*shape) for shape in _SHAPE.findall(self.result)), default=0)


def collectives(text: str) -> dict[str, dict[str, int]]:
    """By kind: `count` and `bytes` that one device's collectives produce in one run of the program.

    A loop counts as often as it runs, where the compiler knows; of a conditional's branches the one that moves most
    counts. A reduce-scatter counts what goes in.
    """
    computations, entry = _parse(text)
    totals = _total(entry, computations, {})
    kinds = sorted({kind for kind, _ in totals})
    return {kind: {unit: totals[kind, unit] for unit in ("count", "bytes")} for kind in kinds}


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[1], [])
            entry = found[1] if line.startswith("ENTRY") else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(Instruction(*found.groups()))
    return computations, entry


def _total(name: str, computations: dict[str, list[Instruction]], known: dict[str, Counter]) -> Counter:
    if name not in known:
        known[name] = Counter()
        for instruction in computations.get(name, []):
            kind = instruction.operation.removesuffix("-start")
            if kind in COLLECTIVES:
                size = instruction.largest
                if kind == "reduce-scatter":
                    size = max(size, max((_nbytes(*s) for s in _SHAPE.findall(instruction.rest)), default=0))
                known[name] += Counter({(kind, "count"): 1, (kind, "bytes"): size})
            else:
                for times, called in _called(instruction, computations, known):
                    known[name] += Counter({key: times * n for key, n in called.items()})
    return known[name]


def _called(instruction: Instruction, computations, known) -> Iterator[tuple[int, Counter]]:
    """(how often, totals) of what an instruction runs."""
    trips = _TRIPS.search(instruction.rest)
    times = int(trips[1]) if trips and instruction.operation == "while" else 1
    branches = [name.strip().lstrip("%") for found in _BRANCHES.findall(instruction.rest) for name in found.split(",")]
    for role, name in _CALLED.findall(instruction.rest):
        if role in ("true_computation", "false_computation"):
            branches.append(name)
        else:
            yield times, _total(name, computations, known)
    if branches:
        totals = [_total(name, computations, known) for name in branches]
        yield 1, max(totals, key=lambda total: sum(n for (_, unit), n in total.items() if unit == "bytes"))


def _nbytes(dtype: str, dimensions: str) -> int:
    return BYTES.get(dtype, 0) * math.prod(int(size) for size in dimensions.split(",") if size)
