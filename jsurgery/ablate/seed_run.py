"""One seed of the ablations: what its arms share is made once, when first asked for, and kept in the workdir.

Measurements lie apart from what they were taken of. What has been measured is neither made nor loaded again, so that a
folder of measurements alone gives the same tables.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from jsurgery.ablate.tables import STEPS, Arm, scaled
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.config import validate
from jsurgery.errors import Diverged, InputError
from jsurgery.evaluate.sprites_score import DIMENSIONS
from jsurgery.evaluate.surgery_models import measure_models
from jsurgery.io.files import write_json
from jsurgery.rates import parse_block_budget, rate_name
from jsurgery.run import DISTILLING, Run
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.surgery.distillation.distill import distill
from jsurgery.surgery.distillation.saved_maps import load_maps, read_errors
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.surgery.finetune import finetune
from jsurgery.surgery.operate import operate, save_model
from jsurgery.surgery.plan import plan, read_plan
from jsurgery.surgery.plan_forward import softmax_shares
from jsurgery.surgery.trace import TraceSteps
from jsurgery.wan.checkpoint import load_transformer
from jsurgery.wan.cost import core_flops, map_parameters, workload
from jsurgery.wan.transformer import WanTransformer

Items = dict[str, list[float]]  # measure -> one number per prompt, block or whatever else is compared in pairs


@dataclasses.dataclass(frozen=True)
class Model:
    """What is measured; `name` is that of its files and says with what it was made.

    `load` makes it where it is not there yet. `prompts` are those that it is sampled on; None: all.
    """

    name: str
    load: Callable[[], WanTransformer]
    prompts: range | None = None


@dataclasses.dataclass(frozen=True)
class Operation:
    """An arm of one seed, as far as it is decided before any fine-tuning."""

    arm: Arm
    config: ConfigDict
    errors: dict[str, Any]
    plan: dict[str, Any]


class SeedRun:
    """The stages of one seed: trace and latents once, a distillation per hybrid config, a fine-tuning per model.

    Stages of which there may be several carry their fingerprint in their name. Measurements are stages of a folder of
    their own, by default the workdir's `measurements`.
    """

    def __init__(
        self, config: ConfigDict, workdir: epath.PathLike, seed: int, measurements: epath.PathLike | None = None
    ):
        self.number, self.config = seed, changed(config, {"seed": seed})
        workdir = epath.Path(workdir)
        self.run = Run(self.config, str(workdir / f"seed{seed}"))
        self.measurements = epath.Path(measurements or workdir / "measurements") / f"seed{seed}"
        self.layers = self.run.model_config.num_layers

    def stage(
        self, kind: str, config: ConfigDict, fields: Iterable[str], after: Iterable[StageFolder] = (), **inputs: str
    ) -> StageFolder:
        return fingerprinted(self.run.workdir, kind, config, fields, after, **inputs)

    def measurement(
        self, kind: str, config: ConfigDict, fields: Iterable[str], after: Iterable[StageFolder] = ()
    ) -> StageFolder:
        return fingerprinted(self.measurements, kind, config, fields, after)

    def trace(self) -> StageFolder:
        if not self.run.trace.done():
            self.run.write_config()
            self.run.run_trace()
        return self.run.trace

    def latents(self) -> StageFolder:
        if not self.run.latents.done():
            self.run.latents.run(self.run.encode_latents)
        return self.run.latents

    def distillation(self, config: ConfigDict, **inputs: str) -> StageFolder:
        """The distillation of a config's "hybrid" and "distill" sections, which all arms with these values share.

        It may not have been run: `distilled` runs it. `inputs` are further arguments of `distill`.
        """
        return self.stage("distill", config, DISTILLING, [self.run.trace], **inputs)

    def distilled(self, config: ConfigDict, **inputs: Any) -> epath.Path:
        stage = self.distillation(config, **inputs)
        if not stage.done():
            self.trace()
            stage.run(lambda: distill(config, self.run.teacher, self.run.trace.folder, stage.folder, **inputs))
        return stage.folder

    def errors(self, config: ConfigDict, **inputs: str) -> StageFolder:
        """The `errors.json` of a distillation."""
        work = lambda: read_errors(self.distilled(config, **inputs))
        return self.keep("errors", config, (), [self.distillation(config, **inputs)], work)

    def operation(self, arm: Arm) -> Operation:
        """Raises Diverged where the arm's distillation did, now or earlier with as few steps passed over."""
        config = arm_config(self.config, arm, self.layers)
        diverged = self.measurement("diverged", config, ("max_skipped",), [self.distillation(config)])
        if diverged.done():
            raise Diverged(json.loads((diverged.folder / "diverged.json").read_text())["message"])
        try:
            errors = self.errors(config)
        except Diverged as error:
            message = {"message": str(error)}
            diverged.run(lambda: write_json(diverged.folder / "diverged.json", message))
            raise
        stage = self.measurement("plan", config, ("plan",), [errors])
        if not stage.done():
            stage.run(plan, config, self.run.model_config, errors.folder, stage.folder)
        return Operation(arm, config, read_errors(errors.folder), read_plan(stage.folder))

    def models(self, found: Operation) -> dict[int, Model]:
        """The arm's model by steps of fine-tuning, or at 0 steps if it is not to be; the steps share the prompts."""
        arm, config = found.arm, found.config
        hybrid = dataclasses.replace(HybridConfig.of(config, found.plan["rates"]), linear_branch=arm.maps != "none")
        made_from = [self.run.trace] if arm.maps == "none" else [self.distillation(config)]
        inputs = {"hybrid": json.dumps(dataclasses.asdict(hybrid)), "maps": arm.maps}

        def build() -> WanTransformer:
            maps = None
            if hybrid.linear_branch:
                file = self.distilled(config) / f"{arm.maps}.safetensors"
                maps = load_maps(file, hybrid.rates, hybrid.feature_map)
            return operate(self.run.teacher, hybrid, maps)

        if not arm.finetuned:
            return {0: Model(self.stage("operated", config, (), made_from, **inputs).name, build)}
        stage = self.stage("finetune", config, ("finetune",), [*made_from, self.run.latents], **inputs)
        steps = measured_steps(config)
        folders = {step: stage.folder / f"model_{step}" for step in steps}

        def train() -> None:
            self.latents()
            for step, folder in folders.items():
                if not (folder / "config.json").exists():
                    so_far = changed(config, {"finetune.steps": step})
                    latents = self.run.training_latents
                    save_model(
                        finetune(so_far, build(), self.run.pipeline, latents, stage.folder), folder, self.run.base
                    )

        def load(step: int) -> WanTransformer:
            if not stage.done():
                stage.run(train)
            return load_transformer(folders[step], dtype=jnp.dtype(config.model.dtype))

        return {
            step: Model(f"{stage.name}_{step}", functools.partial(load, step), share)
            for step, share in zip(steps, prompt_ranges(config.evaluate.prompts, len(steps)), strict=True)
        }

    def samples(self, models: Sequence[Model]) -> dict[str, Items]:
        """Scores of every model's samples, by prompt; a model that was sampled already is not sampled again."""
        stage = self.measurement("evaluation", self.config, ("evaluate",), [self.run.trace, self.run.latents])
        stage.begin()  # never ended: further tables sample further models into it
        run = self.run
        named = {"teacher": lambda: run.teacher} | {model.name: model.load for model in models}
        prompts = {model.name: model.prompts for model in models if model.prompts is not None}
        if not all((stage.folder / f"{name}.json").exists() for name in named):
            self.latents()
        found = measure_models(self.config, run.pipeline, named, run.validation_latents, stage.folder, prompts)
        return {name: sample_items(found[name]) for name in named}

    @functools.cached_property
    def held_out(self) -> list[dict[str, Any]]:
        """Batches of held-out noisy latents, one a prompt, of all its steps."""
        settings, folder = self.config.trace, self.trace().folder
        prompts = range(settings.prompts - settings.holdout, settings.prompts)
        steps = [TraceSteps(folder, range(prompt, prompt + 1)) for prompt in prompts]
        return [jax.tree.map(lambda *arrays: np.stack(arrays), *(of[i] for i in range(len(of)))) for of in steps]

    @functools.cached_property
    def teacher_velocities(self) -> list[np.ndarray]:
        return [np.asarray(velocity(self.run.teacher, batch)) for batch in self.held_out]

    def velocity(self, models: Sequence[Model]) -> dict[str, Items]:
        """The velocity's relative L1 distance to the teacher's, by prompt over all its held-out steps."""
        return self.measured("velocity", models, (), self._velocity)

    def _velocity(self, model: WanTransformer) -> Items:
        found = [np.asarray(velocity(model, batch)) for batch in self.held_out]
        pairs = zip(found, self.teacher_velocities, strict=True)
        return {"velocity_error": [float(np.abs(y - expected).sum() / np.abs(expected).sum()) for y, expected in pairs]}

    def shares(self, models: Sequence[Model]) -> dict[str, Items]:
        """The softmax branch's share of the denominator by block, of models whose blocks are all at one rate."""
        return self.measured("shares", models, (), self._shares)

    def _shares(self, model: WanTransformer) -> Items:
        hybrid = model.config.hybrid
        assert hybrid is not None and len(set(hybrid.rates)) == 1
        setup = DistillSpec(hybrid.rates[:1], hybrid.chain, hybrid.lattice, hybrid.stabilizer, loss="value")
        maps = jax.tree.map(lambda leaf: leaf[:, None], (model.query_maps.maps, model.key_maps.maps))
        found = [np.asarray(softmax_shares(model, batch, maps, setup)) for batch in self.held_out]
        return {"softmax_share": np.mean(found, axis=0).tolist()}

    def measured(
        self, kind: str, models: Sequence[Model], fields: Iterable[str], measure: Callable[[WanTransformer], Items]
    ) -> dict[str, Items]:
        """`measure` of every model, kept in a file each."""
        stage = self.measurement(kind, self.config, fields, [self.run.trace])
        stage.begin()
        for model in models:
            file = stage.folder / f"{model.name}.json"
            if not file.exists():
                write_json(file, measure(model.load()), indent=None)
        return {model.name: json.loads((stage.folder / f"{model.name}.json").read_text()) for model in models}

    def kept(
        self, kind: str, fields: Iterable[str], after: Iterable[StageFolder], work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What `work` returns, a measurement."""
        stage = self.keep(kind, self.config, fields, after, work)
        return json.loads((stage.folder / f"{kind}.json").read_text())

    def keep(
        self,
        kind: str,
        config: ConfigDict,
        fields: Iterable[str],
        after: Iterable[StageFolder],
        work: Callable[[], dict[str, Any]],
    ) -> StageFolder:
        """The measurement whose file KIND.json has what `work` returns."""
        stage = self.measurement(kind, config, fields, after)
        if not stage.done():
            stage.run(lambda: write_json(stage.folder / f"{kind}.json", work(), indent=None))
        return stage

    def attention(self, found: Operation) -> Items:
        """Relative L1 errors of the attention output at every rate, by block."""
        errors = found.errors
        rows = errors["errors" if found.arm.maps == "feature_maps" else "initial_errors"]
        return {f"error {rate_name(rate)}": [row[i] for row in rows] for i, rate in enumerate(errors["rates"])}

    def teacher_share(self, found: Operation) -> Items:
        """The mass that the teacher's attention gives the softmax keys of the arm's rate, by block."""
        errors = found.errors
        named = parse_block_budget(found.config.plan.budget)
        assert named is not None
        column = errors["rates"].index(named[1])
        return {"teacher_share": [row[column] for row in errors["teacher_softmax_share"]]}

    def facts(self, found: Operation, kinds: Iterable[str]) -> dict[str, float]:
        """What an arm costs: its share of the teacher's attention FLOPs, and one of its feature maps."""
        model = self.run.model_config
        work = workload(found.config, model)
        if found.arm.maps == "none":
            work = dataclasses.replace(work, feature_map=None)
        facts = {}
        if "cost" in kinds:
            flops = sum(core_flops(work, rate) for rate in found.plan["rates"])
            facts["attention_flops"] = flops / (self.layers * core_flops(work, 1))
        if "phi" in kinds and work.feature_map is not None:
            parameters = map_parameters(work.feature_map, model.num_attention_heads, model.attention_head_dim)
            facts |= {"phi_kparams": parameters / 1e3, "phi_mflop": 2 * parameters * work.tokens / 1e6}
        return facts


def fingerprinted(
    root: epath.Path, kind: str, config: ConfigDict, fields: Iterable[str], after: Iterable[StageFolder], **inputs: str
) -> StageFolder:
    """A stage in `root` of which there may be several: its fingerprint is in its name."""
    made = functools.partial(StageFolder, root, config=config, fields=tuple(fields), after=tuple(after), **inputs)
    return made(name=f"{kind}_{made(name=kind).fingerprint}")


def prompt_ranges(count: int, parts: int) -> list[range]:
    """`count` prompts in runs as long as each other, or one longer."""
    ends = [count * part // parts for part in range(parts + 1)]
    return [range(*pair) for pair in itertools.pairwise(ends)]


@nnx.jit
def velocity(model: WanTransformer, batch: dict[str, jax.Array]) -> jax.Array:
    return model(batch["latents"], batch["timestep"], batch["text"])


def sample_items(result: dict[str, Any]) -> Items:
    """By prompt; scores lie between captions dealt at random (0) and real clips (1). The loss is one number."""
    items: Items = {"latent_rmse": result["latent_rmse"]}
    if "validation_loss" in result:
        items["validation_loss"] = [result["validation_loss"]]
    if "score" in result:
        clips = {name: np.array(result["per_clip"][name]) for name in DIMENSIONS}
        clips["total"] = np.mean(list(clips.values()), axis=0)
        for name, values in clips.items():
            low, high = result["score"][name]["chance"], result["score"][name]["upper"]
            items[name] = ((values - low) / (high - low) if high > low else np.full(len(values), np.nan)).tolist()
    return items


def changed(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """A copy with other values. Raises InputError where they break a rule."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked(), copy.ignore_type():
        copy.update_from_flattened_dict(dict(fields))
    validate(copy)
    return copy.lock()


def arm_config(config: ConfigDict, arm: Arm, layers: int) -> ConfigDict:
    """The config of an arm on a model of `layers` blocks: a heterogeneous plan chooses from the paper's rates."""
    budget = scaled(arm.blocks, layers)
    named = parse_block_budget(budget)
    assert named is not None
    mixed = (1, *(rate for rate in config.hybrid.rates if rate != "linear"))
    rates = mixed if arm.selection == "heterogeneous" else (1, named[1])
    chosen = {"budget": budget, "selection": arm.selection, "rates": rates}
    return changed(config, {**arm.changes, **{f"plan.{name}": value for name, value in chosen.items()}})


def measured_steps(config: ConfigDict) -> tuple[int, ...]:
    """The numbers of fine-tuning steps after which an arm is measured."""
    settings = config.finetune
    if settings.schedule != "constant":
        raise InputError(
            f"config.finetune.schedule: ablations measure on the way: 'constant', not {settings.schedule!r}"
        )
    if not settings.steps:
        raise InputError("config.finetune.steps: ablations fine-tune: expected at least 1, found 0")
    return tuple(sorted({max(1, round(share * settings.steps)) for share in STEPS}))
