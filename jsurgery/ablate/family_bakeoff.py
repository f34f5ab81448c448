"""The bake-off of one seed: the arms at every budget, in attention FLOPs and in measured time, and their errors."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jsurgery.ablate import measures
from jsurgery.ablate.family_errors import CHOICE, REPORT, FamilyErrors
from jsurgery.ablate.family_plans import BUDGETS, Candidates, Plan, best_kinds, cheapest_share, converted, families
from jsurgery.ablate.run_arms import items_over_steps
from jsurgery.ablate.seed_run import Model, Operation, SeedRun
from jsurgery.ablate.tables import Arm
from jsurgery.attention.kinds.registry import kind_of
from jsurgery.rates import Rate
from jsurgery.surgery.plan import BlockCosts
from jsurgery.wan.cost import core_flops, workload

FLOPS, TIME = "flops", "time"
MIX = "the planner’s mix"
LEARNED = {"linear": "learned selection, linear", "best": "learned selection, best kind"}
SAMPLED = ("latent_rmse", "total")  # what is shown of samples, by prompt
FINETUNED = "finetuned_squared"

# Budget -> arm -> {"rates", "kind", "choice", "report"}, or {"not_reached": the share that all blocks cost}.
Arms = dict[str, dict[str, dict[str, Any]]]


def flop_costs(seed: SeedRun) -> BlockCosts:
    """The FLOPs of softmax and of every candidate."""
    work = workload(seed.config, seed.run.model_config)
    kinds: tuple[Rate, ...] = (1, *seed.config.hybrid.rates)
    return BlockCosts("FLOP", kinds, np.tile([float(core_flops(work, kind)) for kind in kinds], (seed.layers, 1)))


def arms_of(errors: FamilyErrors, costs: BlockCosts) -> Arms:
    """The arms of every budget with their plans and the errors, of which `report` is a list by prompt.

    The kind of a family, and the best kind of all, are chosen on the other half of the held-out prompts.
    """
    candidates = Candidates(errors.kinds, errors.blocks()[CHOICE].mean(axis=0))
    single = {budget: candidates.single(costs, budget) for budget in BUDGETS}
    plans = [plan for of_budget in single.values() for plan in of_budget.values()]
    chosen = {plan: float(values.mean()) for plan, values in errors.plans(plans, CHOICE).items()}
    arms: Arms = {}
    for budget, of_kind in single.items():
        best, found = best_kinds(of_kind, chosen), dict[str, dict[str, Any]]()
        for family, kinds in families(errors.kinds).items():
            if family not in best:
                found[family] = {"not_reached": cheapest_share(kinds, costs)}
                continue
            kind = best[family]
            found[family] = {"rates": of_kind[kind], "kind": kind, "choice": chosen[of_kind[kind]]}
        mix = candidates.mix(costs, budget)
        found[MIX] = {"not_reached": cheapest_share(errors.kinds, costs)} if mix is None else {"rates": mix}
        arms[f"{budget:g}"] = found | learned_arms(errors, of_kind, best, chosen)
    planned = [arm["rates"] for found in arms.values() for arm in found.values() if "rates" in arm]
    reported = errors.plans(planned, REPORT)
    for found in arms.values():
        for arm in found.values():
            if "rates" in arm:
                arm["report"] = reported[arm["rates"]].tolist()
    return arms


def learned_arms(
    errors: FamilyErrors, plans: Mapping[Rate, Plan], best: Mapping[str, Rate], chosen: Mapping[Plan, float]
) -> dict[str, dict[str, Any]]:
    """LinVideo's selection with the kind and the number of blocks of the planner's own plan, where that has one."""
    found = {}
    for name, kind in rivals(plans, best, chosen).items():
        count = converted(plans[kind])
        if count == errors.layers:  # nothing to select
            found[LEARNED[name]] = {"rates": plans[kind], "kind": kind}
            continue
        learned = errors.learned(kind, count)
        found[LEARNED[name]] = {**learned, "kind": kind, "target": errors.layers - count}
    return found


def rivals(plans: Mapping[Rate, Plan], best: Mapping[str, Rate], chosen: Mapping[Plan, float]) -> dict[str, Rate]:
    """The kinds that are given to the learned selection: linear attention, LinVideo's, and the best of all."""
    linear = [kind for kind in plans if not kind_of(kind).has_softmax]
    kinds = {"linear": linear[0]} if linear else {}
    return kinds | ({"best": min(best.values(), key=lambda kind: chosen[plans[kind]])} if best else {})


def models_of(seed: SeedRun, rates: Plan) -> dict[int, Model]:
    """The models of a plan by fine-tuning steps: one at 0 steps if `config.finetune.steps` is 0."""
    arm = Arm("families", finetuned=bool(seed.config.finetune.steps))
    return seed.models(Operation(arm, seed.config, {}, {"rates": list(rates)}))


def sampled_arms(arms: Arms) -> list[Plan]:
    """The plans that are sampled, and fine-tuned before: the families' and the mix."""
    return list(dict.fromkeys(
        arm["rates"] for found in arms.values() for name, arm in found.items()
        if "rates" in arm and name not in LEARNED.values()
    ))  # fmt: skip


def measure_samples(seed: SeedRun, errors: FamilyErrors, arms: Arms) -> dict[str, list[float]]:
    """Adds to the arms of `sampled_arms` the measures of their samples, and after fine-tuning the velocity's error.

    Returns those of the teacher.
    """
    by_plan = {plan: models_of(seed, plan) for plan in sampled_arms(arms)}
    models = list({model.name: model for steps in by_plan.values() for model in steps.values()}.values())
    scored = measures.samples(seed, models)
    tuned = {model.name: errors.of_model(model) for model in models} if seed.config.finetune.steps else {}
    for found in arms.values():
        for name, arm in found.items():
            if "rates" not in arm or name in LEARNED.values():
                continue
            steps = by_plan[arm["rates"]]
            items = {
                step: scored[model.name] | ({FINETUNED: tuned[model.name]} if tuned else {})
                for step, model in steps.items()
            }
            for measure in (FINETUNED, *SAMPLED):
                if measure in next(iter(items.values())):
                    arm[measure] = items_over_steps(items, measure).tolist()
    return {measure: scored["teacher"][measure] for measure in SAMPLED if measure in scored["teacher"]}
