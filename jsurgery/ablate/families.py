"""families: which family of attention is best at which budget, and does the planner's mix beat the best single family?

Every seed distils all candidates in one pass. At every budget, in attention FLOPs and in measured time, each family is
represented by its best kind, beside the planner's mix and LinVideo's learned selection.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from jsurgery.ablate.attention_seconds import attention_seconds, measured_costs
from jsurgery.ablate.family_bakeoff import FLOPS, TIME, arms_of, flop_costs, measure_samples
from jsurgery.ablate.family_errors import FamilyErrors
from jsurgery.ablate.family_hours import announce, work_left
from jsurgery.ablate.family_tables import describe
from jsurgery.ablate.seed_run import SeedRun, measured_steps
from jsurgery.errors import InputError
from jsurgery.runtime.progress import say
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.surgery.plan import BlockCosts


def families_table(seeds: Sequence[SeedRun]) -> dict[str, Any]:
    """The result that `write_table.write` takes.

    Raises InputError, before any work, for a config that the bake-off cannot use.
    """
    check(seeds[0].config)
    errors = [FamilyErrors(seed) for seed in seeds]
    unfinished = [
        (seed, parts) for seed, each in zip(seeds, errors, strict=True)
        if not finished(seed, each) and (parts := work_left(seed, each))
    ]  # fmt: skip
    if unfinished:
        announce([(seed.number, parts) for seed, parts in unfinished], seeds[0])
    seconds = attention_seconds(seeds[0], seeds[0].run.workdir.parent)
    costs = {FLOPS: flop_costs(seeds[0]), TIME: measured_costs(seconds, seeds[0].layers)}
    per_seed = []
    for seed, each in zip(seeds, errors, strict=True):
        say(f"families: seed {seed.number}")
        per_seed.append(of_seed(seed, each, costs))
        mark_finished(seed, each)
    return describe(seeds[0], per_seed, costs, seconds)


def of_seed(seed: SeedRun, errors: FamilyErrors, costs: dict[str, BlockCosts]) -> dict[str, Any]:
    """The arms by FLOPs and by time, the teacher's samples, and the errors of single blocks by prompt and kind."""
    arms = {unit: arms_of(errors, each) for unit, each in costs.items()}
    teacher = measure_samples(seed, errors, arms[FLOPS])
    blocks = {name: values.mean(axis=1).tolist() for name, values in errors.blocks().items()}
    return {"arms": arms, "teacher": teacher, "blocks": blocks}


def done_stage(seed: SeedRun, errors: FamilyErrors) -> StageFolder:
    """Its line says that a seed has all measurements, which are read again all the same."""
    after = [errors.plans_stage, seed.run.stages["latents"]]
    return seed.stage("family_done", seed.config, ("finetune", "evaluate"), after)


def finished(seed: SeedRun, errors: FamilyErrors) -> bool:
    return bool(seed.measurements.read(done_stage(seed, errors)))


def mark_finished(seed: SeedRun, errors: FamilyErrors) -> None:
    if not finished(seed, errors):
        seed.measurements.add(done_stage(seed, errors), {"done.json": {"done": True}})


def check(config: ConfigDict) -> None:
    """Raises InputError for a config without what the bake-off compares, holds out or learns from."""
    if len(config.hybrid.rates) < 2:
        raise InputError(f"config.hybrid.rates: expected several kinds to compare, found {config.hybrid.rates}")
    if not config.hybrid.linear_branch:
        raise InputError(
            "config.hybrid.linear_branch: expected True, as the families are compared with it; found False"
        )
    if config.trace.holdout < 2:
        raise InputError(
            f"config.trace.holdout: expected at least 2 prompts, half of them to choose by, found "
            f"{config.trace.holdout}"
        )
    if config.distill.mode != "traces":
        raise InputError(
            "config.distill.mode: the learned selection needs the traces of training prompts: expected 'traces', "
            f"found {config.distill.mode!r}"
        )
    if config.finetune.steps:
        measured_steps(config)
