"""The trade-off between a plan's cost and its error, for a slider: the best plan of every budget."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jsurgery.errors import InputError
from jsurgery.rates import Rate, rate_key, rate_name
from jsurgery.report.charts import Chart
from jsurgery.report.cost_page import front_chart
from jsurgery.report.run_files import RunFiles
from jsurgery.surgery.knapsack import pareto_front, solve
from jsurgery.surgery.plan import PlanningProblem, read_problem
from jsurgery.wan.cost import block_flops, model_flops, workload

PLANS = 3000  # of the front in a page at most; one is about as many bytes as the model has blocks
BUDGETS = 200  # solved one by one where the front has more plans than can be counted


def trade_off(run: RunFiles) -> tuple[dict[str, Any], Chart | None] | None:
    """(what the slider needs, error over cost); None without errors, a plan or the model's sizes.

    Every plan is the optimum at its cost, by the planner itself. `plans` have an index into `rates` for each block;
    `whole` says that no plan of the front is missing. `chosen` is the run's own plan.
    """
    if run.config is None or run.model is None or run.errors is None or run.plan is None:
        return None
    try:
        given = read_problem(run.config, run.model, run.workdir / "distill")
        plans, whole = optimal_plans(given)
        chosen = plan_row(given, run.plan["rates"])
        rates = sorted({*given.rates, *run.plan["rates"]}, key=rate_key)
    except InputError as error:
        run.absent.append(f"What trades against the errors: {error}.")
        return None
    counts = range(run.model.num_layers + 1)
    softmax = 1 in given.rates
    homogeneous = {
        str(rate): [plan_row(given, given.homogeneous(count, rate)) for count in counts]
        for rate in given.rates
        if rate != 1 and softmax
    }
    chart = front_chart({"plans": plans, "chosen": chosen, "homogeneous": homogeneous})
    work = workload(run.config, run.model)
    data = {
        "rates": [rate_name(rate) for rate in rates],
        "shares": [found["share_of_teacher"] for found in plans],
        "errors": [found["error"] for found in plans],
        "plans": [[rates.index(rate) for rate in found["rates"]] for found in plans],
        "chosen": {
            "share": chosen["share_of_teacher"],
            "error": chosen["error"],
            "plan": [rates.index(rate) for rate in chosen["rates"]],
        },
        "whole": whole,
        "forward": {  # FLOPs of what no plan changes, and of a block by rate
            "fixed": model_flops(work, []),
            "block": [block_flops(work, rate).total for rate in rates],
            "softmax": block_flops(work, 1).total,
        },
    }
    return data, chart


def optimal_plans(given: PlanningProblem) -> tuple[list[dict[str, Any]], bool]:
    """(optimal plans by rising cost, whether they are all that there are)."""
    costs_BxR = given.candidate_costs
    try:
        indices = pareto_front(given.errors, costs_BxR).indices
    except InputError:  # with measured costs there may be more than fit in memory
        low, high = costs_BxR.min(axis=1).sum(), costs_BxR.max(axis=1).sum()
        indices = np.stack([solve(given.errors, costs_BxR, b).indices for b in np.linspace(low, high, BUDGETS)])
        return [plan_row(given, [given.rates[i] for i in plan]) for plan in indices], False
    kept = np.unique(np.linspace(0, len(indices) - 1, min(PLANS, len(indices))).round().astype(int))
    return [plan_row(given, [given.rates[i] for i in plan]) for plan in indices[kept]], len(kept) == len(indices)


def plan_row(given: PlanningProblem, rates: Sequence[Rate]) -> dict[str, Any]:
    cost = given.costs.of(rates)
    return {"share_of_teacher": cost / given.costs.teacher, "error": given.error_of(rates), "rates": list(rates)}
