import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from jsurgery.errors import InputError
from jsurgery.surgery.knapsack import pareto_front, select_homogeneous, solve, solve_block_rates

# One block at 320x480, 81 frames: rates 1, 2, 4, 8, linear.
CORE_TERAFLOPS = np.array([0.975, 0.547, 0.313, 0.196, 0.079])


def eighths(rng, shape, high):
    """Random multiples of 1/8, whose sums are exact and often equal."""
    return rng.integers(0, high, shape) / 8


def every_plan(errors, costs):
    plans = np.array(list(itertools.product(range(errors.shape[1]), repeat=len(errors))))
    blocks = np.arange(len(errors))
    return plans, errors[blocks, plans].sum(1), costs[blocks, plans].sum(1)


def brute_force(errors, costs, budget):
    """All optimal plans [plans, blocks], sorted by cost, then lexicographically; none if the budget is too small."""
    plans, plan_errors, plan_costs = every_plan(errors, costs)
    feasible = (plan_costs <= budget) & np.isfinite(plan_errors)
    if not feasible.any():
        return plans[:0]
    best = feasible & (plan_errors == plan_errors[feasible].min())
    return plans[best][np.argsort(plan_costs[best], kind="stable")]


def small_instance(seed):
    rng = np.random.default_rng(seed)
    shape = (rng.integers(1, 6), rng.integers(1, 5))
    errors, costs = (eighths(rng, shape, 8), eighths(rng, shape, 8)) if seed % 4 else rng.random((2, *shape))
    if seed % 4 == 1:
        costs[:] = costs[0]
    if seed % 4 == 2:
        errors[rng.random(shape) < 0.2] = np.inf
    total = costs.max(1).sum()
    budget = {0: 0.0, 1: total}.get(seed % 10, np.floor(8 * rng.uniform(0, total)) / 8)
    return errors, costs, budget


@pytest.mark.parametrize("seed", range(200))
def test_solution_equals_brute_force(seed):
    errors, costs, budget = small_instance(seed)
    best = brute_force(errors, costs, budget)
    if not len(best):
        with pytest.raises(InputError, match=r"below the cheapest plan|no rate that is finite"):
            solve_block_rates(errors, costs, budget)
        return
    solution = solve(errors, costs, budget)
    np.testing.assert_array_equal(solution.indices, best[0])
    blocks = np.arange(len(errors))
    assert solution.error == pytest.approx(errors[blocks, best[0]].sum(), rel=1e-12)
    assert solution.cost == pytest.approx(costs[blocks, best[0]].sum(), rel=1e-12)
    assert solution.lower_bound <= solution.error


def test_control_small_instances_include_ties_and_infeasible_budgets():
    counts = np.array([len(brute_force(*small_instance(seed))) for seed in range(200)])
    assert (counts == 0).sum() >= 20
    assert (counts > 1).sum() >= 20
    assert (counts == 1).sum() >= 50


@pytest.mark.parametrize("rates", [5, 12])
@pytest.mark.parametrize("seed", range(20))
def test_solution_equals_integer_programming(seed, rates):
    rng = np.random.default_rng(1000 + seed)
    blocks = rng.integers(30, 41)
    errors, costs = rng.random((2, blocks, rates))
    if seed % 2:  # as in a real model, where higher cost means a smaller error
        errors, costs = np.sort(errors, axis=1), -np.sort(-costs, axis=1)
    low, high = costs.min(1).sum(), costs.max(1).sum()
    budget = low + rng.uniform(0.05, 0.9) * (high - low)

    reference = milp(
        errors.ravel(),
        integrality=np.ones(errors.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(costs.ravel()[None], ub=budget),
            LinearConstraint(np.kron(np.eye(blocks), np.ones(rates)), lb=1, ub=1),
        ],
        options={"mip_rel_gap": 0},
    )
    solution = solve(errors, costs, budget)
    assert solution.error == pytest.approx(reference.fun, abs=1e-9)
    assert solution.cost <= budget * (1 + 1e-9)
    assert solution.cost == pytest.approx(costs[np.arange(blocks), solution.indices].sum())
    relaxed = milp(
        errors.ravel(),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(costs.ravel()[None], ub=budget * (1 + 1e-9)),
            LinearConstraint(np.kron(np.eye(blocks), np.ones(rates)), lb=1, ub=1),
        ],
    )
    assert solution.lower_bound == pytest.approx(relaxed.fun, abs=1e-7)


@pytest.fixture
def model_errors():
    errors = np.sort(np.random.default_rng(7).gamma(1.0, 0.1, (30, 5)), axis=1)
    errors[:, 0] = 0.0
    return errors


def test_error_never_grows_with_the_budget(model_errors):
    costs = np.tile(CORE_TERAFLOPS, (30, 1))
    solutions = [solve(model_errors, costs, budget) for budget in np.linspace(2.37, 29.25, 40)]
    totals = [solution.error for solution in solutions]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1] == 0.0
    assert (solutions[-1].indices == 0).all()


def test_two_rates_give_the_homogeneous_plan(model_errors):
    costs = np.tile(CORE_TERAFLOPS[[0, 3]], (30, 1))
    budget = 15 * CORE_TERAFLOPS[0] + 15 * CORE_TERAFLOPS[3]
    indices = solve_block_rates(model_errors[:, [0, 3]], costs, budget)
    np.testing.assert_array_equal(np.flatnonzero(indices), select_homogeneous(model_errors, 3, 15))


def test_ties_go_to_the_cheaper_plan_then_to_the_lower_index():
    np.testing.assert_array_equal(solve_block_rates([[1, 1, 1]], [[3, 2, 2]], 9), [1])
    np.testing.assert_array_equal(solve_block_rates([[0, 1], [0, 1]], [[1, 0], [1, 0]], 1), [0, 1])
    # Sums of the same numbers are ties, too, although their order changes the floating-point result.
    errors, costs = np.tile([0.1, 0.2, 0.7], (6, 1)), np.tile([3, 1, 0], (6, 1))
    assert 0.1 + 0.2 + 0.2 + 0.2 + 0.2 + 0.2 != 0.2 + 0.2 + 0.2 + 0.2 + 0.2 + 0.1
    np.testing.assert_array_equal(solve_block_rates(errors, costs, 8), [0, 1, 1, 1, 1, 1])


def test_budgets_allow_for_rounding_errors():
    costs, errors = np.full((10, 2), [0.1, 0.0]), np.full((10, 2), [0.0, 1.0])
    assert (solve_block_rates(errors, costs, sum([0.1] * 10)) == 0).all()
    assert (solve_block_rates(errors, costs, 1.0 - 1e-10) == 0).all()
    assert (solve_block_rates(errors, costs, 1.0 - 1e-8) == 0).sum() == 9
    cheapest = np.random.default_rng(3).random((33, 1))
    assert (solve_block_rates(np.ones((33, 1)), cheapest, cheapest.sum()) == 0).all()


def test_a_large_budget_gives_every_block_its_smallest_error():
    rng = np.random.default_rng(5)
    errors, costs = rng.random((2, 37, 5))
    for budget in (costs.max(1).sum(), 1e9, np.inf):
        np.testing.assert_array_equal(solve_block_rates(errors, costs, budget), errors.argmin(1))


def test_a_huge_error_does_not_change_the_plan():
    rng = np.random.default_rng(6)
    errors, costs = rng.random((2, 5, 3))
    budget = costs.mean(1).sum()
    expected = solve_block_rates(errors, costs, budget)
    np.testing.assert_array_equal(expected, brute_force(errors, costs, budget)[0])
    with_huge = np.append(errors, np.full((5, 1), 1e30), axis=1)
    free = np.append(costs, np.zeros((5, 1)), axis=1)
    np.testing.assert_array_equal(solve_block_rates(with_huge, free, budget), expected)


def test_infinite_error_excludes_a_rate():
    np.testing.assert_array_equal(solve_block_rates([[np.inf, 5.0]], [[1.0, 2.0]], 2.0), [1])
    with pytest.raises(InputError, match="block 1 has no rate"):
        solve_block_rates([[1.0, 1.0], [np.inf, np.inf]], np.ones((2, 2)), 5)
    with pytest.raises(InputError, match="budget: 1 is below the cheapest plan, which costs 2"):
        solve_block_rates([[np.inf, 5.0]], [[1.0, 2.0]], 1.0)


@pytest.mark.parametrize(
    "errors, costs, budget, message",
    [
        ([[1, 1]], [[3, 2]], 1.5, "budget: 1.5 is below the cheapest plan, which costs 2"),
        ([[1, 1]], [[3, 2]], 0, "budget: 0 is below the cheapest plan"),
        ([[1, 1]], [[3, 2]], -1, "budget: expected a number of at least 0, found -1"),
        ([[1, 1]], [[3, 2]], float("nan"), "budget: expected a number"),
        ([[1, 1], [1, float("nan")]], np.ones((2, 2)), 5, "errors: .* found nan at block 1, rate index 1"),
        ([[1, 1]], [[3, -2]], 5, "costs: .* found -2.0 at block 0, rate index 1"),
        ([[1, 1]], [[3, 2, 1]], 5, r"found \(1, 2\) and \(1, 3\)"),
        ([1, 1], [3, 2], 5, r"expected the same \[blocks, rates\]"),
        (np.ones((0, 2)), np.ones((0, 2)), 5, r"expected the same \[blocks, rates\]"),
    ],
)
def test_bad_arguments_are_refused(errors, costs, budget, message):
    with pytest.raises(InputError, match=message):
        solve_block_rates(errors, costs, budget)


def test_too_many_partial_plans_raise_an_error(monkeypatch):
    monkeypatch.setattr("jsurgery.surgery.knapsack.MAX_PARTIAL_PLANS", 1000)
    costs = np.random.default_rng(0).random((40, 5))
    with pytest.raises(InputError, match="round the costs"):
        solve_block_rates(1 - costs, costs, 0.4 * costs.sum() / 5)


@pytest.mark.parametrize("seed", range(10))
def test_pareto_front_contains_all_undominated_plans(seed):
    rng = np.random.default_rng(seed)
    errors = eighths(rng, (5, 3), 20)
    costs = np.tile(eighths(rng, 3, 12), (5, 1))
    front = pareto_front(errors, costs)
    _, plan_errors, plan_costs = every_plan(errors, costs)
    expected = [
        (cost, error)
        for cost, error in sorted(set(zip(plan_costs, plan_errors, strict=True)))
        if not ((plan_costs <= cost) & (plan_errors <= error) & ((plan_costs < cost) | (plan_errors < error))).any()
    ]
    assert list(zip(front.costs, front.errors, strict=True)) == expected
    for cost, indices in zip(front.costs, front.indices, strict=True):
        np.testing.assert_array_equal(indices, brute_force(errors, costs, cost)[0])


def test_pareto_front_agrees_with_the_solver_at_full_size(model_errors):
    costs = np.tile(CORE_TERAFLOPS, (30, 1))
    front = pareto_front(model_errors, costs)
    assert len(front.costs) > 100
    assert (np.diff(front.costs) > 0).all() and (np.diff(front.errors) < 0).all()
    for row in range(0, len(front.costs), 25):
        np.testing.assert_array_equal(solve_block_rates(model_errors, costs, front.costs[row]), front.indices[row])


def test_homogeneous_selection_takes_the_smallest_errors():
    errors = np.array([[0, 0.3], [0, 0.1], [0, 0.2], [0, 0.1], [0, np.inf]])
    np.testing.assert_array_equal(select_homogeneous(errors, 1, 2), [1, 3])
    np.testing.assert_array_equal(select_homogeneous(errors, 1, 3), [1, 2, 3])
    np.testing.assert_array_equal(select_homogeneous(errors, 0, 2), [0, 1])
    assert len(select_homogeneous(errors, 1, 0)) == 0
    with pytest.raises(InputError, match="num_blocks: expected 0 to 4"):
        select_homogeneous(errors, 1, 5)
    with pytest.raises(InputError, match="rate_index: expected 0 to 1, found 2"):
        select_homogeneous(errors, 2, 1)
