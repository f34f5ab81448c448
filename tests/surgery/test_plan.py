import itertools
import json
import time

import numpy as np
import pytest
from etils import epath
from scipy.optimize import Bounds, LinearConstraint, milp

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.config import base
from jsurgery.errors import InputError
from jsurgery.surgery.plan import (
    block_costs,
    budget_cost,
    check_budget,
    plan,
    read_costs,
    read_plan,
    write_pareto_front,
)
from jsurgery.wan.cost import core_flops, workload
from jsurgery.wan.model_config import WanConfig

FOUR_BLOCKS = WanConfig(num_layers=4)
WAN_1_3B = WanConfig()
RATES = [2, 4, 8, "linear"]
ERRORS = np.array([[0.30, 0.50, 0.8, 0.9], [0.05, 0.06, 0.5, 0.8], [0.10, 0.40, 0.6, 0.6], [0.20, 0.21, 0.3, 0.7]])


def config_with(**changes):
    config = base()
    with config.ignore_type():
        config.update_from_flattened_dict({f"plan.{name}": value for name, value in changes.items()})
    return config


def write_errors(folder, velocity_errors, rates=RATES, **more):
    (folder / "errors.json").write_text(json.dumps({"rates": rates, "velocity_errors": velocity_errors, **more}))


@pytest.fixture
def distilled(tmp_path):
    folder = epath.Path(tmp_path) / "distill"
    folder.mkdir()
    write_errors(folder, ERRORS.tolist(), errors=ERRORS[::-1].tolist())
    return folder


def budget_flops(budget):
    """The FLOPs that a budget allows, for Wan2.1 1.3B at 320x480."""
    return budget_cost(budget, block_costs(config_with(budget=budget), WAN_1_3B))


def planned(distilled, **changes):
    folder = distilled.parent / "plan"
    plan(config_with(**changes), FOUR_BLOCKS, distilled, folder)
    return read_plan(folder)


def test_budgets_of_the_paper_in_flops():
    """320x480, 81 frames: 0.975 TFLOP for a softmax core, 0.547 at rate 2."""
    work = workload(base(), WAN_1_3B)
    assert work.tokens == 12600
    assert budget_flops("15R2") / 1e12 == pytest.approx(15 * 0.975 + 15 * 0.547, rel=1e-3)
    assert budget_flops("30Rlinear") / 1e12 == pytest.approx(30 * 0.079, rel=1e-2)
    assert budget_flops("0R8") == budget_flops(1) == 30 * core_flops(work, 1)
    mixed = 8 * core_flops(work, 2) + 4 * core_flops(work, "C3O1") + 18 * core_flops(work, 1)
    assert budget_flops("8R2+4C3O1") == pytest.approx(mixed)


def test_budgets_as_a_share_and_as_a_number_of_flops():
    assert budget_flops(0.6) == pytest.approx(18 * core_flops(workload(base(), WAN_1_3B), 1))
    assert budget_flops(3e13) == 3e13


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("15Q2", "a name like '15R2', found '15Q2'"),
        ("15R2x", "found '15R2x'"),
        ("31R2", "converts 31 blocks, the model has 30"),
        ("20R2+11C3O1", "converts 31 blocks, the model has 30"),
        ("15C3", "found '15C3'"),
        ("5R0", "found '5R0'"),
        (0, "positive number, found 0"),
        (-0.5, "found -0.5"),
    ],
)
def test_bad_budgets_are_refused(budget, message):
    with pytest.raises(InputError, match=message):
        budget_flops(budget)


def test_budgets_below_the_cheapest_plan_are_refused_before_any_work():
    check_budget(config_with(budget="30R8"), WAN_1_3B)  # the cheapest plan itself
    with pytest.raises(InputError, match=r"0\.1 allows .*a share of 0\.2"):
        check_budget(config_with(budget=0.1), WAN_1_3B)
    with pytest.raises(InputError, match=r"30R8 allows .* plan of rates \(1, 2\)"):
        check_budget(config_with(budget="30R8", rates=(1, 2)), WAN_1_3B)


def test_the_rate_of_a_budget_must_be_supported():
    check_budget(config_with(budget="15R4", rates=(1, 2, 8)), WAN_1_3B)
    with pytest.raises(InputError, match="expected one of the rates 1, 2, 4, 8, linear, found '6R999'"):
        check_budget(config_with(budget="6R999"), WAN_1_3B)


def test_homogeneous_plans_need_a_budget_with_a_rate():
    for budget in (0.6, "15R16", "15R2+1R4"):
        with pytest.raises(InputError, match="homogeneous plans take a name"):
            check_budget(config_with(budget=budget, selection="homogeneous"), WAN_1_3B)
    check_budget(config_with(selection="homogeneous"), WAN_1_3B)


@pytest.mark.parametrize("budget", ["4R8", "2R2", "3R4", 0.45, 0.9, 1.0])
def test_no_plan_within_the_budget_has_a_smaller_error(distilled, budget):
    found = planned(distilled, budget=budget)
    work = workload(base(), FOUR_BLOCKS)
    errors = np.column_stack([np.zeros(4), ERRORS[:, :3]])
    best = min(
        sum(errors[block, choice] for block, choice in enumerate(choices))
        for choices in itertools.product(range(4), repeat=4)
        if sum(core_flops(work, (1, 2, 4, 8)[choice]) for choice in choices) <= found["budget_flops"]
    )
    assert found["error"] == pytest.approx(best)
    assert found["error_bound"] <= found["error"]
    assert found["cost_flops"] == sum(core_flops(work, rate) for rate in found["rates"]) <= found["budget_flops"]
    assert found["share_of_teacher"] == pytest.approx(found["cost_flops"] / (4 * core_flops(work, 1)))
    assert found["error"] == pytest.approx(sum(errors[i, (1, 2, 4, 8).index(r)] for i, r in enumerate(found["rates"])))


def test_a_plan_may_be_all_linear(distilled):
    assert planned(distilled, budget="4Rlinear", rates=(1, "linear"))["rates"] == ["linear"] * 4


@pytest.mark.parametrize(
    ("budget", "rates"),
    [("1R2", [1, 2, 1, 1]), ("2R2", [1, 2, 2, 1]), ("2R4", [1, 4, 1, 4]), ("3R8", [1, 8, 8, 8]), ("0R2", [1, 1, 1, 1])],
)
@pytest.mark.parametrize("candidates", [(1, 2, 4, 8), (2, 4, 8)])
def test_a_homogeneous_plan_converts_the_blocks_of_smallest_error(distilled, budget, rates, candidates):
    found = planned(distilled, budget=budget, rates=candidates, selection="homogeneous")
    assert found["rates"] == rates
    assert found["cost_flops"] == found["budget_flops"]
    assert found["error"] == pytest.approx(sum(ERRORS[i, RATES.index(r)] for i, r in enumerate(rates) if r != 1))
    assert found["error_bound"] is None


def test_a_rate_that_was_not_distilled_is_refused(distilled):
    with pytest.raises(InputError, match=r"rate 16 was not distilled, only \[2, 4, 8, 'linear'\] were"):
        planned(distilled, budget=0.9, rates=(1, 16))


MEASURED = {"unit": "ms", "rates": [1, 2, 4, 8, "linear"], "blocks": [[9.0, 6.0, 4.0, 3.0, 2.5]]}


def costs_file(folder, **changes):
    path = folder / "costs.json"
    path.write_text(json.dumps(MEASURED | changes))
    return path


def test_plans_by_measured_costs(distilled, tmp_path):
    """2R8 allows 2 * 9 + 2 * 3 = 24 ms of the teacher's 36."""
    found = planned(distilled, budget="2R8", costs=str(costs_file(tmp_path)))
    assert found["measured"]["unit"] == "ms"
    assert found["measured"]["budget"] == 24 and found["measured"]["teacher"] == 36
    price = dict(zip(MEASURED["rates"], MEASURED["blocks"][0], strict=True))
    assert found["measured"]["cost"] == sum(price[rate] for rate in found["rates"]) <= 24
    errors = np.column_stack([np.zeros(4), ERRORS[:, :3]])
    best = min(
        sum(errors[block, choice] for block, choice in enumerate(choices))
        for choices in itertools.product(range(4), repeat=4)
        if sum(MEASURED["blocks"][0][choice] for choice in choices) <= 24
    )
    assert found["error"] == pytest.approx(best)
    assert found["cost_flops"] == sum(core_flops(workload(base(), FOUR_BLOCKS), rate) for rate in found["rates"])
    assert found["budget_flops"] / found["teacher_flops"] == pytest.approx(24 / 36)


def test_plans_by_measured_costs_that_differ_by_block(distilled, tmp_path):
    """Only block 3 is expensive, so that a budget just below the teacher's cost converts it."""
    rows = [[1.0, 0.9, 0.8, 0.7]] * 3 + [[50.0, 20.0, 10.0, 5.0]]
    path = str(costs_file(tmp_path, rates=[1, 2, 4, 8], blocks=rows))
    assert planned(distilled, budget=40, costs=path)["rates"] == [1, 1, 1, 2]
    assert planned(distilled, budget=0.3, costs=path)["rates"] == [1, 1, 1, 4]
    named = budget_cost("2R8", read_costs(path, 4))
    assert named == pytest.approx((2 * 53 + 2 * (3 * 0.7 + 5)) / 4)
    homogeneous = planned(distilled, budget="2R8", costs=path, selection="homogeneous")
    assert homogeneous["rates"] == [1, 8, 1, 8]
    assert homogeneous["measured"]["cost"] == pytest.approx(1 + 0.7 + 1 + 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [[9, 6, 4, 3]]}, r"costs.json: blocks\[0\]: expected a number for each of the rates"),
        ({"blocks": [[9, 6, 4, 3, 2]] * 3}, r"blocks: expected a row for each of the model's 4 blocks, found 3 rows"),
        ({"blocks": [[9, 6, 4, 3, 2]] * 3 + [[9, -6, 4, 3, 2]]}, r"blocks\[3\]\[1\]: .* found -6"),
        ({"blocks": [[9, 6, float("nan"), 3, 2]]}, r"blocks\[0\]\[2\]: .* found nan"),
        ({"blocks": [[9, 6, "4", 3, 2]]}, r"blocks\[0\]\[2\]: .* found '4'"),
        ({"blocks": [[0, 6, 4, 3, 2]]}, "expected a positive cost at rate 1"),
        ({"blocks": 5}, "found 5"),
        ({"rates": [1, 2, 4, 8]}, r"blocks\[0\]: expected a number for each of the rates \[1, 2, 4, 8\]"),
        ({"rates": [2, 4, 8, 16, "linear"]}, "expected 1, the teacher's, among them"),
        ({"rates": [1, 2, 4, 6, "linear"]}, "costs.json: rates: "),
        ({"rates": [1, 2, 2, 8, "linear"]}, "expected distinct rates"),
        ({"unit": 3}, "unit: expected a name like 'ms', found 3"),
        ({"device": "phone"}, "expected an object of unit, rates, blocks, found one of unit, rates, blocks, device"),
        ({"rates": [1, 2, 4], "blocks": [[9, 6, 4]]}, r"config.plan.costs: expected a cost of rate 8, found those of"),
    ],
)
def test_bad_costs_are_refused_before_any_work(tmp_path, changes, message):
    path = str(costs_file(tmp_path, **changes))
    with pytest.raises(InputError, match=message):
        check_budget(config_with(budget=0.9, costs=path), FOUR_BLOCKS)
    (tmp_path / "costs.json").write_text("{")
    with pytest.raises(InputError, match="costs.json: expected JSON"):
        read_costs(path, 4)
    with pytest.raises(InputError, match="config.plan.costs: .* no such file"):
        read_costs(tmp_path / "none.json", 4)


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (
            ERRORS[:3].tolist(),
            r"errors.json: velocity_errors: expected a row for each of the model's 4 blocks, found 3 rows",
        ),
        ([*ERRORS[:3].tolist(), [0.1, 0.2, float("nan"), 1]], r"errors\[3\]\[2\]: .* found nan"),
        ([*ERRORS[:3].tolist(), [0.1, 0.2]], r"errors\[3\]: expected a number for each"),
        ([[-0.1, 0.2, 0.3, 0.4], *ERRORS[1:].tolist()], r"errors\[0\]\[0\]: .* found -0.1"),
    ],
)
def test_bad_errors_are_refused(distilled, errors, message):
    write_errors(distilled, errors, errors=ERRORS.tolist())
    with pytest.raises(InputError, match=message):
        planned(distilled)


def test_plans_by_velocity_or_by_attention_errors(distilled):
    """The attention errors have the opposite order of blocks, and so has their plan."""
    plans = [planned(distilled, budget=2.5 / 4, errors=name) for name in ("velocity", "attention")]
    for name, found, errors in zip(("velocity", "attention"), plans, (ERRORS, ERRORS[::-1]), strict=True):
        column = {1: None, 2: 0, 4: 1, 8: 2}
        total = sum(errors[block, column[rate]] for block, rate in enumerate(found["rates"]) if rate != 1)
        assert found["error"] == pytest.approx(total) and found["errors"] == name
    assert plans[0]["rates"] != plans[1]["rates"] and plans[0]["error"] == pytest.approx(plans[1]["error"])
    (distilled / "errors.json").write_text(json.dumps({"rates": RATES, "errors": ERRORS.tolist()}))
    with pytest.raises(InputError, match=r"errors.json: velocity_errors: .*config.plan.errors=velocity .*found none"):
        planned(distilled, budget=0.5)
    assert planned(distilled, budget=0.5, errors="attention")["errors"] == "attention"


def front_of(distilled, errors, rows, rates, **changes):
    """The Pareto front for errors and costs [blocks, rates], with rate 1 first."""
    write_errors(distilled, errors[:, 1:].tolist(), rates=rates[1:], errors=[])
    path = str(costs_file(distilled.parent, rates=rates, blocks=rows))
    config = config_with(costs=path, rates=tuple(rates), **changes)
    model, folder = WanConfig(num_layers=len(errors)), distilled.parent / "plan"
    plan(config, model, distilled, folder)
    return write_pareto_front(config, model, distilled, folder)


@pytest.mark.parametrize("seed", range(30))
def test_the_front_contains_all_undominated_plans(distilled, seed):
    """Costs and errors are small integers, so that many are equal. Costs differ by block in two of three cases."""
    rng = np.random.default_rng(seed)
    blocks, rates = int(rng.integers(1, 5)), [1, 2, 4][: rng.integers(2, 4)]
    errors = rng.integers(0, 5, (blocks, len(rates))) / 4
    errors[:, 0] = 0
    rows = rng.integers(0, 6, (blocks if seed % 3 else 1, len(rates)))
    rows[:, 0] += 1
    costs = np.broadcast_to(rows, errors.shape)
    cheapest = costs.min(axis=1).sum() / costs[:, 0].sum()
    budget = cheapest + (1 - cheapest) * (1 - rng.random())
    found = front_of(distilled, errors, rows.tolist(), rates, budget=float(budget))

    every = list(itertools.product(range(len(rates)), repeat=blocks))
    totals = [(sum(costs[range(blocks), list(c)]), sum(errors[range(blocks), list(c)])) for c in every]
    expected = [
        total
        for total in sorted(set(totals))
        if not any(c <= total[0] and e <= total[1] and (c, e) != total for c, e in totals)
    ]
    assert [(one["cost"], one["error"]) for one in found["plans"]] == expected
    for one in found["plans"]:
        indices = [rates.index(rate) for rate in one["rates"]]
        assert (costs[range(blocks), indices].sum(), errors[range(blocks), indices].sum()) == (
            one["cost"],
            one["error"],
        )
    chosen = found["chosen"]
    assert chosen["proven_optimal"] and chosen["error"] == min(e for c, e in totals if c <= chosen["budget_cost"])
    assert chosen["error_bound"] <= chosen["error"] * (1 + 1e-12)
    position = expected.index((chosen["cost"], chosen["error"]))
    neighbour = lambda one: one and (one["cost"], one["error"])
    assert neighbour(chosen["cheaper"]) == (expected[position - 1] if position else None)
    assert neighbour(chosen["dearer"]) == (expected[position + 1] if position + 1 < len(expected) else None)
    for plans in found["homogeneous"].values():
        assert len(plans) == blocks + 1
        for one in plans:
            assert min(e for c, e in expected if c <= one["cost"]) <= one["error"]


def test_the_front_has_one_of_several_equal_plans(distilled):
    found = front_of(distilled, np.array([[0, 0.5], [0, 0.5]]), [[2, 1]], [1, 2], budget=0.75)
    assert [(one["cost"], one["error"]) for one in found["plans"]] == [(2, 1), (3, 0.5), (4, 0)]
    assert found["plans"][1]["rates"] == [1, 2]


def test_a_homogeneous_plan_above_the_optimum_is_not_called_optimal(distilled):
    errors = np.array([[0, 0.4, 0.5], [0, 0.4, 0.5], [0, 0.4, 3.0]])
    found = front_of(distilled, errors, [[4, 2, 1]], [1, 2, 4], budget="3R2", selection="homogeneous")
    chosen = found["chosen"]
    assert chosen["error"] == pytest.approx(1.2) and chosen["optimum"] == pytest.approx(1.0)
    assert not chosen["proven_optimal"] and chosen["error_bound"] <= 1.0


def test_the_front_of_30_blocks_and_5_rates_is_that_of_integer_programming(distilled):
    rates = [1, *RATES]
    errors = np.sort(np.random.default_rng(7).gamma(1.0, 0.1, (30, 5)), axis=1)
    errors[:, 0] = 0
    row = [core_flops(workload(base(), WAN_1_3B), rate) / 1e12 for rate in rates]
    began = time.process_time()
    found = front_of(distilled, errors, [row], rates, budget="15R2")
    assert time.process_time() - began < 2
    costs, totals = np.tile(row, (30, 1)), np.array([(one["cost"], one["error"]) for one in found["plans"]])
    choose_one = LinearConstraint(np.kron(np.eye(30), np.ones(5)), lb=1, ub=1)
    for budget in np.linspace(totals[0, 0], totals[-1, 0], 22)[1:-1]:
        reference = milp(
            errors.ravel(),
            integrality=np.ones(errors.size),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(costs.ravel()[None], ub=budget), choose_one],
            options={"mip_rel_gap": 0},
        )
        best = totals[totals[:, 0] <= budget * (1 + 1e-9)][-1, 1]
        assert best == pytest.approx(reference.fun, abs=1e-7)


def test_missing_files_name_the_command_to_run(tmp_path):
    folder = epath.Path(tmp_path)
    with pytest.raises(InputError, match=r"errors.json: no such file; run `jsurgery distill`"):
        plan(config_with(), FOUR_BLOCKS, folder, folder)
    with pytest.raises(InputError, match=r"plan.json: no such file; run `jsurgery plan`"):
        read_plan(folder)


def test_a_hybrid_keeps_the_chain_of_all_distilled_rates():
    """The order of the tokens must be that of the distillation, whichever rates the plan uses."""
    config = base()
    config.hybrid.stabilizer, config.hybrid.degree = "max", 3
    hybrid = HybridConfig.of(config, [1, 4, 1])
    assert hybrid.rates == (1, 4, 1) and hybrid.chain == (1, 2, 4, 8)
    assert hybrid.stabilizer == "max" and hybrid.feature_map.degree == 3
