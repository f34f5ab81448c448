"""A plan as text: a strip with a cell for each block, and the plans at somewhat smaller and larger budgets."""

from collections.abc import Iterator, Sequence

from etils import epath
from ml_collections import ConfigDict

from jsurgery.attention.kinds.registry import kind_of, rate_key
from jsurgery.rates import Rate
from jsurgery.surgery.knapsack import COST_TOLERANCE, solve
from jsurgery.surgery.plan import PlanningProblem, budget_cost, one_rate, read_plan, read_problem
from jsurgery.wan.model_config import WanConfig

STEP = 0.05  # of the teacher's cost, from one budget to the next
EACH_SIDE = 2  # plans that are shown on each side of the chosen one
ROW = 50  # cells in a line of the strip


def plan_lines(config: ConfigDict, model: WanConfig, distilled: epath.Path, folder: epath.Path) -> list[str]:
    """Lines: the plan of `folder` as a strip, a legend, and a table of the plan between its neighbours.

    distilled: the folder of the stage `distill`, with the errors of every block and rate.
    """
    plan, problem = read_plan(folder), read_problem(config, model, distilled)
    rates = plan["rates"]
    converted, share = sum(rate != 1 for rate in rates), problem.costs.of(rates) / problem.costs.teacher
    rows = [
        (name, f"{cost:.1%}", f"{problem.costs.of(near) / problem.costs.teacher:.1%}", error(problem, near), near)
        for name, cost, near in neighbours(config, problem, rates)
    ]
    shown: set[Rate] = {rate for *_, near in rows for rate in near}
    table = [
        ("", "budget", "cost", "predicted error", "plan"),
        *((name, cost, spent, wrong, strip(near, shown)) for name, cost, spent, wrong, near in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        f"plan: {converted} of {len(rates)} blocks converted, {share:.1%} of the teacher's attention cost",
        *strip_lines(rates, shown),
        legend(shown),
        "",
        f"neighbours, costs as shares of the teacher's ({problem.costs.unit}):",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table),
    ]


def error(problem: PlanningProblem, rates: Sequence[Rate]) -> str:
    return f"{problem.error_of(rates):.4g}"


def neighbours(
    config: ConfigDict, problem: PlanningProblem, chosen: Sequence[Rate]
) -> Iterator[tuple[str, float, list[Rate]]]:
    """(name, budget as a share of the teacher's cost, plan) by rising budget, the chosen plan in the middle.

    Budgets go by steps of 5 % of the teacher's cost, those of homogeneous plans by one block. Budgets that lead to the
    same plan as a nearer one are left out.
    """
    yield from reversed(list(one_side(config, problem, chosen, -1)))
    yield "chosen", budget_cost(config.plan.budget, problem.costs) / problem.costs.teacher, list(chosen)
    yield from one_side(config, problem, chosen, +1)


def one_side(
    config: ConfigDict, problem: PlanningProblem, chosen: Sequence[Rate], sign: int
) -> Iterator[tuple[str, float, list[Rate]]]:
    """The neighbours with smaller (-1) or larger (+1) budgets, the nearest first."""
    costs, known = problem.costs, [list(chosen)]
    if config.plan.selection == "homogeneous":
        count, rate = one_rate(config)
        for number in (count - sign * step for step in range(1, EACH_SIDE + 1)):
            if 0 <= number <= len(chosen):
                rates = problem.homogeneous(number, rate)
                yield f"{number}{kind_of(rate).plan_name}", costs.of(rates) / costs.teacher, rates
        return
    cheapest = problem.candidate_costs.min(axis=1).sum()
    budget = budget_cost(config.plan.budget, costs)
    while len(known) <= EACH_SIDE:
        budget += sign * STEP * costs.teacher
        if budget < cheapest * (1 - COST_TOLERANCE) or budget > costs.teacher * (1 + STEP):
            return
        rates = [problem.rates[i] for i in solve(problem.errors, problem.candidate_costs, budget).indices]
        if rates not in known:
            known.append(rates)
            yield "", budget / costs.teacher, rates


def strip_lines(rates: Sequence[Rate], shown: set[Rate]) -> list[str]:
    """The strip in lines of `ROW` cells, each with the numbers of its first and last block."""
    lines = []
    for first in range(0, len(rates), ROW):
        cells = rates[first : first + ROW]
        lines.append(f"blocks {first} to {first + len(cells) - 1}:  {strip(cells, shown)}")
    return lines


def strip(rates: Sequence[Rate], shown: set[Rate]) -> str:
    """One cell a block. Cells are as wide as the longest of the rates `shown`, such as 16, and then apart."""
    width = max(len(cell(rate)) for rate in shown)
    return ("" if width == 1 else " ").join(cell(rate).rjust(width) for rate in rates)


def cell(rate: Rate) -> str:
    return kind_of(rate).cell


def legend(shown: set[Rate]) -> str:
    return "; ".join(f"{cell(rate)} {kind_of(rate).description}" for rate in sorted(shown, key=rate_key))
