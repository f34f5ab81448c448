"""What is measured of an arm's models. Each measure gives one number per prompt or block, to be compared in pairs."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jsurgery.ablate.seed_run import Model, Operation, SeedRun, velocity
from jsurgery.attention.feature_maps import LearnedMaps
from jsurgery.attention.kinds.registry import parse_block_budget, rate_name
from jsurgery.attention.map_sizes import map_parameters
from jsurgery.evaluate.sprites_reference import Reference
from jsurgery.evaluate.sprites_score import DIMENSIONS
from jsurgery.evaluate.surgery_models import measure_models
from jsurgery.io.files import read_json, write_json
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.surgery.plan_forward import softmax_shares
from jsurgery.wan.cost import core_flops, workload
from jsurgery.wan.transformer import WanTransformer

Items = dict[str, list[float]]  # measure -> its value for each prompt or block


def samples(seed: SeedRun, models: Sequence[Model]) -> dict[str, Items]:
    """Scores of the samples of the teacher and of every model, by prompt. Only new models are sampled."""
    stage = seed.stage("evaluation", seed.config, ("evaluate",), [seed.run.stages["trace"], seed.run.stages["latents"]])
    teacher = Model("teacher", lambda: seed.run.teacher)
    for model in (teacher, *models):
        if f"{model.name}.json" not in seed.measurements.read(stage):
            seed.measurements.add(stage, sample(seed, stage, teacher, model))
    files = seed.measurements.read(stage)
    reference = files.get("reference.json")
    return {model.name: sample_items(files[f"{model.name}.json"], reference) for model in (teacher, *models)}


def sample(seed: SeedRun, stage: StageFolder, teacher: Model, model: Model) -> dict[str, Any]:
    """Samples and scores a model in the stage's folder of the workdir. Returns the measured files."""
    seed.latents()
    stage.begin()  # never ended: more models may follow
    measured = seed.measurements.read(stage)
    for file in measured.keys() & {"teacher.json", "reference.json"}:  # so that the teacher is not scored again
        write_json(stage.folder / file, measured[file], indent=None)
    loads = {teacher.name: teacher.load, model.name: model.load}
    prompts = {} if model.prompts is None else {model.name: model.prompts}
    measure_models(seed.config, seed.run.pipeline, loads, seed.run.validation_latents, stage.folder, prompts)
    files = [stage.folder / f"{model.name}.json", stage.folder / "reference.json"]
    return {file.name: read_json(file) for file in files if file.exists()}


def sample_items(result: dict[str, Any], reference: Reference | None) -> Items:
    """The measures of a model's samples by prompt, and the validation loss, which is one number.

    Scores are scaled so that captions dealt at random score 0 and real clips 1: `reference` has the scores of both.
    """
    items: Items = {"latent_rmse": result["latent_rmse"]}
    if "validation_loss" in result:
        items["validation_loss"] = [result["validation_loss"]]
    if reference is not None:
        real, random = reference
        clips = {name: np.array(result["per_clip"][name]) for name in DIMENSIONS}
        bounds = {name: (random[name], real[name]) for name in DIMENSIONS}
        clips["total"] = np.mean(list(clips.values()), axis=0)
        mean = lambda of: float(np.mean([of[name] for name in DIMENSIONS]))
        bounds["total"] = mean(random), mean(real)
        for name, values in clips.items():
            low, high = bounds[name]
            items[name] = ((values - low) / (high - low) if high > low else np.full(len(values), np.nan)).tolist()
    return items


def measure_each(
    seed: SeedRun, kind: str, models: Sequence[Model], measure: Callable[[SeedRun, WanTransformer], Items]
) -> dict[str, Items]:
    """`measure` of every model on the held-out traces, by the model's name."""
    stage = seed.stage(kind, seed.config, (), [seed.run.stages["trace"]])
    return {
        model.name: seed.measured_once(stage, f"{model.name}.json", lambda model=model: measure(seed, model.load()))
        for model in models
    }


def velocity_errors(seed: SeedRun, models: Sequence[Model]) -> dict[str, Items]:
    """The velocity's relative L1 distance to the teacher's, by prompt over all its held-out steps."""
    return measure_each(seed, "velocity", models, velocity_error)


def velocity_error(seed: SeedRun, model: WanTransformer) -> Items:
    velocities = [np.asarray(velocity(model, batch)) for batch in seed.held_out]
    pairs = zip(velocities, seed.teacher_velocities, strict=True)
    return {"velocity_error": [float(np.abs(v - teacher).sum() / np.abs(teacher).sum()) for v, teacher in pairs]}


def branch_shares(seed: SeedRun, models: Sequence[Model]) -> dict[str, Items]:
    """The softmax branch's share of the denominator, by block. All blocks of a model must have the same rate."""
    return measure_each(seed, "shares", models, branch_share)


def branch_share(seed: SeedRun, model: WanTransformer) -> Items:
    hybrid = model.config.hybrid
    assert hybrid is not None and len(set(hybrid.rates)) == 1
    setup = DistillSpec(hybrid.rates[:1], hybrid.chain, hybrid.lattice, hybrid.stabilizer, loss="value")
    maps = jax.tree.map(lambda leaf: leaf[:, None], LearnedMaps(model.query_maps.maps, model.key_maps.maps))
    shares = [np.asarray(softmax_shares(model, batch, maps, setup)) for batch in seed.held_out]
    return {"softmax_share": np.mean(shares, axis=0).tolist()}


def attention_errors(operation: Operation) -> Items:
    """Relative L1 errors of the attention output at every rate, by block."""
    errors = operation.errors
    rows = errors["errors" if operation.arm.maps == "feature_maps" else "initial_errors"]
    return {f"error {rate_name(rate)}": [row[i] for row in rows] for i, rate in enumerate(errors["rates"])}


def teacher_share(operation: Operation) -> Items:
    """The attention mass that the teacher gives the softmax keys of the arm's rate, by block."""
    block_budget = parse_block_budget(operation.config.plan.budget)
    assert block_budget is not None
    ((_, rate),) = block_budget
    column = operation.errors["rates"].index(rate)
    return {"teacher_share": [row[column] for row in operation.errors["teacher_softmax_share"]]}


def facts(seed: SeedRun, operation: Operation, kinds: Iterable[str]) -> dict[str, float]:
    """What an arm costs: its attention FLOPs over the teacher's, and the size and FLOPs of one of its feature maps."""
    model = seed.run.model_config
    work = workload(operation.config, model)
    if operation.arm.maps == "none":
        work = dataclasses.replace(work, feature_map=None)
    costs = {}
    if "cost" in kinds:
        flops = sum(core_flops(work, rate) for rate in operation.plan["rates"])
        costs["attention_flops"] = flops / (seed.layers * core_flops(work, 1))
    if "phi" in kinds and work.feature_map is not None:
        parameters = map_parameters(work.feature_map, model.num_attention_heads, model.attention_head_dim)
        costs |= {"phi_kparams": parameters / 1e3, "phi_mflop": 2 * parameters * work.tokens / 1e6}
    return costs
