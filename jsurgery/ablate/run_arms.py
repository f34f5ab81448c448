"""Runs a table of arms: builds, trains and measures every arm on every seed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jsurgery.ablate import measures
from jsurgery.ablate.measures import Items
from jsurgery.ablate.seed_run import Operation, SeedRun
from jsurgery.ablate.tables import ArmTable
from jsurgery.ablate.write_table import PAIRED
from jsurgery.errors import Diverged
from jsurgery.evaluate.sprites_score import DIMENSIONS
from jsurgery.evaluate.statistics import fact, mean_and_std, paired_difference
from jsurgery.runtime.progress import say

PLOTTED = ("total", "motion", "velocity_error", "error R8", "softmax_share")
BY_PROMPT = ("latent_rmse", "total", *DIMENSIONS)  # measures with a value for each sampled prompt
Measured = dict[str, dict[int, Items]]  # arm -> number of fine-tuning steps -> values


def run_arms(table: ArmTable, seeds: Sequence[SeedRun]) -> dict[str, Any]:
    """The result that `write_table.write` takes. An arm whose distillation diverges on any seed gets a note, not a row.

    Raises Diverged if no arm is left.
    """
    measured, costs, plans = [], [], []
    planned, notes = plan_arms(table, seeds)
    table = without_diverged(table, set.intersection(*map(set, planned)))
    for seed, by_arm in zip(seeds, planned, strict=True):
        say(f"{table.title}: seed {seed.number}")
        operations = {arm.name: by_arm[arm.name] for arm in table.arms}
        measured.append(measure(table, seed, operations))
        costs.append({arm: measures.facts(seed, operation, table.facts) for arm, operation in operations.items()})
        plans.append({arm: operation.plan["rates"] for arm, operation in operations.items()})
    rows: dict[str, dict[str, Any]] = {}
    for arm, items in measured[0].items():  # the teacher has no costs
        rows[arm] = {name: fact([row[arm][name] for row in costs]) for name in costs[0].get(arm, {})}
        for m in measures_of(items):
            rows[arm][m] = mean_and_std([float(items_over_steps(of_seed[arm], m).mean()) for of_seed in measured])
    steps = sorted({step for of_arm in measured[0].values() for step in of_arm} - {0})
    prompts = f", {seeds[0].config.evaluate.prompts} prompts each" if "samples" in table.measures else ""
    tuned = "; not fine-tuned"
    if steps:
        counts = " and ".join(map(str, steps))
        tuned = f"; means over {counts} steps of fine-tuning{', which share the prompts' if prompts else ''}"
    return {
        "text": f"{len(seeds)} seeds{prompts}{tuned}; ± is the standard deviation over seeds.",
        "rows": rows,
        "paper": {arm.name: dict(arm.paper) for arm in table.arms if arm.paper},
        "contrasts": {f"{a} − {b}": contrast(measured, a, b) for a, b in table.contrasts},
        "plotted": [m for m in PLOTTED if m in rows[table.arms[-1].name]],
        "charts": cost_charts(table, rows),
        "plans": plans,
        "per_seed": measured,
        "notes": notes,
    }


def plan_arms(table: ArmTable, seeds: Sequence[SeedRun]) -> tuple[list[dict[str, Operation]], list[str]]:
    """The operations of every seed by arm, and a note on each arm whose distillation diverged on some seeds."""
    planned: list[dict[str, Operation]] = [{} for _ in seeds]
    diverged: dict[str, dict[int, str]] = {}
    for seed, operations in zip(seeds, planned, strict=True):
        for arm in table.arms:
            try:
                operations[arm.name] = seed.operation(arm)
            except Diverged as error:
                say(f"{arm.name}: {error}")
                diverged.setdefault(arm.name, {})[seed.number] = str(error)
                if len(diverged) == len(table.arms):
                    raise
    notes = []
    for arm, messages in diverged.items():
        first = next(iter(messages.values())).partition(";")[0]
        numbers = ", ".join(map(str, messages))
        plural = "s" if len(messages) > 1 else ""
        notes.append(f"Without {arm}, whose distillation diverged on seed{plural} {numbers}: {first}.")
    return planned, notes


def without_diverged(table: ArmTable, names: set[str]) -> ArmTable:
    """The table with the arms of these names only, and the contrasts between them."""
    arms = tuple(arm for arm in table.arms if arm.name in names)
    return dataclasses.replace(table, arms=arms, contrasts=tuple(p for p in table.contrasts if names.issuperset(p)))


def measure(table: ArmTable, seed: SeedRun, operations: dict[str, Operation]) -> Measured:
    """The table's measures of every arm. Only models without a measurement are loaded, and trained if necessary."""
    models = {arm: seed.models(operation) for arm, operation in operations.items()}
    distinct = list({model.name: model for of_arm in models.values() for model in of_arm.values()}.values())
    kinds = {
        "samples": measures.samples,
        "velocity": measures.velocity_errors,
        "shares": measures.branch_shares,
    }
    by_model = [kinds[kind](seed, distinct) for kind in table.measures if kind in kinds]
    measured: Measured = {}
    if "samples" in table.measures:
        measured["teacher"] = {0: next(items["teacher"] for items in by_model if "teacher" in items)}
    for arm, operation in operations.items():
        of_plan = measures.attention_errors(operation) if "attention" in table.measures else {}
        of_plan |= measures.teacher_share(operation) if "shares" in table.measures else {}
        measured[arm] = {
            step: of_plan | {m: values for items in by_model for m, values in items[model.name].items()}
            for step, model in models[arm].items()
        }
    return measured


def measures_of(steps: dict[int, Items]) -> list[str]:
    return list(next(iter(steps.values())))


def items_over_steps(steps: dict[int, Items], measure: str) -> np.ndarray:
    """The values of a measure over all numbers of fine-tuning steps, [items].

    Measures by prompt are concatenated, as each number of steps was sampled on its own prompts. Others are averaged.
    """
    values = [items[measure] for items in steps.values()]
    return np.concatenate(values) if measure in BY_PROMPT else np.mean(values, axis=0)


def contrast(measured: Sequence[Measured], a: str, b: str) -> dict[str, dict[str, float]]:
    """Measure -> paired difference of two arms."""
    shared = [m for m in PAIRED if m in measures_of(measured[0][a]) and m in measures_of(measured[0][b])]
    items = lambda arm, m: [items_over_steps(of_seed[arm], m) for of_seed in measured]
    return {m: paired_difference(items(a, m), items(b, m)) for m in shared}


def cost_charts(table: ArmTable, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Charts over the attention's cost with a line for each rate. None if arms differ in more than blocks and rate."""
    if any(arm.changes or arm.selection != "homogeneous" or arm.maps != "feature_maps" for arm in table.arms):
        return []
    charts = []
    for measure, title in (("total", "Score"), ("velocity_error", "Velocity error")):
        lines: dict[str, dict[str, list[float]]] = {}
        for arm in table.arms:
            if arm.finetuned and measure in rows[arm.name]:
                line = lines.setdefault("R" + arm.blocks.partition("R")[2], {"x": [], "y": []})
                line["x"].append(100 * rows[arm.name]["attention_flops"])
                line["y"].append(rows[arm.name][measure][0])
        charts.append({"title": f"{title} over attention FLOPs, percent of the teacher’s", "lines": lines})
    return charts
