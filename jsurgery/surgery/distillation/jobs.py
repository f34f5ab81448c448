"""Distillation by independent jobs, a set of blocks each, and the one result that all of them make."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.errors import InputError
from jsurgery.io.files import write_json
from jsurgery.io.results import format_ranges
from jsurgery.io.safetensors import open_tensors, write_tensors
from jsurgery.runtime.metrics import Metrics, read_metrics
from jsurgery.surgery.distillation.saved_maps import INITIAL, TRAINED, read_errors

BY_BLOCK = ("errors", "initial_errors", "softmax_share", "teacher_softmax_share", "velocity_errors")


def job_name(blocks: Sequence[int]) -> str:
    """Where, in the folder of the whole distillation, the job of these blocks leaves its files."""
    return f"blocks_{format_ranges(blocks)}"


def job_of_block(jobs: Sequence[epath.Path], blocks: int) -> list[epath.Path]:
    """The finished job, by its folder, that has each of the model's blocks. Raises InputError naming those in none."""
    found: dict[int, epath.Path] = {}
    for job in jobs:
        found = dict.fromkeys(read_errors(job)["blocks"], job) | found
    if missing := [block for block in range(blocks) if block not in found]:
        names = format_ranges(missing)
        raise InputError(
            f"distill: of {blocks} blocks no job has finished {names}; "
            f"run `jsurgery distill --config.distill.blocks={names}`"
        )
    return [found[block] for block in range(blocks)]


def merge(config: ConfigDict, jobs: Sequence[epath.Path], blocks: int, folder: epath.Path) -> None:
    """Leaves in `folder` what `distill` leaves of all blocks at once, from the folders of finished jobs."""
    of_block = job_of_block(jobs, blocks)
    metadata = {name: str(config.hybrid[name]) for name in ("degree", "layers", "activation")}
    for name in (INITIAL, TRAINED):
        tensors: dict[str, Any] = {}
        for job in dict.fromkeys(of_block):
            for tensor, values in open_tensors(job / name).items():
                if of_block[int(tensor.split(".")[1])] == job:
                    tensors[tensor] = values
        write_tensors(folder / name, tensors, metadata)
    found = {job: read_errors(job) for job in dict.fromkeys(of_block)}
    rows = [(found[job], found[job]["blocks"].index(block)) for block, job in enumerate(of_block)]
    by_block = {name: [report[name][row] for report, row in rows] for name in BY_BLOCK if name in rows[0][0]}
    write_json(folder / "errors.json", rows[0][0] | by_block | {"blocks": list(range(blocks))})
    write_metrics(of_block, folder)


def write_metrics(of_block: Sequence[epath.Path], folder: epath.Path) -> None:
    """The losses of the steps that all jobs have logged, each job's as often as it has blocks."""
    logged = {job: {row["step"]: row for row in read_metrics(job)} for job in dict.fromkeys(of_block)}
    metrics = Metrics(folder)
    for step in sorted(set.intersection(*(set(rows) for rows in logged.values()))):
        rows = [logged[job][step] for job in of_block]
        metrics.log(int(step), **{name: np.mean([row[name] for row in rows]) for name in rows[0] if name != "step"})
    metrics.flush()
