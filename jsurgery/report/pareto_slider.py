"""The page's slider over budgets: the best plan of every budget, from the errors that distillation measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jsurgery.attention.kinds.registry import rate_key, rate_name
from jsurgery.errors import InputError
from jsurgery.rates import Rate
from jsurgery.report.charts import Chart
from jsurgery.report.cost_page import front_chart
from jsurgery.report.run_files import RunFiles
from jsurgery.surgery.knapsack import pareto_front, solve
from jsurgery.surgery.plan import PlanningProblem, read_problem
from jsurgery.wan.cost import block_flops, model_flops, workload

PLANS = 3000  # most that a page holds; a plan takes about as many bytes as the model has blocks
BUDGETS = 200  # solved separately if the front has too many plans to enumerate


def trade_off(run: RunFiles) -> tuple[dict[str, Any], Chart | None] | None:
    """(the slider's data, chart of error over cost); None without errors, a plan or the model's sizes.

    Every plan is optimal at its cost according to the planner. In the data, `plans` hold an index into `rates` for each
    block, `whole` says whether all plans of the front are there, and `chosen` is the run's own plan.
    """
    if run.config is None or run.model is None or run.errors is None or run.plan is None:
        return None
    try:
        problem = read_problem(run.config, run.model, run.workdir / "distill")
        plans, whole = optimal_plans(problem)
        chosen = plan_row(problem, run.plan["rates"])
        rates = sorted({*problem.rates, *run.plan["rates"]}, key=rate_key)
    except InputError as error:
        run.absent.append(f"The trade-off between cost and error: {error}.")
        return None
    counts = range(run.model.num_layers + 1)
    softmax = 1 in problem.rates
    homogeneous = {
        str(rate): [plan_row(problem, problem.homogeneous(count, rate)) for count in counts]
        for rate in problem.rates
        if rate != 1 and softmax
    }
    chart = front_chart({"plans": plans, "chosen": chosen, "homogeneous": homogeneous})
    work = workload(run.config, run.model)
    data = {
        "rates": [rate_name(rate) for rate in rates],
        "shares": [plan["share_of_teacher"] for plan in plans],
        "errors": [plan["error"] for plan in plans],
        "plans": [[rates.index(rate) for rate in plan["rates"]] for plan in plans],
        "chosen": {
            "share": chosen["share_of_teacher"],
            "error": chosen["error"],
            "plan": [rates.index(rate) for rate in chosen["rates"]],
        },
        "whole": whole,
        "forward": {  # FLOPs of the parts that no plan changes, and of a block at each rate
            "fixed": model_flops(work, []),
            "block": [block_flops(work, rate).total for rate in rates],
            "softmax": block_flops(work, 1).total,
        },
    }
    return data, chart


def optimal_plans(problem: PlanningProblem) -> tuple[list[dict[str, Any]], bool]:
    """(optimal plans by rising cost, whether they are the whole front)."""
    costs_BxR = problem.candidate_costs
    try:
        indices = pareto_front(problem.errors, costs_BxR).indices
    except InputError:  # with measured costs the front may not fit in memory
        low, high = costs_BxR.min(axis=1).sum(), costs_BxR.max(axis=1).sum()
        indices = np.stack([solve(problem.errors, costs_BxR, b).indices for b in np.linspace(low, high, BUDGETS)])
        return [plan_row(problem, [problem.rates[i] for i in plan]) for plan in indices], False
    kept = np.unique(np.linspace(0, len(indices) - 1, min(PLANS, len(indices))).round().astype(int))
    return [plan_row(problem, [problem.rates[i] for i in plan]) for plan in indices[kept]], len(kept) == len(indices)


def plan_row(problem: PlanningProblem, rates: Sequence[Rate]) -> dict[str, Any]:
    cost = problem.costs.of(rates)
    return {"share_of_teacher": cost / problem.costs.teacher, "error": problem.error_of(rates), "rates": list(rates)}
