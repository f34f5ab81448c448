"""plan: chooses the kind of every block from the errors, the costs and a budget (the paper's eq. 9)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.attention.kinds.registry import check_rate, check_rates, parse_block_budget
from jsurgery.errors import InputError, shortened
from jsurgery.io.files import read_json, read_object, write_json
from jsurgery.rates import Rate
from jsurgery.surgery.distillation.saved_maps import read_errors
from jsurgery.surgery.knapsack import COST_TOLERANCE, pareto_front, select_homogeneous, solve
from jsurgery.wan.cost import core_flops, workload
from jsurgery.wan.model_config import WanConfig

PLAN_NUMBERS = ("budget_flops", "cost_flops", "teacher_flops", "share_of_teacher", "error")
LARGEST = 1e300  # cost or error; sums of them must stay finite
ERRORS = {"attention": "errors", "velocity": "velocity_errors"}  # config.plan.errors -> what it adds up of errors.json


@dataclass(frozen=True)
class BlockCosts:
    """The cost of every block at every rate, float [blocks, rates]: FLOPs of the attention core, or measured costs."""

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
    work, block_budget = workload(config, model), parse_block_budget(str(config.plan.budget))
    needed: list[Rate] = [1, *config.plan.rates, *((rate for _, rate in block_budget) if block_budget else ())]
    rates = tuple(dict.fromkeys(needed))
    return BlockCosts("FLOP", rates, np.tile([float(core_flops(work, rate)) for rate in rates], (model.num_layers, 1)))


def read_costs(path: epath.PathLike, blocks: int) -> BlockCosts:
    """Measured costs: {"unit": "ms", "rates": [1, 2, 8], "blocks": [[30, 16, 6], ...]}, one row a block or one for all.

    Raises InputError naming the file and the entry.
    """
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"config.plan.costs: {path}: no such file")
    content = read_json(path)
    names = ("unit", "rates", "blocks")
    if not isinstance(content, dict) or sorted(content) != sorted(names):
        raise InputError(f"{path}: expected an object of {', '.join(names)}, found {describe(content)}")
    if not isinstance(content["unit"], str) or not content["unit"]:
        raise InputError(f"{path}: unit: expected a name like 'ms', found {content['unit']!r}")
    if not isinstance(content["rates"], list):
        raise InputError(f"{path}: rates: expected a list, found {content['rates']!r}")
    check_rates(f"{path}: rates", content["rates"])
    if 1 not in content["rates"]:
        raise InputError(f"{path}: rates: expected 1, the teacher's, among them, found {content['rates']}")
    rows = content["blocks"]
    if isinstance(rows, list) and len(rows) == 1:
        rows = rows * blocks
    costs = BlockCosts(
        content["unit"], tuple(content["rates"]), table(f"{path}: blocks", rows, blocks, content["rates"])
    )
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
    "8R2+4C3O1" is what 8 blocks at rate 2, 4 of the kind C3O1 and the others at softmax cost.
    """
    blocks = len(costs.blocks)
    if isinstance(budget, str):
        block_budget = parse_block_budget(budget)
        if block_budget is None:
            raise InputError(f"config.plan.budget: expected a number or a name like '15R2', found {budget!r}")
        total = sum(count for count, _ in block_budget)
        if total > blocks:
            raise InputError(f"config.plan.budget: {budget} converts {total} blocks, the model has {blocks}")
        converted = math.fsum(count * math.fsum(costs.at(rate)) for count, rate in block_budget)
        return ((blocks - total) * costs.teacher + converted) / blocks
    if budget <= 0:
        raise InputError(f"config.plan.budget: expected a positive number, found {budget}")
    return budget * costs.teacher if budget <= 1 else float(budget)


def one_rate(config: ConfigDict) -> tuple[int, Rate]:
    """The number of blocks and their kind in a homogeneous plan, the paper's baseline: (15, 2) for "15R2"."""
    budget, rates = config.plan.budget, tuple(config.plan.rates)
    block_budget = parse_block_budget(budget) if isinstance(budget, str) else None
    if block_budget is None or len(block_budget) != 1 or block_budget[0][1] not in rates:
        expected = f"homogeneous plans take a name like '15R2' with a rate of {rates}"
        raise InputError(f"config.plan.budget: {expected}, found {budget!r}")
    return block_budget[0]


def check_budget(config: ConfigDict, model: WanConfig) -> None:
    """Raises InputError if no plan fits the budget, before any long work starts."""
    if config.plan.selection == "homogeneous":
        one_rate(config)
    block_budget, rates = parse_block_budget(str(config.plan.budget)), {*config.plan.rates, *config.hybrid.rates}
    if block_budget is not None and not {rate for _, rate in block_budget} <= rates:
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
    """The input of the planner: `errors` and `candidate_costs` are [blocks, rates]."""

    rates: tuple[Rate, ...]
    errors: np.ndarray
    costs: BlockCosts

    @property
    def candidate_costs(self) -> np.ndarray:
        return np.stack([self.costs.at(rate) for rate in self.rates], axis=1)

    def error_of(self, rates: Sequence[Rate]) -> float:
        """The total error of a plan. Rate 1 has no error, whether it is a candidate or not."""
        column = {rate: i for i, rate in enumerate(self.rates)}
        return math.fsum(self.errors[block, column[rate]] for block, rate in enumerate(rates) if rate in column)

    def homogeneous(self, count: int, rate: Rate) -> list[Rate]:
        """The plan that converts to `rate` the `count` blocks that it harms least."""
        converted = select_homogeneous(self.errors, self.rates.index(rate), count)
        return [rate if block in converted else 1 for block in range(len(self.errors))]


def read_problem(config: ConfigDict, model: WanConfig, distilled: epath.Path) -> PlanningProblem:
    """The planning problem of a distillation.

    Raises InputError for a rate that was not distilled, and for an error or a cost that is missing or no number.
    """
    recorded, rates = read_errors(distilled), tuple(config.plan.rates)
    column = {rate: i for i, rate in enumerate(recorded["rates"])}
    if unknown := [rate for rate in rates if rate != 1 and rate not in column]:
        raise InputError(f"config.plan.rates: rate {unknown[0]} was not distilled, only {recorded['rates']} were")
    name, path = ERRORS[config.plan.errors], distilled / "errors.json"
    if name not in recorded:
        raise InputError(
            f"{path}: {name}: expected those that config.plan.errors={config.plan.errors} adds up, found none"
        )
    measured = table(f"{path}: {name}", recorded[name], model.num_layers, recorded["rates"])
    softmax = np.zeros(model.num_layers)
    errors = np.stack([softmax if rate == 1 else measured[:, column[rate]] for rate in rates], axis=1)
    return PlanningProblem(rates, errors, block_costs(config, model))


def plan(config: ConfigDict, model: WanConfig, distilled: epath.Path, folder: epath.Path) -> None:
    """Writes `plan.json` to `folder`: the rate of every block, the total cost and error, and a bound on the error.

    It always states costs in FLOPs. With measured costs, the budget in FLOPs is the same share of the teacher's FLOPs,
    and `measured` holds the measured costs.
    """
    problem = read_problem(config, model, distilled)
    costs, budget = problem.costs, budget_cost(config.plan.budget, problem.costs)
    bound = None
    if config.plan.selection == "heterogeneous":
        solution = solve(problem.errors, problem.candidate_costs, budget)
        chosen, bound = [problem.rates[i] for i in solution.indices], solution.lower_bound
    else:
        chosen = problem.homogeneous(*one_rate(config))
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
        "error": problem.error_of(chosen),
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
    """Writes `front.json` beside `plan.json`: every plan that no other beats in cost and error, and the chosen plan.

    `chosen` includes its neighbours on the front, `cheaper` and `dearer` (None at the ends). `error_bound` is the bound
    of the linear relaxation at the plan's budget, `optimum` the least error that is possible there. A plan that reaches
    the optimum is proven optimal. Returns the content.
    """
    problem, plan = read_problem(config, model, distilled), read_plan(folder)
    costs, chosen = problem.costs, plan["rates"]
    curve = pareto_front(problem.errors, problem.candidate_costs)

    def plan_row(rates: Sequence[Rate]) -> dict[str, Any]:
        cost = costs.of(rates)
        error = problem.error_of(rates)
        return {"cost": cost, "share_of_teacher": cost / costs.teacher, "error": error, "rates": list(rates)}

    plans = [plan_row([problem.rates[i] for i in indices]) for indices in curve.indices]
    this = plan_row(chosen)
    slack = COST_TOLERANCE * this["cost"]
    cheaper = [row for row in plans if row["cost"] < this["cost"] - slack]
    dearer = [row for row in plans if row["cost"] > this["cost"] + slack]
    allowed = max(this["cost"], budget_cost(config.plan.budget, costs))
    optimum = solve(problem.errors, problem.candidate_costs, allowed)
    result = {
        "unit": costs.unit,
        "candidates": list(problem.rates),
        "teacher_cost": costs.teacher,
        "plans": plans,
        "chosen": {
            **this,
            "selection": plan["selection"],
            "budget": plan["budget"],
            "budget_cost": allowed,
            "error_bound": optimum.lower_bound,
            "optimum": optimum.error,
            "proven_optimal": this["error"] <= optimum.error * (1 + COST_TOLERANCE),
            "cheaper": cheaper[-1] if cheaper else None,
            "dearer": dearer[0] if dearer else None,
        },
        "homogeneous": {
            str(rate): [plan_row(problem.homogeneous(count, rate)) for count in range(model.num_layers + 1)]
            for rate in problem.rates
            if rate != 1 and 1 in problem.rates
        },
    }
    write_json(folder / "front.json", result)
    return result


def read_plan(folder: epath.Path) -> dict[str, Any]:
    """The content of plan.json. Raises InputError for a file that is missing or no plan."""
    path = folder / "plan.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; run `jsurgery plan` first")
    content = read_object(path, "the plan of `jsurgery plan`")
    rates = content.get("rates")
    if not isinstance(rates, list) or not rates:
        raise InputError(f"{path}: rates: expected one for each block, found {shortened(rates)}")
    for rate in rates:
        check_rate(f"{path}: rates", rate)
    for name in PLAN_NUMBERS:
        value = content.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
            raise InputError(f"{path}: {name}: expected a non-negative number, found {shortened(value)}")
    return content
