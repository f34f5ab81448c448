"""One seed of the ablations: its stages, its models and its file of measurements.

What several arms share is made when it is first needed, and stays in the workdir. The measurements lie in a file apart
from the models. A model that has been measured is neither trained nor loaded again, so that the file alone is enough to
write the tables.
"""

import dataclasses
import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.ablate.measurement_file import MeasurementFile
from jsurgery.ablate.tables import STEPS, Arm, scaled
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.attention.kinds.registry import parse_block_budget
from jsurgery.config import validate
from jsurgery.errors import Diverged, InputError
from jsurgery.io.fields import as_recorded
from jsurgery.io.files import write_json
from jsurgery.run import Run
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.surgery.distillation.distill import distill
from jsurgery.surgery.distillation.saved_maps import load_maps, read_errors
from jsurgery.surgery.finetune import finetune
from jsurgery.surgery.operate import operate, save_model
from jsurgery.surgery.plan import plan, read_plan
from jsurgery.surgery.stages import BY_NAME
from jsurgery.surgery.trace import TraceSteps
from jsurgery.wan.checkpoint import load_transformer
from jsurgery.wan.transformer import WanTransformer


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to be measured.

    Attributes:
      name: the name of its measurements; it has the fingerprint of all settings that made the model.
      load: loads the model, and trains it first if it is not in the workdir yet.
      prompts: the evaluation prompts that it is sampled on; None: all.
    """

    name: str
    load: Callable[[], WanTransformer]
    prompts: range | None = None


@dataclasses.dataclass(frozen=True)
class Operation:
    """An arm on one seed: its config, the errors of its distillation and its plan, all known before any fine-tuning."""

    arm: Arm
    config: ConfigDict
    errors: dict[str, Any]
    plan: dict[str, Any]


class SeedRun:
    """The stages of one seed: one trace, one set of latents, a distillation per hybrid config, a fine-tuning per model.

    The names of stages that exist several times end with their fingerprint. `measurements` is the folder of the files
    SEED.jsonl, by default the workdir's `measurements`.
    """

    def __init__(
        self, config: ConfigDict, workdir: epath.PathLike, seed: int, measurements: epath.PathLike | None = None
    ):
        self.number, self.config = seed, changed(config, {"seed": seed})
        workdir = epath.Path(workdir)
        self.run = Run(self.config, str(workdir / f"seed{seed}"))
        self.measurements = MeasurementFile(epath.Path(measurements or workdir / "measurements") / f"seed{seed}.jsonl")
        self.layers = self.run.model_config.num_layers

    def stage(
        self,
        kind: str,
        config: ConfigDict,
        fields: Iterable[str],
        after: Iterable[StageFolder] = (),
        without: Iterable[str] = (),
        **inputs: str,
    ) -> StageFolder:
        """A stage of the workdir that exists several times, once for each of its fingerprints."""
        chosen = {"fields": tuple(fields), "after": tuple(after), "without": tuple(without)}
        named = functools.partial(StageFolder, self.run.workdir, config=config, **chosen, **inputs)
        return named(name=f"{kind}_{named(name=kind).fingerprint}")

    def measured_once(self, stage: StageFolder, file: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The content of a measured stage's file; without one, `measure` gives it."""
        if file not in self.measurements.read(stage):
            self.measurements.add(stage, {file: measure()})
        return self.measurements.read(stage)[file]

    def trace(self) -> StageFolder:
        if not self.run.stages["trace"].done():
            self.run.write_config()
            self.run.run_stage("trace")
        return self.run.stages["trace"]

    def latents(self) -> StageFolder:
        if not self.run.stages["latents"].done():
            self.run.run_stage("latents")
        return self.run.stages["latents"]

    def distillation(self, config: ConfigDict, **inputs: str) -> StageFolder:
        """The distillation of a config's "hybrid" and "distill" sections, which all arms with these values share.

        It is not run here but by `distilled`. `inputs` are further arguments of `distill`.
        """
        declared = BY_NAME["distill"]
        after = [self.run.stages[name] for name in declared.reads]
        return self.stage("distill", config, declared.fields, after, without=declared.without, **inputs)

    def distilled(self, config: ConfigDict, **inputs: Any) -> epath.Path:
        """The folder of a distillation, which is run if it has not been."""
        stage = self.distillation(config, **inputs)
        if not stage.done():
            self.trace()
            stage.run(
                lambda: distill(config, self.run.teacher, self.run.stages["trace"].folder, stage.folder, **inputs)
            )
        return stage.folder

    def errors_stage(self, config: ConfigDict, **inputs: str) -> StageFolder:
        return self.stage("errors", config, (), [self.distillation(config, **inputs)])

    def errors(self, config: ConfigDict, **inputs: str) -> dict[str, Any]:
        """The content of a distillation's `errors.json`."""
        measure = lambda: read_errors(self.distilled(config, **inputs))
        return self.measured_once(self.errors_stage(config, **inputs), "errors.json", measure)

    def operation(self, arm: Arm) -> Operation:
        """Raises Diverged if the arm's distillation diverges, or did in an earlier run with the same `max_skipped`."""
        config = arm_config(self.config, arm, self.layers)
        diverged = self.stage("diverged", config, ("max_skipped",), [self.distillation(config)])
        if files := self.measurements.read(diverged):
            raise Diverged(files["diverged.json"]["message"])
        try:
            errors = self.errors(config)
        except Diverged as error:
            self.measurements.add(diverged, {"diverged.json": {"message": str(error)}})
            raise
        stage = self.stage("plan", config, ("plan",), [self.errors_stage(config)])
        chosen = self.measured_once(stage, "plan.json", lambda: self._make_plan(config, errors))
        return Operation(arm, config, errors, chosen)

    def _make_plan(self, config: ConfigDict, errors: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = epath.Path(name)
            write_json(folder / "errors.json", errors)
            plan(config, self.run.model_config, folder, folder)
            return read_plan(folder)

    def models(self, operation: Operation) -> dict[int, Model]:
        """The arm's models by number of fine-tuning steps; an arm that is not fine-tuned has one, at 0 steps.

        Each number of steps is sampled on its own part of the prompts.
        """
        arm, config, rates = operation.arm, operation.config, operation.plan["rates"]
        hybrid = dataclasses.replace(HybridConfig.of(config, rates), linear_branch=arm.maps != "none")
        made_from = [self.run.stages["trace"]] if arm.maps == "none" else [self.distillation(config)]
        inputs = {"hybrid": json.dumps(as_recorded(hybrid)), "maps": arm.maps}

        def build() -> WanTransformer:
            maps = None
            if hybrid.linear_branch:
                file = self.distilled(config) / f"{arm.maps}.safetensors"
                maps = load_maps(file, hybrid.rates, hybrid.feature_map)
            return operate(self.run.teacher_to_train, hybrid, maps)

        if not arm.finetuned:
            return {0: Model(self.stage("operated", config, (), made_from, **inputs).name, build)}
        stage = self.stage("finetune", config, ("finetune",), [*made_from, self.run.stages["latents"]], **inputs)
        steps = measured_steps(config)
        folders = {step: stage.folder / f"model_{step}" for step in steps}

        def train() -> None:
            self.latents()
            for step, folder in folders.items():
                if not (folder / "config.json").exists():
                    up_to_here = changed(config, {"finetune.steps": step})
                    latents = self.run.training_latents
                    model = finetune(up_to_here, build(), self.run.pipeline, latents, stage.folder)
                    save_model(model, folder, self.run.base)

        def load(step: int) -> WanTransformer:
            if not stage.done():
                stage.run(train)
            return load_transformer(folders[step], jnp.dtype(config.model.dtype), inference=True)

        return {
            step: Model(f"{stage.name}_{step}", functools.partial(load, step), prompts)
            for step, prompts in zip(steps, prompt_ranges(config.evaluate.prompts, len(steps)), strict=True)
        }

    @functools.cached_property
    def held_out(self) -> list[dict[str, Any]]:
        """The noisy latents of the held-out prompts: one batch per prompt, of all its traced steps."""
        settings, folder = self.config.trace, self.trace().folder
        prompts = range(settings.prompts - settings.holdout, settings.prompts)
        traces = [TraceSteps(folder, range(prompt, prompt + 1)) for prompt in prompts]
        return [
            jax.tree.map(lambda *arrays: np.stack(arrays), *(trace[step] for step in range(len(trace))))
            for trace in traces
        ]

    @functools.cached_property
    def teacher_velocities(self) -> list[np.ndarray]:
        """The teacher's velocity on every batch of `held_out`."""
        return [np.asarray(velocity(self.run.teacher, batch)) for batch in self.held_out]


def prompt_ranges(count: int, parts: int) -> list[range]:
    """Divides `count` prompts into consecutive ranges whose lengths differ by at most one."""
    ends = [count * part // parts for part in range(parts + 1)]
    return [range(*pair) for pair in itertools.pairwise(ends)]


@jax.jit
def velocity(model: WanTransformer, batch: dict[str, jax.Array]) -> jax.Array:
    return model(batch["latents"], batch["timestep"], batch["text"])


def changed(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with these fields changed. Raises InputError if a value breaks a rule."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked(), copy.ignore_type():
        copy.update_from_flattened_dict(dict(fields))
    validate(copy)
    return copy.lock()


def arm_config(config: ConfigDict, arm: Arm, layers: int) -> ConfigDict:
    """The config of an arm on a model of `layers` blocks.

    A heterogeneous plan chooses from the numeric rates, as the paper's do, a homogeneous one from rate 1 and its own.
    """
    budget = scaled(arm.blocks, layers)
    block_budget = parse_block_budget(budget)
    assert block_budget is not None
    numeric = (rate for rate in config.hybrid.rates if isinstance(rate, int))
    rates = (1, *numeric) if arm.selection == "heterogeneous" else (1, *(rate for _, rate in block_budget))
    planning = {"plan.budget": budget, "plan.selection": arm.selection, "plan.rates": rates}
    return changed(config, {**arm.changes, **planning})


def measured_steps(config: ConfigDict) -> tuple[int, ...]:
    """The numbers of fine-tuning steps after which an arm is measured."""
    settings = config.finetune
    if settings.schedule != "constant":
        raise InputError(
            "config.finetune.schedule: ablations also measure before the last step: expected 'constant', found "
            f"{settings.schedule!r}"
        )
    if not settings.steps:
        raise InputError("config.finetune.steps: ablations fine-tune: expected at least 1, found 0")
    return tuple(sorted({max(1, round(share * settings.steps)) for share in STEPS}))
