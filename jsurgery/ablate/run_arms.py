"""A sweep: every arm built, trained and measured on every seed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jsurgery.ablate.seed_run import Items, Operation, SeedRun
from jsurgery.ablate.tables import ArmTable
from jsurgery.ablate.write_table import PAIRED
from jsurgery.errors import Diverged
from jsurgery.evaluate.sprites_score import DIMENSIONS
from jsurgery.evaluate.statistics import fact, mean_and_std, paired_difference
from jsurgery.runtime.progress import say

PLOTTED = ("total", "motion", "velocity_error", "error R8", "softmax_share")
BY_PROMPT = ("latent_rmse", "total", *DIMENSIONS)  # measures of samples
Measured = dict[str, dict[int, Items]]  # arm -> steps of fine-tuning -> items


def run_arms(sweep: ArmTable, seeds: Sequence[SeedRun]) -> dict[str, Any]:
    """The table of a sweep: what `table.write` takes. Arms whose distillation diverged on any seed are in its notes.

    Raises Diverged where that leaves none.
    """
    measured, facts, plans = [], [], []
    decided, notes = plan_arms(sweep, seeds)
    sweep = without_arms(sweep, set.intersection(*map(set, decided)))
    for seed, decisions in zip(seeds, decided, strict=True):
        say(f"{sweep.title}: seed {seed.number}")
        operations = {arm.name: decisions[arm.name] for arm in sweep.arms}
        measured.append(measure(sweep, seed, operations))
        facts.append({arm: seed.facts(found, sweep.facts) for arm, found in operations.items()})
        plans.append({arm: found.plan["rates"] for arm, found in operations.items()})
    rows: dict[str, dict[str, Any]] = {}
    for arm, items in measured[0].items():  # the teacher has no facts
        rows[arm] = {name: fact([row[arm][name] for row in facts]) for name in facts[0].get(arm, {})}
        for m in measures_of(items):
            rows[arm][m] = mean_and_std([float(items_over_steps(found[arm], m).mean()) for found in measured])
    steps = sorted({step for of in measured[0].values() for step in of} - {0})
    prompts = f", {seeds[0].config.evaluate.prompts} prompts each" if "samples" in sweep.measures else ""
    tuned = "; not fine-tuned"
    if steps:
        counts = " and ".join(map(str, steps))
        tuned = f"; means over {counts} steps of fine-tuning{', which share the prompts' if prompts else ''}"
    return {
        "text": f"{len(seeds)} seeds{prompts}{tuned}; ± is the standard deviation over seeds.",
        "rows": rows,
        "paper": {arm.name: dict(arm.paper) for arm in sweep.arms if arm.paper},
        "contrasts": {f"{a} − {b}": contrast(measured, a, b) for a, b in sweep.contrasts},
        "plotted": [m for m in PLOTTED if m in rows[sweep.arms[-1].name]],
        "charts": cost_charts(sweep, rows),
        "plans": plans,
        "per_seed": measured,
        "notes": notes,
    }


def plan_arms(sweep: ArmTable, seeds: Sequence[SeedRun]) -> tuple[list[dict[str, Operation]], list[str]]:
    """The operations of every seed, and a note on each arm whose distillation diverged on some of them."""
    decided: list[dict[str, Operation]] = [{} for _ in seeds]
    diverged: dict[str, dict[int, str]] = {}
    for seed, operations in zip(seeds, decided, strict=True):
        for arm in sweep.arms:
            try:
                operations[arm.name] = seed.operation(arm)
            except Diverged as error:
                say(f"{arm.name}: {error}")
                diverged.setdefault(arm.name, {})[seed.number] = str(error)
                if len(diverged) == len(sweep.arms):
                    raise
    notes = []
    for arm, messages in diverged.items():
        first = next(iter(messages.values())).partition(";")[0]
        on = ", ".join(map(str, messages))
        notes.append(f"Without {arm}, whose distillation diverged on seed{'s' * (len(messages) > 1)} {on}: {first}.")
    return decided, notes


def without_arms(sweep: ArmTable, names: set[str]) -> ArmTable:
    """The arms of these names alone, and what compares them."""
    arms = tuple(arm for arm in sweep.arms if arm.name in names)
    return dataclasses.replace(sweep, arms=arms, contrasts=tuple(p for p in sweep.contrasts if names.issuperset(p)))


def measure(sweep: ArmTable, seed: SeedRun, operations: dict[str, Operation]) -> Measured:
    """Measures what is not measured yet, which trains what is not trained yet."""
    models = {arm: seed.models(found) for arm, found in operations.items()}
    distinct = list({model.name: model for of in models.values() for model in of.values()}.values())
    kinds = {"samples": seed.samples, "velocity": seed.velocity, "shares": seed.shares}
    by_model = [kinds[kind](distinct) for kind in sweep.measures if kind in kinds]
    found: Measured = {}
    if "samples" in sweep.measures:
        found["teacher"] = {0: next(of["teacher"] for of in by_model if "teacher" in of)}
    for arm, operation in operations.items():
        shared = seed.attention(operation) if "attention" in sweep.measures else {}
        shared |= seed.teacher_share(operation) if "shares" in sweep.measures else {}
        found[arm] = {
            step: shared | {m: v for of in by_model for m, v in of[model.name].items()}
            for step, model in models[arm].items()
        }
    return found


def measures_of(steps: dict[int, Items]) -> list[str]:
    return list(next(iter(steps.values())))


def items_over_steps(steps: dict[int, Items], measure: str) -> np.ndarray:
    """[items]: one after the other where the numbers of fine-tuning steps share the prompts, else means over them."""
    found = [items[measure] for items in steps.values()]
    return np.concatenate(found) if measure in BY_PROMPT else np.mean(found, axis=0)


def contrast(measured: Sequence[Measured], a: str, b: str) -> dict[str, dict[str, float]]:
    """Measure -> paired difference of two arms."""
    both = [m for m in PAIRED if m in measures_of(measured[0][a]) and m in measures_of(measured[0][b])]
    items = lambda arm, m: [items_over_steps(found[arm], m) for found in measured]
    return {m: paired_difference(items(a, m), items(b, m)) for m in both}


def cost_charts(sweep: ArmTable, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Score over cost, a line for each rate, where arms differ in blocks and rate alone."""
    if any(arm.changes or arm.selection != "homogeneous" or arm.maps != "feature_maps" for arm in sweep.arms):
        return []
    made = []
    for measure, title in (("total", "Score"), ("velocity_error", "Velocity error")):
        lines: dict[str, dict[str, list[float]]] = {}
        for arm in sweep.arms:
            if arm.finetuned and measure in rows[arm.name]:
                line = lines.setdefault("R" + arm.blocks.partition("R")[2], {"x": [], "y": []})
                line["x"].append(100 * rows[arm.name]["attention_flops"])
                line["y"].append(rows[arm.name][measure][0])
        made.append({"title": f"{title} over attention FLOPs, percent of the teacher’s", "lines": lines})
    return made
