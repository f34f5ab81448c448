"""--dry_run: what a command would run, on which mesh, and what it needs of devices, disk and time. Runs nothing.

Memory and disk are the arithmetic by which the command itself chooses its meshes (`surgery.phases`, `surgery.disk`);
hours are `jsurgery roofline`'s. Nothing is measured.
"""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from jsurgery.errors import DoesNotFit
from jsurgery.estimate.chips import CHIPS, GIB, Chip, parse_topology
from jsurgery.estimate.roofline import estimate, work_of_stages
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report, markdown_table
from jsurgery.runtime.mesh import abstract_mesh, mesh_sizes
from jsurgery.runtime.mesh_choice import describe_mesh, device_memory
from jsurgery.surgery.disk import GB, StageDisk, check_disk, disk_of_stages
from jsurgery.surgery.distillation.while_sampling import own_clips
from jsurgery.surgery.phases import COMPUTING, on_mesh, phases_of
from jsurgery.wan.models import ModelSizes, find_sizes

EFFICIENCY = 0.4  # of the peak rates, for the hours
# A row of the roofline -> the stage that it belongs to.
STAGE_OF_WORK = {"velocity errors of blocks": "distill", "evaluate": "evaluation"}


def dry_run(
    config: ConfigDict,
    config_name: str,
    topology: str,
    stages: Sequence[str],
    *,
    workdir: str | None = None,
    disk: float | None = None,
    kept: float | None = None,
    report: str | None = None,
) -> None:
    """Prints the phases of stages with mesh, memory, disk and hours.

    Args:
        config_name: tells the published model where `config.model.path` is empty.
        topology: such as "v5e-8" or "v5e:4x4"; "" for the devices of this machine.
        stages: names of stages.
        workdir: where the files would lie.
        disk: the GB that there are for all files; by default what is free at `workdir`.
        kept: the GB that there are for the results alone.
        report: a JSON file for the same numbers.

    Raises DoesNotFit, after the table, if a stage fits no mesh of the devices; InputError if the disk is too small.
    """
    check_report(report)
    sizes = find_sizes(config, config_name)
    machine, chip, count, capacity = devices_of(topology)
    computing = [stage for stage in stages if stage in COMPUTING]
    phases = [row for stage in computing for row in phase_rows(stage, config, sizes, count, capacity)]
    hours = [] if chip is None else hour_rows(config, sizes, stages, chip, count)
    disks = [row for row in disk_of_stages(config, sizes) if row.stage in stages]
    print(as_text(config, machine, count, capacity, stages, phases, hours, disks), flush=True)
    if report is not None:
        write_json(
            epath.Path(report),
            {"machine": machine, "devices": count, "phases": phases, "hours": hours, "disk": [vars(d) for d in disks]},
        )
    if too_large := [row for row in phases if "error" in row]:
        raise DoesNotFit("; ".join(row["error"] for row in too_large))
    check_disk(disks, workdir, disk, kept)


def devices_of(topology: str) -> tuple[str, Chip | None, int, int | None]:
    """(name, chip, number of devices, bytes of memory of each) of a topology, or of this machine.

    The chip and the memory are None where they are not known.
    """
    if topology:
        chip, count = parse_topology(topology)
        return topology, chip, count, chip.memory
    devices = jax.devices()
    kind = devices[0].device_kind
    return kind, chip_of(kind), len(devices), device_memory(devices[0])


def chip_of(kind: str) -> Chip | None:
    """The chip of a JAX device kind, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; None for others."""
    names = {"v5 lite": "v5e", "v6 lite": "v6e", "v5p": "v5p", "v4": "v4", "H100": "h100", "4090": "rtx4090"}
    names |= {"L4": "l4", "T4": "t4"}
    found = next((name for text, name in names.items() if text in kind), "v5p" if kind == "TPU v5" else None)
    return CHIPS[found] if found else None


def phase_rows(
    stage: str, config: ConfigDict, sizes: ModelSizes, count: int, capacity: int | None
) -> list[dict[str, Any]]:
    """The phases of a stage on the mesh that it would choose; one row with an error where none fits."""
    try:
        placed = on_mesh(stage, config, sizes, count, capacity, tell=lambda line: None)
    except DoesNotFit as error:
        return [{"stage": stage, "error": str(error)}]
    return [
        {"stage": stage, "phase": phase.name, "mesh": mesh_sizes(placed.mesh), "bytes": phase.bytes, **vars(phase)}
        for phase in phases_of(stage, placed, sizes, abstract_mesh(placed.mesh))
    ]


def hour_rows(
    config: ConfigDict, sizes: ModelSizes, stages: Sequence[str], chip: Chip, count: int
) -> list[dict[str, Any]]:
    """The roofline's rows of these stages, each with the hours on all devices."""
    rows = []
    for work in work_of_stages(config, sizes.transformer):
        stage = STAGE_OF_WORK.get(work.stage, work.stage)
        if stage in stages:
            row = estimate(work, chip, count, None, EFFICIENCY)
            rows.append(row | {"hours": row["chip_hours"]["expected"] / count})
    return rows


def as_text(
    config: ConfigDict,
    machine: str,
    count: int,
    capacity: int | None,
    stages: Sequence[str],
    phases: list[dict[str, Any]],
    hours: list[dict[str, Any]],
    disks: Sequence[StageDisk],
) -> str:
    """The tables that the command prints, in Markdown."""
    of = "" if capacity is None else f" of {capacity / GIB:.0f} GiB"
    lines = [f"{machine}, {count} devices{of}: arithmetic alone, nothing is run or measured", ""]
    cells = []
    for row in phases:
        if "error" in row:
            cells.append([row["stage"], "does not fit", "", ""])
            continue
        held = ", ".join(f"{what} {size / GIB:.2f}" for what, size in row["held"].items())
        peak = f"{row['bytes'] / GIB:.1f} ({held}; working {row['working'] / GIB:.2f})"
        cells.append([row["stage"], row["phase"], describe_mesh(row["mesh"]), peak])
    lines += [markdown_table(["stage", "phase", "mesh", f"GiB a device{of}"], cells), ""]
    cells = [[row.stage, f"{row.scratch / GB:.1f}", f"{row.kept / GB:.1f}"] for row in disks]
    cells.append(["all", f"{sum(r.scratch for r in disks) / GB:.1f}", f"{sum(r.kept for r in disks) / GB:.1f}"])
    lines += [markdown_table(["stage", "scratch, GB of disk", "kept"], cells, numbers=True), ""]
    if hours:
        header = ["stage", "steps", "compute, s a step", "memory", "exchange", "ruled by", f"hours at {EFFICIENCY:.0%}"]
        cells = [hour_cells(row) for row in hours]
        cells.append(["all", "", "", "", "", "", f"{sum(row['hours'] for row in hours):.2f}"])
        lines += [markdown_table(header, cells, numbers=True), ""]
    if "finetune" in stages and not config.data.path and config.finetune.steps:
        lines.append(
            f"fine-tuning reads the {own_clips(config)} clips at which the teacher's trajectories end, since "
            "config.data.path is empty; `jsurgery synthesize` makes more"
        )
    return "\n".join(lines).rstrip()


def hour_cells(row: dict[str, Any]) -> list[str]:
    seconds = row["seconds"]
    exchange = f"{seconds['exchange']:.3g}" if row["exchange_known"] else "not counted"
    cells = [row["stage"], str(row["steps"]), f"{seconds['compute']:.3g}", f"{seconds['memory']:.3g}", exchange]
    return [*cells, row["bound_by"], f"{row['hours']:.2f}"]
