"""--dry_run: what a command would run, on which mesh, and what it needs of devices, disk and time. Runs nothing.

Memory and disk are the arithmetic by which the command itself chooses its meshes (`surgery.phases`, `surgery.disk`);
hours are `jsurgery roofline`'s. Nothing is measured.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from jsurgery.errors import DoesNotFit
from jsurgery.estimate.chips import CHIPS, GIB, Chip, parse_topology
from jsurgery.estimate.nearest_machine import placed_or_nearest
from jsurgery.estimate.roofline import COMPILER, StageWork, estimate, synthesis, work_of_stages
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report, markdown_table
from jsurgery.runtime.mesh import AXES, abstract_mesh, mesh_sizes
from jsurgery.runtime.mesh_choice import check_memory, describe_mesh, device_memory, sampling_batch, with_mesh
from jsurgery.surgery.disk import GB, VIDEO_BYTES, StageDisk, check_disk, disk_of_stages
from jsurgery.surgery.distillation.while_sampling import own_clips
from jsurgery.surgery.phases import COMPUTING, on_mesh, phases_of
from jsurgery.surgery.plan import check_budget
from jsurgery.wan import memory
from jsurgery.wan.memory import Phase, on_sampling_mesh
from jsurgery.wan.model_sizes import find_sizes
from jsurgery.wan.streaming_memory import describe_stream, on_streaming_mesh, streaming_phases
from jsurgery.wan.vae_cost import vae_cost

EFFICIENCY = 0.4  # of the peak rates, for the hours
# A row of the roofline -> the stage that it belongs to.
STAGE_OF_WORK = {
    "text encoder": "trace",
    "attention errors of blocks": "distill",
    "velocity errors of blocks": "distill",
    "evaluate": "evaluation",
    "decode": "evaluation",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a dry run compares with, and where it writes its numbers.

    Attributes:
      workdir: where the files would lie; None: no disk is needed.
      disk: the GB that there are for all files; None: what is free at `workdir`.
      kept: the GB that there are for the results alone; None: no limit.
      report: a JSON file for the numbers.
    """

    workdir: str | None
    disk: float | None = None
    kept: float | None = None
    report: str | None = None


def dry_run(config: ConfigDict, config_name: str, topology: str, stages: Sequence[str], limits: Limits) -> None:
    """Prints the phases of a surgery's stages with mesh, memory, disk and hours.

    `config_name` tells the published model where `config.model.path` is empty. `topology` is one like "v5e-8" or
    "v5e:4x4", or "" for the devices of this machine. Raises DoesNotFit, after the tables, if a stage fits no mesh of
    the devices; InputError if the disk is too small.
    """
    check_report(limits.report)
    sizes, machine = find_sizes(config, config_name), machine_of(topology)
    check_budget(config, sizes.transformer)
    phases = []
    for stage in stages:
        if stage in COMPUTING:
            on_devices = lambda stage=stage: on_mesh(
                stage, config, sizes, machine.count, machine.memory, tell=lambda line: None
            )
            place = lambda stage=stage, there=on_devices: placed_or_nearest(stage, config, sizes, there)
            phases += phase_rows(stage, place, lambda placed, mesh, stage=stage: phases_of(stage, placed, sizes, mesh))
    works = [(STAGE_OF_WORK.get(work.stage, work.stage), work) for work in work_of_stages(config, sizes)]
    hours = hour_rows([work for stage, work in works if stage in stages], machine)
    disks = [row for row in disk_of_stages(config, sizes) if row.stage in stages]
    clips = "finetune" in stages and not config.data.path and config.finetune.steps
    note = (
        f"fine-tuning reads the {own_clips(config)} clips at which the teacher's trajectories end, since "
        "config.data.path is empty; `jsurgery synthesize` makes more"
    )
    tell(machine, phases, hours, disks, [note] if clips else [], limits)


def dry_run_sampling(
    command: str, config: ConfigDict, config_name: str, topology: str, videos: int, batch: int, limits: Limits
) -> None:
    """The same for a command that samples `videos`, at least `batch` at once, to mp4 files or shards."""
    check_report(limits.report)
    sizes, machine = find_sizes(config, config_name), machine_of(topology)
    batch = sampling_batch(videos, machine.count, batch)
    place = lambda: on_sampling_mesh(command, config, sizes, batch, machine.count, machine.memory)
    phases = phase_rows(command, place, lambda placed, mesh: memory.sampling_phases(placed, sizes, mesh, batch, videos))
    clip, unfinished = VIDEO_BYTES, 0
    if command == "synthesize":
        text = config.text_length * sizes.transformer.text_dim * 2
        clip = memory.latents_bytes(config, sizes.transformer, itemsize=2) + text
        unfinished = min(videos, config.data.clips_per_shard) * clip  # a shard's batches, until it is complete
    work = dataclasses.replace(synthesis(config, sizes.transformer, videos), stage=f"{command}, {videos} videos")
    hours = hour_rows([work], machine)
    tell(machine, phases, hours, [StageDisk(command, unfinished, videos * clip)], [], limits)


def dry_run_streaming(config: ConfigDict, config_name: str, topology: str, videos: int, limits: Limits) -> None:
    """The same for `sample --stream` of `videos`, one after the other."""
    check_report(limits.report)
    sizes, machine = find_sizes(config, config_name), machine_of(topology)
    note = describe_stream(config, sizes.transformer)
    place = lambda: on_streaming_mesh(config, sizes, machine.count, machine.memory, tell=lambda line: None)
    phases = phase_rows("sample", place, lambda placed, mesh: streaming_phases(placed, sizes, mesh, videos))
    work = dataclasses.replace(synthesis(config, sizes.transformer, videos), stage=f"sample, {videos} videos")
    used = next((math.prod(row["mesh"].values()) for row in phases if "mesh" in row), machine.count)
    hours = hour_rows([work], dataclasses.replace(machine, count=used))
    tell(machine, phases, hours, [StageDisk("sample", 0, videos * VIDEO_BYTES)], [note], limits)


def dry_run_encoding(config: ConfigDict, config_name: str, topology: str, clips: int, limits: Limits) -> None:
    """The same for the encoding of `clips`, one on each device."""
    check_report(limits.report)
    sizes, machine, video = find_sizes(config, config_name), machine_of(topology), config.video
    text = memory.text_phase(sizes.text_encoder, config, config.data.clips_per_shard)
    phases = phase_rows(
        "encode",
        lambda: with_mesh(config, dict.fromkeys(AXES, 1) | {"data": machine.count}),
        lambda placed, mesh: [memory.encoding_phase(placed, sizes), text],
    )
    for row in phases:
        check_memory("encode", row["bytes"], machine.memory, row["phase"])
    cost = vae_cost(sizes.vae, video.frames, video.height, video.width)[0]
    hours = hour_rows([StageWork("encode", clips, cost.flops, cost.bytes)], machine)
    record = memory.latents_bytes(config, sizes.transformer, itemsize=2)
    record += config.text_length * sizes.transformer.text_dim * 2
    tell(machine, phases, hours, [StageDisk("encode", 0, clips * record)], [], limits)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices: their name, chip, number, and the bytes of memory of each. The last is None where it is not known, and
    so is the chip."""

    name: str
    chip: Chip | None
    count: int
    memory: int | None

    @property
    def of_memory(self) -> str:
        return "" if self.memory is None else f" of {self.memory / GIB:.0f} GiB"


def machine_of(topology: str) -> Machine:
    """The devices of a topology, or of this machine where it is empty."""
    if topology:
        chip, count = parse_topology(topology)
        return Machine(topology, chip, count, chip.memory)
    devices = jax.devices()
    kind = devices[0].device_kind
    return Machine(kind, chip_of(kind), len(devices), device_memory(devices[0]))


def chip_of(kind: str) -> Chip | None:
    """The chip of a JAX device kind, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; None for others."""
    names = {"v5 lite": "v5e", "v6 lite": "v6e", "v5p": "v5p", "v4": "v4", "H100": "h100", "4090": "rtx4090"}
    names |= {"L4": "l4", "T4": "t4"}
    found = next((name for text, name in names.items() if text in kind), "v5p" if kind == "TPU v5" else None)
    return CHIPS[found] if found else None


def phase_rows(
    stage: str, place: Callable[[], ConfigDict], phases: Callable[[ConfigDict, AbstractMesh], Sequence[Phase]]
) -> list[dict[str, Any]]:
    """The phases of a stage on the mesh that `place` chooses; one row with an error where none fits."""
    try:
        placed = place()
    except DoesNotFit as error:
        return [{"stage": stage, "error": str(error)}]
    return [
        {"stage": stage, "phase": phase.name, "mesh": mesh_sizes(placed.mesh), "bytes": phase.bytes, **vars(phase)}
        for phase in phases(placed, abstract_mesh(placed.mesh))
    ]


def hour_rows(works: Sequence[StageWork], machine: Machine) -> list[dict[str, Any]]:
    """The roofline's rows, each with the hours on all devices; none for devices of unknown speed."""
    if machine.chip is None:
        return []
    rows = [estimate(work, machine.chip, machine.count, None, EFFICIENCY) for work in works]
    return [row | {"hours": row["chip_hours"]["expected"] / machine.count} for row in rows]


def tell(
    machine: Machine,
    phases: list[dict[str, Any]],
    hours: list[dict[str, Any]],
    disks: Sequence[StageDisk],
    notes: Sequence[str],
    limits: Limits,
) -> None:
    """Prints and writes the tables, and raises the errors of `dry_run`."""
    print("\n".join([*tables(machine, phases, hours, disks), *notes]), flush=True)
    if limits.report is not None:
        found = {"machine": machine.name, "devices": machine.count, "phases": phases, "hours": hours}
        write_json(epath.Path(limits.report), found | {"disk": [vars(row) for row in disks]})
    if too_large := [row["error"] for row in phases if "error" in row]:
        raise DoesNotFit("; ".join(too_large))
    check_disk(disks, limits.workdir, limits.disk, limits.kept)


def tables(
    machine: Machine, phases: list[dict[str, Any]], hours: list[dict[str, Any]], disks: Sequence[StageDisk]
) -> list[str]:
    """Tables of memory, disk and hours, in Markdown."""
    lines = [
        f"{machine.name}, {machine.count} devices{machine.of_memory}: arithmetic alone, nothing is run or measured"
    ]
    cells = []
    for row in phases:
        if "error" in row:
            cells.append([row["stage"], "does not fit", "", ""])
            continue
        held = ", ".join(f"{what} {size / GIB:.2f}" for what, size in row["held"].items())
        peak = f"{row['bytes'] / GIB:.1f} ({held}; working {row['working'] / GIB:.2f})"
        cells.append([row["stage"], row["phase"], describe_mesh(row["mesh"]), peak])
    lines += ["", markdown_table(["stage", "phase", "mesh", f"GiB a device{machine.of_memory}"], cells), ""]
    cells = [[row.stage, f"{row.scratch / GB:.1f}", f"{row.kept / GB:.1f}"] for row in disks]
    cells.append(["all", f"{sum(r.scratch for r in disks) / GB:.1f}", f"{sum(r.kept for r in disks) / GB:.1f}"])
    lines += [markdown_table(["stage", "scratch, GB of disk", "kept"], cells, numbers=True), ""]
    if hours:
        header = ["stage", "steps", "compute, s a step", "memory", "exchange", "ruled by", f"hours at {EFFICIENCY:.0%}"]
        cells = [hour_cells(row) for row in hours]
        cells.append(["all", "", "", "", "", "", f"{sum(row['hours'] for row in hours):.2f}"])
        lines += [markdown_table(header, cells, numbers=True), ""]
    return lines


def hour_cells(row: dict[str, Any]) -> list[str]:
    seconds = row["seconds"]
    exchange = f"{seconds['exchange']:.3g}" if row["counted_by"] == COMPILER else "not counted"
    cells = [row["stage"], str(row["steps"]), f"{seconds['compute']:.3g}", f"{seconds['memory']:.3g}", exchange]
    return [*cells, row["bound_by"], f"{row['hours']:.2f}"]
