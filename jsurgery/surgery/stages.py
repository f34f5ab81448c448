"""The stages of a surgery: the results that each reads, the files that it writes, the config fields that change it."""

import dataclasses

from etils import epath
from ml_collections import ConfigDict

from jsurgery.runtime.stage_folder import StageFolder


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, which writes its files to a folder of the workdir.

    Attributes:
      name: the name of the folder.
      command: the command that runs the stage.
      fields: the config fields, or whole sections, that change the result.
      without: fields of these sections that do not change the result.
      reads: the earlier stages whose results the stage reads.
      reads_teacher: whether it also depends on the teacher's weights.
      all_processes: whether all processes of a run work on it together; otherwise process 0 does it alone.
      leaves: {file: the part of the report that shows it}.
    """

    name: str
    command: str
    fields: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    reads_teacher: bool = False
    all_processes: bool = False
    leaves: dict[str, str] = dataclasses.field(default_factory=dict)


STAGES = (
    Stage(
        "trace",
        command="trace",
        fields=(
            "seed", "prompts", "model", "video", "text_length", "sampler", "trace", "distill.mode", "data.two_sprites",
        ),
        reads_teacher=True,
        all_processes=True,
    ),
    Stage(
        "distill",
        command="distill",
        fields=("hybrid", "distill"),
        without=("distill.blocks",),
        reads=("trace",),
        all_processes=True,
        leaves={
            "metrics.jsonl": "the curves of the distillation",
            "errors.json": "the errors of the blocks and the trade-off with cost",
        },
    ),
    Stage(
        "plan",
        command="plan",
        fields=("plan",),
        reads=("distill",),
        leaves={"plan.json": "the plan and what it saves"},
    ),
    Stage("hybrid", command="operate", fields=("finetune.distilled",), reads=("plan",)),
    Stage(
        "latents",
        command="finetune",
        fields=("seed", "video", "data", "evaluate.validation_clips"),
        without=(
            "data.buckets", "data.posterior", "data.max_crop", "data.max_upscale", "data.max_skipped",
            "data.clips_per_shard", "data.batch", "data.workers",
        ),
        reads_teacher=True,
    ),
    Stage(
        "finetune",
        command="finetune",
        fields=("finetune",),
        reads=("hybrid", "latents"),
        all_processes=True,
        leaves={"metrics.jsonl": "the curves of the fine-tuning"},
    ),
    Stage(
        "evaluation",
        command="evaluate",
        fields=("evaluate",),
        reads=("finetune",),
        all_processes=True,
        leaves={"evaluation.json": "scores and distances"},
    ),
    Stage("report", command="report", reads=("evaluation",)),
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}
COMMANDS = tuple(dict.fromkeys(stage.command for stage in STAGES))  # in order
# Fields that no stage records, since they change how a result is computed or logged, but not the result.
RECORDED_NOWHERE = (
    "mesh", "checkpoint", "max_skipped", "log_every", "compile_cache", "profile", "distill.blocks", "train",
    *BY_NAME["latents"].without,
)  # fmt: skip


def stage_folders(config: ConfigDict, workdir: epath.PathLike, teacher: str) -> dict[str, StageFolder]:
    """The folders of all stages, by name. `teacher` is the fingerprint of the teacher's folder."""
    folders: dict[str, StageFolder] = {}
    for stage in STAGES:
        inputs = {"teacher": teacher} if stage.reads_teacher else {}
        after = [folders[name] for name in stage.reads]
        folders[stage.name] = StageFolder(
            workdir, stage.name, config, stage.fields, after=after, without=stage.without, **inputs
        )
    return folders


def job_folder(config: ConfigDict, job: str, folders: dict[str, StageFolder]) -> StageFolder:
    """The folder of an independent job of the distillation, inside the folder of the stage `distill`."""
    stage, whole = BY_NAME["distill"], folders["distill"]
    after = [folders[name] for name in stage.reads]
    name = f"{whole.name}/{job}"
    return StageFolder(whole.folder.parent, name, config, stage.fields, after=after, without=stage.without)
