"""The bytes that every stage of the surgery writes to its workdir, by arithmetic from the config alone."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

from jsurgery.errors import InputError
from jsurgery.surgery.distillation.update import initial_maps
from jsurgery.surgery.distillation.while_sampling import own_clips
from jsurgery.surgery.phases import largest_hybrid
from jsurgery.surgery.trace import traced_prompts
from jsurgery.wan import memory
from jsurgery.wan.model_sizes import ModelSizes

GB = 1e9
VIDEO_BYTES = 2_000_000  # of an mp4 in the report, about
# Models that `evaluate` samples: the teacher, the hybrid before and after distillation, the fine-tuned hybrid.
EVALUATED = 4


@dataclasses.dataclass(frozen=True)
class StageDisk:
    """Bytes of a stage. `scratch` is of no use once the surgery is done; `kept` is its result.

    A checkpoint is counted while its successor is written: there are then `checkpoint.keep` + 1.
    """

    stage: str
    scratch: int
    kept: int


def disk_of_stages(config: ConfigDict, sizes: ModelSizes) -> list[StageDisk]:
    """What a whole surgery writes, stage by stage."""
    network = sizes.transformer
    clip = memory.latents_bytes(config, network, itemsize=2)
    texts = (config.trace.prompts + 1) * config.text_length * network.text_dim * 2
    checkpoints = config.checkpoint.keep + 1
    traced = len(traced_prompts(config)) * config.trace.keep_steps * clip
    ends = own_clips(config) * clip
    sampling = config.distill.mode == "sampling"
    maps = jax.eval_shape(lambda: initial_maps(config, memory.abstract_transformer(config, network, inference=True)))
    one_copy = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(maps))
    trajectories = 4 * config.distill.trajectories * config.distill.batch * memory.latents_bytes(config, network)
    distill_state = 3 * one_copy + (trajectories if sampling else 0)
    hybrid = memory.parameter_bytes(config, largest_hybrid(config, network))
    steps = config.finetune.steps
    finetune_state = (3 + bool(config.finetune.ema)) * hybrid if steps else 0
    sprites = config.data.path == "sprites"
    clips = (config.data.clips + config.evaluate.validation_clips) * clip if sprites else 0
    evaluated = 2 * config.evaluate.prompts * memory.latents_bytes(config, network)  # the teacher's, another model's
    shown = EVALUATED * min(config.evaluate.videos, config.evaluate.prompts) * VIDEO_BYTES
    return [
        StageDisk("trace", traced + texts + (0 if sampling else ends), 0),
        StageDisk("distill", checkpoints * distill_state + (ends if sampling else 0), 2 * one_copy),
        StageDisk("hybrid", hybrid, 0),
        StageDisk("latents", clips, 0),
        StageDisk("finetune", checkpoints * finetune_state, hybrid),
        StageDisk("evaluation", evaluated, shown),
    ]


def check_disk(
    disks: Sequence[StageDisk],
    workdir: str | None,
    disk: float | None = None,
    kept: float | None = None,
    written: int = 0,
) -> None:
    """Raises InputError if the files of these stages, or the results alone, take more than there is.

    There are `disk` GB, by default what is free at `workdir`, and `kept` GB for the results. An object store has no
    limit. Of the files, `written` bytes are there already.
    """
    total = max(0, sum(row.scratch + row.kept for row in disks) - written)
    results = sum(row.kept for row in disks)
    free = None if disk is None else disk * GB
    if free is None and workdir is not None and "://" not in workdir:
        free = free_bytes(workdir)
    if free is not None and total > free:
        raise InputError(
            f"--workdir={workdir}: expected {total / GB:.1f} GB of free disk, found {free / GB:.1f} GB "
            "(config.checkpoint.keep=1 and config.distill.mode=sampling take least; a dry run takes --disk=GB)"
        )
    if kept is not None and results > kept * GB:
        raise InputError(f"--kept={kept:g}: the results take {results / GB:.1f} GB")


def free_bytes(workdir: str) -> int | None:
    """The free disk at a folder that may not exist yet; None for a file system without a size, such as /proc."""
    folder = epath.Path(workdir).absolute()
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


def written_bytes(folder: epath.Path) -> int:
    """The bytes of all files below a folder; 0 on an object store, where no limit is checked."""
    if "://" in str(folder):
        return 0
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # another job may have removed it since
                total += os.lstat(os.path.join(parent, file)).st_size
    return total
