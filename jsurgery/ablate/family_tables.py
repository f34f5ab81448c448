"""The tables, the figure and the findings of the bake-off, from the measurements of all seeds."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jsurgery.ablate.family_bakeoff import FINETUNED, FLOPS, LEARNED, SAMPLED, TIME
from jsurgery.ablate.family_contrasts import PERCENT, VELOCITY, Seeds, arms_at, contrasts_of, learned_arms
from jsurgery.ablate.family_findings import findings
from jsurgery.ablate.family_papers import PAPERS
from jsurgery.ablate.family_plans import describe_plan, families, options
from jsurgery.ablate.learned_selection import STEPS
from jsurgery.ablate.seed_run import SeedRun, measured_steps
from jsurgery.attention.kinds.registry import rate_name
from jsurgery.evaluate.statistics import fact, mean_and_std, paired_difference
from jsurgery.surgery.plan import BlockCosts

SHARES = {FLOPS: "attention_flops", TIME: "attention_time"}  # columns of a plan's cost over the teacher's
UNITS = {FLOPS: "attention FLOPs", TIME: "measured attention time"}
Costs = Mapping[str, BlockCosts]


def describe(seed: SeedRun, per_seed: Seeds, costs: Costs, seconds: Mapping[str, Any]) -> dict[str, Any]:
    """The result that `write_table.write` takes. `seconds` is what `attention_seconds` measured."""
    config, kinds = seed.config, tuple(seed.config.hybrid.rates)
    halves = len(per_seed[0]["blocks"]["choice"]), len(per_seed[0]["blocks"]["report"])
    tuned = "without fine-tuning"
    if config.finetune.steps:
        counts = " and ".join(map(str, measured_steps(config)))
        tuned = f"means over {counts} steps of fine-tuning, which share the prompts"
    contrasts = {unit: contrasts_of(per_seed, unit) for unit in UNITS}
    shown = {unit: {each.title: each.measures for each in found} for unit, found in contrasts.items()}
    teacher = {name: over_seeds([each["teacher"][name] for each in per_seed]) for name in per_seed[0]["teacher"]}
    spread = ", ".join(
        f"{rate_name(kind)} {ms:.2f} ({low:.2f} to {high:.2f})"
        for kind, ms, low, high in zip(*(seconds[name] for name in ("kinds", "ms", "low", "high")), strict=True)
    )
    more = [
        {"title": f"Budgets of {UNITS[TIME]}, measured below; not sampled:", "rows": rows_of(per_seed, costs, TIME)},
        {"title": DIFFERENCES, "contrasts": shown[TIME]},
        {"title": SINGLE_BLOCKS, "rows": rows_of_kinds(kinds, per_seed, costs)},
        {"title": "Single options, by the errors of the table above, paired by prompts:",
         "contrasts": option_contrasts(kinds, per_seed)},
        {"title": "What the papers say of these families, on real models:", "rows": papers()},
    ]  # fmt: skip
    return {
        "text": f"{len(per_seed)} seeds; ± is the standard deviation over seeds. Budgets are shares of the cost of the "
        f"teacher’s attention. Errors are squared, relative to the teacher’s velocity, in percent, right after "
        f"distillation, on {halves[1]} held-out prompts a seed; plans are made, and a family’s kind is chosen, on "
        f"{halves[0]} others. Scores are of samples on {config.evaluate.prompts} prompts a seed, {tuned}. The learned "
        f"selection trains for {STEPS} steps on the training prompts.",
        "rows": ({"teacher": teacher} if teacher else {}) | rows_of(per_seed, costs, FLOPS),
        "contrasts": shown[FLOPS],
        "more": more,
        "charts": [chart(per_seed, costs, unit) for unit in UNITS],
        "per_seed": per_seed,
        "seconds": dict(seconds),
        "notes": [
            *(
                f"By {text}: {sentence}"
                for unit, text in UNITS.items()
                for sentence in findings(contrasts[unit], learned_arms(per_seed, unit))
            ),
            f"One block’s attention took, in ms on {seconds['machine']}: {spread}. These are medians and quartiles of "
            f"{seconds['rounds']} rounds in which all kinds take turns.",
        ],
    }


DIFFERENCES = "Paired differences over the prompts of all seeds, with 95 % bootstrap intervals:"
SINGLE_BLOCKS = (
    "One block converted alone, mean over blocks; costs are those of all blocks. Initial maps are calibrated and not "
    "trained; where the linear branch has a projection, that is zero:"
)


def over_seeds(items: Sequence[Sequence[float] | np.ndarray], factor: float = 1.0) -> tuple[float, float]:
    return mean_and_std([factor * float(np.mean(each)) for each in items])


def rows_of(per_seed: Seeds, costs: Costs, unit: str) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for budget, first in per_seed[0]["arms"][unit].items():
        for name, of_first in first.items():
            arms = arms_at(per_seed, unit, budget, name)
            if arms is None:
                share = of_first.get("not_reached", np.nan)
                rows[f"{budget}: {name}"] = {"plan": f"not reached: all blocks cost {share:.2f}"}
                continue
            row: dict[str, Any] = {
                "plan": " / ".join(dict.fromkeys(describe_plan(tuple(arm["rates"])) for arm in arms))
            }
            for each, column in SHARES.items():
                row[column] = fact([costs[each].of(arm["rates"]) / costs[each].teacher for arm in arms])
            row[VELOCITY] = over_seeds([arm["report"] for arm in arms], PERCENT)
            for measure in (FINETUNED, *SAMPLED):
                if all(measure in arm for arm in arms):
                    factor = PERCENT if measure == FINETUNED else 1
                    row[measure] = over_seeds([arm[measure] for arm in arms], factor)
            rows[f"{budget}: {name}"] = row
    return rows


def rows_of_kinds(kinds: Sequence[Any], per_seed: Seeds, costs: Costs) -> dict[str, dict[str, Any]]:
    """Every kind: what converting all blocks costs, and the errors of single blocks with trained and initial maps."""
    rows = {}
    for of_family in families(kinds).values():
        for kind in of_family:
            column = kinds.index(kind)
            rows[rate_name(kind)] = {
                **{name: float(costs[unit].at(kind).sum() / costs[unit].teacher) for unit, name in SHARES.items()},
                "distilled": over_seeds(of_kind(per_seed, "report", column), PERCENT),
                "initial": over_seeds(of_kind(per_seed, "initial", column), PERCENT),
            }
    return rows


def of_kind(per_seed: Seeds, name: str, column: int) -> list[np.ndarray]:
    """The errors of one kind, by seed and prompt, means over blocks."""
    return [np.array(each["blocks"][name])[:, column] for each in per_seed]


def option_contrasts(kinds: Sequence[Any], per_seed: Seeds) -> dict[str, dict[str, dict[str, float]]]:
    """Neighbours on every ladder of kinds that differ in one option, and trained maps against initial ones."""

    def difference(a: tuple[str, int], b: tuple[str, int]) -> dict[str, dict[str, float]]:
        scaled: Callable = lambda of: [PERCENT * values for values in of_kind(per_seed, *of)]
        return {"one block": paired_difference(scaled(a), scaled(b))}

    found = {}
    for ladder, steps in options(kinds).items():
        for low, high in itertools.pairwise(steps):
            pair = ("report", kinds.index(high)), ("report", kinds.index(low))
            found[f"{ladder.partition(' ')[0]}: {rate_name(high)} − {rate_name(low)}"] = difference(*pair)
    for column, kind in enumerate(kinds):
        found[f"{rate_name(kind)}: trained − initial maps"] = difference(("report", column), ("initial", column))
    return found


def chart(per_seed: Seeds, costs: Costs, unit: str) -> dict[str, Any]:
    """Error over cost with a line for each family, and the mix last, which is drawn on top."""
    names = [name for name in next(iter(per_seed[0]["arms"][unit].values())) if name not in LEARNED.values()]
    lines: dict[str, dict[str, list[float]]] = {name: {"x": [], "y": []} for name in names}
    for budget in per_seed[0]["arms"][unit]:
        for name, line in lines.items():
            if arms := arms_at(per_seed, unit, budget, name):
                shares = [costs[unit].of(arm["rates"]) / costs[unit].teacher for arm in arms]
                line["x"].append(100 * float(np.mean(shares)))
                line["y"].append(PERCENT * float(np.mean([np.mean(arm["report"]) for arm in arms])))
    title = f"Squared velocity error over {UNITS[unit]}, both in percent of the teacher’s"
    return {"title": title, "lines": {name: line for name, line in lines.items() if line["x"]}}


def papers() -> dict[str, dict[str, str]]:
    return {of: {"model": model, "printed": printed} for of, (model, printed) in PAPERS.items()}
