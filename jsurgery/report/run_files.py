"""Reads the files that a run has left in its workdir so far, and says which are missing."""

import functools
import json
from dataclasses import dataclass, field
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.config import base, flatten
from jsurgery.data.prompts import load_prompts
from jsurgery.errors import InputError
from jsurgery.evaluate.surgery_models import SPEED
from jsurgery.runtime.stage_folder import MARKER
from jsurgery.surgery.distillation.saved_maps import read_errors
from jsurgery.surgery.plan import read_plan
from jsurgery.surgery.stages import STAGES
from jsurgery.wan.checkpoint import read_config
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_folder import model_path, transformer_folder

CONFIG = "config.json"
MISSING = {  # file -> what a page lacks without it, the stage's folder and command
    f"{stage.name}/{file}": (part, stage.name, stage.command) for stage in STAGES for file, part in stage.leaves.items()
}
CHECKED = {"distill/errors.json": read_errors, "plan/plan.json": read_plan}  # read and checked as by later stages

# What is read of a stage's marker, and of a file in evaluation/speed.
MADE_BY = {"command": str, "machine": str, "ended": str, "seconds": float, "resumed": bool}
MEASURED = {"low": float, "seconds": float, "high": float, "steps": int, "clips": int, "machine": str}


@dataclass
class RunFiles:
    """The contents of a run's files; None or empty for missing files, which `absent` lists in words."""

    workdir: epath.Path
    config: ConfigDict | None = None
    model: WanConfig | None = None
    plan: dict[str, Any] | None = None
    errors: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    parity: list[dict[str, Any]] | None = None
    fidelity: dict[str, Any] | None = None
    distilled: list[dict[str, float]] = field(default_factory=list)
    finetuned: list[dict[str, float]] = field(default_factory=list)
    made_by: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage -> what its marker says, of ended stages
    speed: dict[str, dict[str, Any]] = field(default_factory=dict)  # model -> seconds of its sampling step
    absent: list[str] = field(default_factory=list)

    @property
    def videos(self) -> epath.Path:
        return self.workdir / "evaluation" / "videos"

    @property
    def prompts(self) -> list[str]:
        """The evaluation's prompts; before it has ended, those that the config gives it."""
        if self.evaluation is not None:
            return self.evaluation["prompts"]
        if self.config is None:
            return []
        count, skip = self.config.evaluate.prompts, self.config.trace.prompts
        try:
            return load_prompts(self.config, count, skip=skip)
        except InputError:  # the file of prompts is on another machine
            return [f"Prompt {number + 1}" for number in range(count)]


def read_run(workdir: epath.PathLike, config: ConfigDict | None = None) -> RunFiles:
    """Reads a workdir. config: the run's own; by default the config that is saved in the workdir.

    Raises InputError if the workdir does not exist.
    """
    run = RunFiles(epath.Path(workdir))
    if not run.workdir.is_dir():
        raise InputError(f"{run.workdir}: expected the folder of a run, found none")
    run.config = config or read_run_config(run)
    run.model = read_model(run)
    contents = {name: read(run, name, *description) for name, description in MISSING.items() if not skipped(run, name)}
    run.errors, run.plan = contents["distill/errors.json"], contents["plan/plan.json"]
    run.evaluation = contents["evaluation/evaluation.json"]
    run.distilled = contents["distill/metrics.jsonl"] or []
    run.finetuned = contents.get("finetune/metrics.jsonl") or []
    if run.config is None and not any((run.workdir / name).exists() for name in MISSING):
        run.absent = [f"{CONFIG} is not there, nor any file of a stage: nothing has run in {run.workdir}."]
    run.made_by, run.speed = read_made_by(run.workdir), read_speed(run)
    if (run.workdir / "export" / "parity.json").exists():
        run.parity = read(run, "export/parity.json", "the parity of exports", "export", "export")
    if (run.workdir / "fidelity").exists():
        run.fidelity = read(run, "fidelity/fidelity.json", "fidelity to the teacher", "fidelity", "evaluate fidelity")
    return run


def skipped(run: RunFiles, name: str) -> bool:
    """Whether the config leaves out the stage that writes a file."""
    return name.startswith("finetune/") and run.config is not None and run.config.finetune.steps == 0


def read_run_config(run: RunFiles) -> ConfigDict | None:
    """The config that the run saved. Fields that another version saved in another form keep their defaults."""
    if not (run.workdir / CONFIG).exists():
        run.absent.append(f"{CONFIG} is not there: the config is not known.")
        return None
    try:
        saved = dict(read_json(run.workdir / CONFIG))
    except (OSError, ValueError, TypeError) as error:
        run.absent.append(f"{CONFIG} cannot be read ({error}): the config is not known.")
        return None
    config = base()
    for name, _ in flatten(config):
        *sections, leaf = name.split(".")
        node = functools.reduce(getattr, sections, config)
        value = saved.get(name, node[leaf])
        try:
            node[leaf] = tuple(value) if isinstance(value, list) else value
        except TypeError:
            run.absent.append(f"{CONFIG}: {name}: {value!r} is of another version; the page uses {node[leaf]!r}.")
    return config


def read_model(run: RunFiles) -> WanConfig | None:
    """The sizes of the run's own model; before that exists, of its teacher."""
    folders = [run.workdir / name for name in ("model", "hybrid") if (run.workdir / name / CONFIG).exists()]
    try:
        if folders:
            return read_config(folders[0])
        return run.config and read_config(transformer_folder(model_path(run.config.model.path)))
    except InputError as error:
        run.absent.append(f"Counted FLOPs need the sizes of the model: {error}")
        return None


def read(run: RunFiles, name: str, part: str, folder: str, command: str) -> Any:
    """A file's content; None, with a line in `run.absent` that the page lacks `part`, if it is missing or damaged."""
    path, text = run.workdir / name, f"{part[0].upper()}{part[1:]}: {name}"
    if not path.exists():
        run.absent.append(f"{text} is not there; {progress(run.workdir / folder, command)}.")
        return None
    try:
        if name in CHECKED:
            return CHECKED[name](path.parent)
        if not name.endswith(".jsonl"):
            return read_json(path)
        lines, _, _ = path.read_text().rpartition("\n")  # a line without an end is still being written
        return [json.loads(line) for line in lines.splitlines()]
    except (OSError, ValueError, InputError) as error:
        run.absent.append(f"{text} cannot be read ({error}).")
        return None


def read_made_by(workdir: epath.Path) -> dict[str, dict[str, Any]]:
    """How each stage was made, by its name and in order; nothing of those whose marker does not tell."""
    found = {}
    for stage in STAGES:
        try:
            made_by = json.loads((workdir / stage.name / MARKER).read_text())["made_by"]
            found[stage.name] = {name: kind(made_by[name]) for name, kind in MADE_BY.items()}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def read_speed(run: RunFiles) -> dict[str, dict[str, Any]]:
    """The seconds of a sampling step of each evaluated model that has them."""
    found = {}
    for name in run.evaluation["models"] if run.evaluation else ():
        try:
            measured = json.loads((run.workdir / "evaluation" / SPEED / f"{name}.json").read_text())
            found[name] = {field: kind(measured[field]) for field, kind in MEASURED.items()}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def read_json(path: epath.Path) -> Any:
    """The content of a JSON file; None if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else None


def progress(folder: epath.Path, command: str) -> str:
    """How far a stage has come, in words, by its marker."""
    try:
        complete = json.loads((folder / MARKER).read_text())["complete"]
    except (OSError, ValueError, KeyError):
        return f"`jsurgery {command}` has not {'ended' if folder.exists() else 'begun'}"
    return f"`jsurgery {command}` has ended without it" if complete else f"`jsurgery {command}` has not ended"
