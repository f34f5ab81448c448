import itertools

import numpy as np
import pytest

from jsurgery.load_config import load_config
from jsurgery.surgery.plan import BlockCosts, PlanningProblem
from jsurgery.surgery.plan_text import legend, neighbours, strip, strip_lines

RATES = (1, 2, 8, "linear")


def problem_of(blocks: int) -> PlanningProblem:
    rng = np.random.default_rng(blocks)
    costs = np.tile([30.0, 17.0, 6.0, 3.0], (blocks, 1)) + rng.uniform(0, 1, (blocks, 1))
    errors = np.concatenate([np.zeros((blocks, 1)), np.sort(rng.uniform(0.1, 1, (blocks, 3)), axis=1)], axis=1)
    return PlanningProblem(RATES, errors, BlockCosts("ms", RATES, costs))


def config_with(**fields: str):
    return load_config("tiny", {"plan.rates": str(RATES)} | {name.replace("__", "."): v for name, v in fields.items()})


@pytest.mark.parametrize("budget", ["0.2", "0.62", "0.98"])
def test_neighbours_are_the_best_plans_at_budgets_around_the_chosen_one(budget):
    problem = problem_of(5)
    plans = list(itertools.product(RATES, repeat=5))
    cost, error = ([measure(plan) for plan in plans] for measure in (problem.costs.of, problem.error_of))

    def best(share: float) -> float:
        fits = np.array(cost) <= share * problem.costs.teacher * (1 + 1e-9)
        return float(np.min(error, where=fits, initial=np.inf))

    chosen = min((p for p in plans if problem.error_of(p) == best(float(budget))), key=problem.costs.of)
    rows = list(neighbours(config_with(plan__budget=budget), problem, chosen))
    shares = [share for _, share, _ in rows]
    place = [name for name, _, _ in rows].index("chosen")
    assert shares == sorted(shares) and len(rows) >= 3 and rows[place][2] == list(chosen)
    assert place == (2 if budget == "0.62" else place) and len(rows) <= 5
    for _, share, rates in rows:
        assert problem.error_of(rates) == pytest.approx(best(share))
    assert len({tuple(rates) for *_, rates in rows}) == len(rows)


def test_neighbours_of_a_homogeneous_plan_convert_more_or_fewer_blocks():
    problem = problem_of(5)
    config = config_with(plan__budget="4R8", plan__selection="homogeneous")
    rows = list(neighbours(config, problem, problem.homogeneous(4, 8)))
    assert [name for name, _, _ in rows] == ["5R8", "chosen", "3R8", "2R8"]
    assert [rates.count(8) for *_, rates in rows] == [5, 4, 3, 2]


def test_a_strip_has_a_cell_for_each_block():
    assert strip([1, 8, "linear", 2], {1, 2, 8, "linear"}) == "S8L2"
    assert strip([1, 16, 2], {1, 2, 16}) == " S 16  2"
    assert strip_lines([1] * 60, {1}) == [f"blocks 0 to 49:  {'S' * 50}", f"blocks 50 to 59:  {'S' * 10}"]
    assert legend({8, 1, "linear"}) == (
        "S full softmax; 8 one token in 8 keeps softmax; L linear, no token keeps softmax"
    )
