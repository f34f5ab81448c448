"""plan: the rate of every block, from the errors, what blocks cost and a budget (the paper's eq. 9)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.errors import InputError
from jsurgery.io.files import read_json, read_object, shortened, write_json
from jsurgery.rates import Rate, check_rates, parse_block_budget
from jsurgery.surgery.distillation.saved_maps import read_errors
from jsurgery.surgery.knapsack import COST_TOLERANCE, pareto_front, select_homogeneous, solve
from jsurgery.wan.cost import core_flops, workload
from jsurgery.wan.model_config import WanConfig

PLAN_NUMBERS = ("budget_flops", "cost_flops", "teacher_flops", "share_of_teacher", "error")
LARGEST = 1e300  # of costs and errors, of which sums are taken
ERRORS = {"attention": "errors", "velocity": "velocity_errors"}  # of errors.json, which the planner adds up


@dataclass(frozen=True)
class BlockCosts:
    """What every block costs at every rate: float [blocks, rates], FLOPs of the attention core or as measured."""

    unit: str
    rates: tuple[Rate, ...]
    blocks: np.ndarray

    def at(self, rate: Rate) -> np.ndarray:
        """[blocks]. Raises InputError for a rate that has no cost."""
        if rate not in self.rates:
            raise InputError(f"config.plan.costs: expected a cost of rate {rate}, found those of {self.rates}")
        return self.blocks[:, self.rates.index(rate)]

    @property
    def teacher(self) -> float:
        return math.fsum(self.at(1))

    def of(self, rates: Sequence[Rate]) -> float:
        """The cost of a plan, one rate for each block."""
        return math.fsum(self.at(rate)[block] for block, rate in enumerate(rates))


def block_costs(config: ConfigDict, model: WanConfig) -> BlockCosts:
    """The costs of `config.plan.costs`, or without such a file the FLOPs of the attention cores."""
    if config.plan.costs:
        return read_costs(config.plan.costs, model.num_layers)
    work, named = workload(config, model), parse_block_budget(str(config.plan.budget))
    wanted: list[Rate] = [1, *config.plan.rates, *([named[1]] if named else [])]
    rates = tuple(dict.fromkeys(wanted))
    return BlockCosts("FLOP", rates, np.tile([float(core_flops(work, rate)) for rate in rates], (model.num_layers, 1)))


def read_costs(path: epath.PathLike, blocks: int) -> BlockCosts:
    """Measured costs: {"unit": "ms", "rates": [1, 2, 8], "blocks": [[30, 16, 6], ...]}, one row a block or one for all.

    Raises InputError naming the file and the entry.
    """
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"config.plan.costs: {path}: no such file")
    found = read_json(path)
    names = ("unit", "rates", "blocks")
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        raise InputError(f"{path}: expected an object of {', '.join(names)}, found {describe(found)}")
    if not isinstance(found["unit"], str) or not found["unit"]:
        raise InputError(f"{path}: unit: expected a name like 'ms', found {found['unit']!r}")
    if not isinstance(found["rates"], list):
        raise InputError(f"{path}: rates: expected a list, found {found['rates']!r}")
    check_rates(f"{path}: rates", found["rates"])
    if 1 not in found["rates"]:
        raise InputError(f"{path}: rates: expected 1, the teacher's, among them, found {found['rates']}")
    rows = found["blocks"]
    if isinstance(rows, list) and len(rows) == 1:
        rows = rows * blocks
    costs = BlockCosts(found["unit"], tuple(found["rates"]), table(f"{path}: blocks", rows, blocks, found["rates"]))
    if not costs.teacher > 0:
        raise InputError(f"{path}: blocks: expected a positive cost at rate 1, found 0 in every block")
    return costs


def table(source: str, rows: Any, blocks: int, rates: Sequence[Rate]) -> np.ndarray:
    """Float [blocks, rates]. Raises InputError naming the entry that is missing, not finite, negative or no number."""
    if not isinstance(rows, list) or len(rows) != blocks:
        found = f"{len(rows)} rows" if isinstance(rows, list) else repr(rows)
        raise InputError(f"{source}: expected a row for each of the model's {blocks} blocks, found {found}")
    for block, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(rates):
            expected = f"a number for each of the rates {list(rates)}"
            raise InputError(f"{source}[{block}]: expected {expected}, found {shortened(row)}")
        for column, value in enumerate(row):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= LARGEST:
                raise InputError(
                    f"{source}[{block}][{column}]: expected a non-negative number, found {shortened(value)}"
                )
    return np.array(rows, np.float64)


def describe(found: Any) -> str:
    return f"one of {', '.join(map(str, found))}" if isinstance(found, dict) else type(found).__name__


def budget_cost(budget: str | float, costs: BlockCosts) -> float:
    """The cost that a budget allows, in the costs' unit: "15R2", a share of the teacher's cost up to 1, or the cost.

    "15R2" is what 15 blocks at rate 2 and the others at softmax cost: with costs that differ by block, on average.
    """
    blocks = len(costs.blocks)
    if isinstance(budget, str):
        named = parse_block_budget(budget)
        if named is None:
            raise InputError(f"config.plan.budget: expected a number or a name like '15R2', found {budget!r}")
        count, rate = named
        if count > blocks:
            raise InputError(f"config.plan.budget: {budget} converts {count} blocks, the model has {blocks}")
        return ((blocks - count) * costs.teacher + count * math.fsum(costs.at(rate))) / blocks
    if budget <= 0:
        raise InputError(f"config.plan.budget: expected a positive number, found {budget}")
    return budget * costs.teacher if budget <= 1 else float(budget)


def one_rate(config: ConfigDict) -> tuple[int, Rate]:
    """What a homogeneous plan, the paper's baseline, converts: (15, 2) for "15R2"."""
    budget, rates = config.plan.budget, tuple(config.plan.rates)
    named = parse_block_budget(budget) if isinstance(budget, str) else None
    if named is None or named[1] not in rates:
        expected = f"homogeneous plans take a name like '15R2' with a rate of {rates}"
        raise InputError(f"config.plan.budget: {expected}, found {budget!r}")
    return named


def check_budget(config: ConfigDict, model: WanConfig) -> None:
    """Raises InputError when no plan fits the budget: before any long work starts."""
    if config.plan.selection == "homogeneous":
        one_rate(config)
    named, rates = parse_block_budget(str(config.plan.budget)), {*config.plan.rates, *config.hybrid.rates}
    if named is not None and named[1] not in rates:
        known = ", ".join(map(str, sorted(rates, key=str)))
        raise InputError(f"config.plan.budget: expected one of the rates {known}, found {config.plan.budget!r}")
    costs = block_costs(config, model)
    budget = budget_cost(config.plan.budget, costs)
    cheapest = math.fsum(np.min([costs.at(rate) for rate in config.plan.rates], axis=0))
    if budget < cheapest * (1 - COST_TOLERANCE):
        raise InputError(
            f"config.plan.budget: {config.plan.budget} allows {budget:.4g} {costs.unit} of attention, the cheapest "
            f"plan of rates {tuple(config.plan.rates)} takes {cheapest:.4g} (a share of {cheapest / costs.teacher:.3f})"
        )


@dataclass(frozen=True)
class PlanningProblem:
    """What the planner chooses from: `errors` and `candidate_costs` are [blocks, rates]."""

    rates: tuple[Rate, ...]
    errors: np.ndarray
    costs: BlockCosts

    @property
    def candidate_costs(self) -> np.ndarray:
        return np.stack([self.costs.at(rate) for rate in self.rates], axis=1)

    def error_of(self, rates: Sequence[Rate]) -> float:
        """The total error of a plan; rate 1 has none, whether it is a candidate or not."""
        column = {rate: i for i, rate in enumerate(self.rates)}
        return math.fsum(self.errors[block, column[rate]] for block, rate in enumerate(rates) if rate in column)

    def homogeneous(self, count: int, rate: Rate) -> list[Rate]:
        """The plan that converts the `count` blocks which one rate harms least, and no others."""
        converted = select_homogeneous(self.errors, self.rates.index(rate), count)
        return [rate if block in converted else 1 for block in range(len(self.errors))]


def read_problem(config: ConfigDict, model: WanConfig, distilled: epath.Path) -> PlanningProblem:
    """Raises InputError for a rate that was not distilled, and for an error or a cost that is missing or no number."""
    found, rates = read_errors(distilled), tuple(config.plan.rates)
    column = {rate: i for i, rate in enumerate(found["rates"])}
    if unknown := [rate for rate in rates if rate != 1 and rate not in column]:
        raise InputError(f"config.plan.rates: rate {unknown[0]} was not distilled, only {found['rates']} were")
    name, path = ERRORS[config.plan.errors], distilled / "errors.json"
    if name not in found:
        raise InputError(
            f"{path}: {name}: expected those that config.plan.errors={config.plan.errors} adds up, found none"
        )
    measured = table(f"{path}: {name}", found[name], model.num_layers, found["rates"])
    softmax = np.zeros(model.num_layers)
    errors = np.stack([softmax if rate == 1 else measured[:, column[rate]] for rate in rates], axis=1)
    return PlanningProblem(rates, errors, block_costs(config, model))


def plan(config: ConfigDict, model: WanConfig, distilled: epath.Path, folder: epath.Path) -> None:
    """Leaves `plan.json` in `folder`: the rate of every block, cost and error in all, and the bound on the error.

    Costs in FLOPs are there in any case; where they are measured, the budget in FLOPs is the same share of the
    teacher's, and `measured` has the costs themselves.
    """
    given = read_problem(config, model, distilled)
    costs, budget = given.costs, budget_cost(config.plan.budget, given.costs)
    bound = None
    if config.plan.selection == "heterogeneous":
        solution = solve(given.errors, given.candidate_costs, budget)
        chosen, bound = [given.rates[i] for i in solution.indices], solution.lower_bound
    else:
        chosen = given.homogeneous(*one_rate(config))
    work = workload(config, model)
    teacher = model.num_layers * core_flops(work, 1)
    flops = sum(core_flops(work, rate) for rate in chosen)
    result = {
        "rates": chosen,
        "selection": config.plan.selection,
        "errors": config.plan.errors,
        "budget": config.plan.budget,
        "budget_flops": budget / costs.teacher * teacher if config.plan.costs else budget,
        "cost_flops": flops,
        "teacher_flops": teacher,
        "share_of_teacher": flops / teacher,
        "error": given.error_of(chosen),
        "error_bound": bound,
    }
    if config.plan.costs:
        measured = {"budget": budget, "cost": costs.of(chosen), "teacher": costs.teacher}
        result["measured"] = {"unit": costs.unit, **measured, "share_of_teacher": measured["cost"] / costs.teacher}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", result)


def write_pareto_front(
    config: ConfigDict, model: WanConfig, distilled: epath.Path, folder: epath.Path
) -> dict[str, Any]:
    """Leaves `front.json` beside `plan.json`: every plan that none beats in both cost and error, and the chosen one.

    `chosen` stands next to the nearest plans of the front that cost less and more (None at its ends). `error_bound` is
    that of the linear relaxation at the plan's budget, `optimum` the exact least error there; a plan that reaches it is
    proven optimal. Returns the content.
    """
    given, made = read_problem(config, model, distilled), read_plan(folder)
    costs, chosen = given.costs, made["rates"]
    curve = pareto_front(given.errors, given.candidate_costs)

    def described(rates: Sequence[Rate]) -> dict[str, Any]:
        cost = costs.of(rates)
        error = given.error_of(rates)
        return {"cost": cost, "share_of_teacher": cost / costs.teacher, "error": error, "rates": list(rates)}

    plans = [described([given.rates[i] for i in indices]) for indices in curve.indices]
    this = described(chosen)
    slack = COST_TOLERANCE * this["cost"]
    cheaper = [found for found in plans if found["cost"] < this["cost"] - slack]
    dearer = [found for found in plans if found["cost"] > this["cost"] + slack]
    allowed = max(this["cost"], budget_cost(config.plan.budget, costs))
    optimum = solve(given.errors, given.candidate_costs, allowed)
    result = {
        "unit": costs.unit,
        "candidates": list(given.rates),
        "teacher_cost": costs.teacher,
        "plans": plans,
        "chosen": {
            **this,
            "selection": made["selection"],
            "budget": made["budget"],
            "budget_cost": allowed,
            "error_bound": optimum.lower_bound,
            "optimum": optimum.error,
            "proven_optimal": this["error"] <= optimum.error * (1 + COST_TOLERANCE),
            "cheaper": cheaper[-1] if cheaper else None,
            "dearer": dearer[0] if dearer else None,
        },
        "homogeneous": {
            str(rate): [described(given.homogeneous(count, rate)) for count in range(model.num_layers + 1)]
            for rate in given.rates
            if rate != 1 and 1 in given.rates
        },
    }
    write_json(folder / "front.json", result)
    return result


def read_plan(folder: epath.Path) -> dict[str, Any]:
    """The plan that `plan` left. Raises InputError for a file that is none."""
    path = folder / "plan.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; run `jsurgery plan` first")
    found = read_object(path, "the plan of `jsurgery plan`")
    rates = found.get("rates")
    if not isinstance(rates, list) or not rates:
        raise InputError(f"{path}: rates: expected one for each block, found {shortened(rates)}")
    if odd := [rate for rate in rates if rate != "linear" and (type(rate) is not int or rate < 1)]:
        raise InputError(f"{path}: rates: expected integers from 1 or 'linear', found {shortened(odd[0])}")
    for name in PLAN_NUMBERS:
        value = found.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
            raise InputError(f"{path}: {name}: expected a non-negative number, found {shortened(value)}")
    return found
