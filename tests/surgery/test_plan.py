import itertools
import json

import numpy as np
import pytest
from etils import epath

from jsurgery.config import base
from jsurgery.cost import Workload, core_flops
from jsurgery.errors import InputError
from jsurgery.surgery.plan import budget_flops, check_budget, hybrid_config, plan, read_plan, workload
from jsurgery.wan.transformer import WanConfig

FOUR_BLOCKS = WanConfig(num_layers=4)
WAN_1_3B = WanConfig()
RATES = [2, 4, 8, "linear"]
ERRORS = np.array([[0.30, 0.50, 0.8, 0.9], [0.05, 0.06, 0.5, 0.8], [0.10, 0.40, 0.6, 0.6], [0.20, 0.21, 0.3, 0.7]])


def config_with(**changes):
    config = base()
    with config.ignore_type():
        config.update_from_flattened_dict({f"plan.{name}": value for name, value in changes.items()})
    return config


@pytest.fixture
def distilled(tmp_path):
    folder = epath.Path(tmp_path) / "distill"
    folder.mkdir()
    (folder / "errors.json").write_text(json.dumps({"rates": RATES, "errors": ERRORS.tolist()}))
    return folder


def planned(distilled, **changes):
    folder = distilled.parent / "plan"
    plan(config_with(**changes), FOUR_BLOCKS, distilled, folder)
    return read_plan(folder)


def test_the_paper_s_budget_in_the_paper_s_flops():
    """320x480, 81 frames: 0.975 TFLOP for a softmax core, 0.547 at rate 2."""
    work = workload(base(), WAN_1_3B)
    assert work.tokens == 12600
    assert budget_flops("15R2", work) / 1e12 == pytest.approx(15 * 0.975 + 15 * 0.547, rel=1e-3)
    assert budget_flops("30Rlinear", work) / 1e12 == pytest.approx(30 * 0.079, rel=1e-2)
    assert budget_flops("0R8", work) == budget_flops(1, work) == 30 * core_flops(work, 1)


def test_a_share_and_a_number_of_flops():
    work = Workload(WAN_1_3B, tokens=1000)
    assert budget_flops(0.6, work) == pytest.approx(18 * core_flops(work, 1))
    assert budget_flops(3e13, work) == 3e13


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("15Q2", "a name like '15R2', found '15Q2'"),
        ("15R2x", "found '15R2x'"),
        ("31R2", "converts 31 blocks, the model has 30"),
        ("5R0", "found 0"),
        (0, "positive number, found 0"),
        (-0.5, "found -0.5"),
    ],
)
def test_budgets_that_make_no_sense(budget, message):
    with pytest.raises(InputError, match=message):
        budget_flops(budget, Workload(WAN_1_3B, tokens=1000))


def test_a_budget_under_the_cheapest_plan_is_refused_before_any_work():
    check_budget(config_with(budget="30R8"), WAN_1_3B)  # the cheapest plan itself
    with pytest.raises(InputError, match=r"0\.1 allows .*a share of 0\.2"):
        check_budget(config_with(budget=0.1), WAN_1_3B)
    with pytest.raises(InputError, match=r"30R8 allows .* plan of rates \(1, 2\)"):
        check_budget(config_with(budget="30R8", rates=(1, 2)), WAN_1_3B)


def test_so_is_a_homogeneous_plan_without_a_rate():
    for budget in (0.6, "15R16"):
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


def test_linear_is_a_rate_like_any_other(distilled):
    assert planned(distilled, budget="4Rlinear", rates=(1, "linear"))["rates"] == ["linear"] * 4


@pytest.mark.parametrize(
    ("budget", "rates"),
    [("1R2", [1, 2, 1, 1]), ("2R2", [1, 2, 2, 1]), ("2R4", [1, 4, 1, 4]), ("3R8", [1, 8, 8, 8]), ("0R2", [1, 1, 1, 1])],
)
@pytest.mark.parametrize("candidates", [(1, 2, 4, 8), (2, 4, 8)])
def test_a_homogeneous_plan_converts_the_blocks_that_bear_it_best(distilled, budget, rates, candidates):
    found = planned(distilled, budget=budget, rates=candidates, selection="homogeneous")
    assert found["rates"] == rates
    assert found["cost_flops"] == found["budget_flops"]
    assert found["error"] == pytest.approx(sum(ERRORS[i, RATES.index(r)] for i, r in enumerate(rates) if r != 1))
    assert found["error_bound"] is None


def test_a_rate_that_was_not_distilled(distilled):
    with pytest.raises(InputError, match=r"rate 16 was not distilled, only \[2, 4, 8, 'linear'\] were"):
        planned(distilled, budget=0.9, rates=(1, 16))


def test_stages_that_have_not_run(tmp_path):
    folder = epath.Path(tmp_path)
    with pytest.raises(InputError, match=r"errors.json: no such file; run `jsurgery distill`"):
        plan(config_with(), FOUR_BLOCKS, folder, folder)
    with pytest.raises(InputError, match=r"plan.json: no such file; run `jsurgery plan`"):
        read_plan(folder)


def test_the_operation_keeps_the_chain_of_all_candidates():
    """Token zones are those of the distilled rates, whichever the plan uses."""
    config = base()
    config.hybrid.stabilizer, config.hybrid.degree = "max", 3
    hybrid = hybrid_config(config, [1, 4, 1])
    assert hybrid.rates == (1, 4, 1) and hybrid.chain == (1, 2, 4, 8)
    assert hybrid.stabilizer == "max" and hybrid.feature_map.degree == 3
