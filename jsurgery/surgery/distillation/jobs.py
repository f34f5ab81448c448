"""Distillation by independent jobs: each distils some of the blocks, and their results are merged."""

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
    """The name of the folder of the job that distils these blocks, inside the folder of the whole distillation."""
    return f"blocks_{format_ranges(blocks)}"


def job_of_block(jobs: Sequence[epath.Path], blocks: int) -> list[epath.Path]:
    """For each of the model's blocks the folder of a finished job that distilled it.

    Raises InputError naming the blocks that no job has distilled.
    """
    job_of: dict[int, epath.Path] = {}
    for job in jobs:
        job_of = dict.fromkeys(read_errors(job)["blocks"], job) | job_of
    if missing := [block for block in range(blocks) if block not in job_of]:
        names = format_ranges(missing)
        raise InputError(
            f"distill: of {blocks} blocks no job has finished {names}; "
            f"run `jsurgery distill --config.distill.blocks={names}`"
        )
    return [job_of[block] for block in range(blocks)]


def merge(config: ConfigDict, jobs: Sequence[epath.Path], blocks: int, folder: epath.Path) -> None:
    """Merges the results of finished jobs into what `distill` leaves in `folder` when it distils all blocks."""
    of_block = job_of_block(jobs, blocks)
    metadata = {name: str(config.hybrid[name]) for name in ("degree", "layers", "activation")}
    for name in (INITIAL, TRAINED):
        tensors: dict[str, Any] = {}
        for job in dict.fromkeys(of_block):
            for tensor, values in open_tensors(job / name).items():
                if of_block[int(tensor.split(".")[1])] == job:
                    tensors[tensor] = values
        write_tensors(folder / name, tensors, metadata)
    errors = {job: read_errors(job) for job in dict.fromkeys(of_block)}
    rows = [(errors[job], errors[job]["blocks"].index(block)) for block, job in enumerate(of_block)]
    by_block = {name: [report[name][row] for report, row in rows] for name in BY_BLOCK if name in rows[0][0]}
    write_json(folder / "errors.json", rows[0][0] | by_block | {"blocks": list(range(blocks))})
    write_metrics(of_block, folder)


def write_metrics(of_block: Sequence[epath.Path], folder: epath.Path) -> None:
    """Writes the mean losses of the steps that all jobs have logged. A job counts once for each of its blocks."""
    logged = {job: {row["step"]: row for row in read_metrics(job)} for job in dict.fromkeys(of_block)}
    metrics = Metrics(folder)
    for step in sorted(set.intersection(*(set(rows) for rows in logged.values()))):
        rows = [logged[job][step] for job in of_block]
        metrics.log(int(step), **{name: np.mean([row[name] for row in rows]) for name in rows[0] if name != "step"})
    metrics.flush()
