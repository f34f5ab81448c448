"""compile --stage=all: compiles every program of a command for TPUs, and adds what lies beside each on a chip.

All numbers are the compiler's estimates and arithmetic, not measurements.
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.errors import DoesNotFit
from jsurgery.estimate.chips import GIB
from jsurgery.estimate.compile_ahead import (
    OutOfMemory,
    branch_shares,
    chip_and_devices,
    compile_program,
    memory_parts,
    mesh_of,
)
from jsurgery.estimate.programs import lowered
from jsurgery.estimate.traffic import ProgramWork, bound_by, program_work
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report, markdown_table
from jsurgery.runtime.mesh import make_mesh, mesh_sizes
from jsurgery.runtime.mesh_choice import USABLE, describe_mesh
from jsurgery.runtime.progress import say
from jsurgery.surgery.phases import COMPUTING, phases_of
from jsurgery.wan.model_sizes import find_sizes

COMMANDS = {"surgery": COMPUTING, "sample": ("sample",)}


def compile_command(
    config: ConfigDict, config_name: str, command: str, topology: str, *, report: str | None = None
) -> None:
    """Compiles the programs of "surgery" or "sample" for a topology, and prints what each phase takes of a chip.

    A phase takes what it holds through all its programs (by arithmetic, `surgery.phases`) and what the compiler adds
    for its largest program. `report` names a JSON file for the rows. Raises DoesNotFit, after the table, if a phase
    takes more than a chip has.
    """
    check_report(report)
    rows = list(phase_rows(config, config_name, command, topology))
    print(as_text(command, topology, rows), flush=True)
    if report is not None:
        source = "static estimates of the TPU compiler; what lies beside a program by arithmetic"
        write_json(epath.Path(report), {"command": command, "topology": topology, "phases": rows, "source": source})
    if too_large := [row for row in rows if not row["fits"]]:
        names = ", ".join(f"{row['stage']}: {row['phase']}" for row in too_large)
        raise DoesNotFit(f"{command} on {topology}: {len(too_large)} of {len(rows)} phases do not fit ({names})")


def phase_rows(config: ConfigDict, config_name: str, command: str, topology: str) -> Iterator[dict[str, Any]]:
    sizes = find_sizes(config, config_name)
    chip, devices = chip_and_devices(topology, 1)
    known: dict[Any, tuple[dict[str, int], ProgramWork]] = {}  # stages share programs: the VAE's, the text encoder's
    for stage in COMMANDS[command]:
        start: dict[str, Any] = {"stage": stage, "capacity_bytes": chip.memory}
        try:
            placed = mesh_of(stage, config, sizes, chip, devices, topology)
        except DoesNotFit as error:
            yield start | {"phase": "any", "mesh": None, "error": str(error), "fits": False}
            continue
        mesh = make_mesh(placed.mesh, devices)
        for phase in phases_of(stage, placed, sizes, mesh):
            held = sum(phase.held.values())
            row = start | {"phase": phase.name, "program": phase.program, "mesh": mesh_sizes(placed.mesh)}
            row |= {"held": dict(phase.held), "held_bytes": held, "declared_bytes": phase.bytes}
            say(f"compile: {stage}, {phase.name} on {topology}")
            began = time.perf_counter()
            low = lowered(phase.program, placed, sizes, mesh)
            shares = branch_shares(placed, sizes.transformer) if phase.program in ("sample", "finetune") else ()
            key = hashlib.sha256(low.as_text().encode()).digest(), shares
            try:
                if key not in known:
                    compiled = compile_program(low)
                    known[key] = memory_parts(compiled), program_work(compiled.as_text(), shares)
            except OutOfMemory as error:
                yield row | {"error": str(error), "fits": False}
                continue
            memory, work = known[key]
            seconds = work.seconds(chip)
            row |= dataclasses.asdict(work) | {"seconds": seconds, "bound_by": bound_by(seconds)}
            added = memory["temp"] + memory["output"] - memory["alias"]
            peak = max(held, memory["argument"]) + added
            fits = peak <= USABLE * chip.memory
            took = time.perf_counter() - began
            say(f"  {peak / GIB:.2f} of {chip.memory / GIB:.0f} GiB, declared {phase.bytes / GIB:.2f}; {took:.0f} s")
            yield row | {"memory_bytes": memory, "peak_bytes": peak, "fits": fits, "compile_seconds": took}


def as_text(command: str, topology: str, rows: list[dict[str, Any]]) -> str:
    """The table that the command prints, in Markdown."""
    gib = lambda count: f"{count / GIB:.2f}"
    cells = []
    for row in rows:
        start = [row["stage"], row["phase"], describe_mesh(row["mesh"]) if row["mesh"] else "none fits"]
        if "error" in row:
            cells.append([*start, gib(row.get("held_bytes", 0)), "", "", f"does not fit: {row['error']}", "", ""])
            continue
        peak, held, capacity = row["peak_bytes"], row["held_bytes"], row["capacity_bytes"]
        verdict = "fits" if row["fits"] else "does not fit"
        times = " / ".join(f"{row['seconds'][kind]:.3g}" for kind in ("compute", "memory", "exchange"))
        peaks = [gib(held), gib(peak - held), f"{gib(peak)} of {capacity / GIB:.0f}", verdict]
        cells.append([*start, *peaks, times, row["bound_by"]])
    header = ["stage", "phase", "mesh", "held, GiB a chip", "added by the program", "peak", ""]
    header += ["s a run: compute / memory / exchange", "ruled by"]
    title = f"{command} on {topology}: static estimates of the TPU compiler; what lies beside a program by arithmetic"
    return "\n".join([title, markdown_table(header, cells)])
