"""The bake-off of families: its plans, its choices, the learned selection and its sentences, without real models."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from jsurgery.ablate import family_bakeoff, measures
from jsurgery.ablate.families import check
from jsurgery.ablate.family_bakeoff import FINETUNED, LEARNED, MIX, arms_of, measure_samples
from jsurgery.ablate.family_contrasts import VELOCITY, Contrast, best_family, contrasts_of
from jsurgery.ablate.family_errors import CHOICE, REPORT
from jsurgery.ablate.family_findings import ALIKE, BETTER, SAME, WORSE, findings, verdict
from jsurgery.ablate.family_plans import BUDGETS, Candidates, describe_plan, families, options
from jsurgery.ablate.learned_selection import STEPS, learn_selection, penalties
from jsurgery.ablate.seed_run import Model, changed
from jsurgery.errors import InputError
from jsurgery.load_config import load_config
from jsurgery.surgery.plan import BlockCosts

KINDS = (8, "linear", "C3O1", "C1O1")


def costs_of(rng: np.random.Generator, blocks: int, kinds=KINDS) -> BlockCosts:
    """Costs that differ by block, as measured ones may; the last kind costs more than softmax."""
    shares = np.concatenate([[1.0], rng.uniform(0.3, 0.9, len(kinds) - 1), [1.1]])
    return BlockCosts("ms", (1, *kinds), shares * rng.uniform(1, 2, (blocks, 1)))


@pytest.mark.parametrize("case", range(4))
def test_plans_are_the_best_within_the_budget(case):
    rng = np.random.default_rng(case)
    candidates, costs = Candidates(KINDS, rng.random((3, len(KINDS)))), costs_of(rng, 3)
    error = lambda plan: sum(candidates.errors[b, KINDS.index(kind)] for b, kind in enumerate(plan) if kind != 1)
    missed = 0
    for budget, kinds in itertools.product(BUDGETS, [KINDS, *((kind,) for kind in KINDS)]):
        every = [plan for plan in itertools.product((1, *kinds), repeat=3)]
        within = [plan for plan in every if costs.of(plan) <= budget * costs.teacher]
        found = candidates.plan(kinds, costs, budget)
        missed += not within
        assert (found is None) == (not within)
        if found is not None:
            assert found in within and error(found) == pytest.approx(min(map(error, within)))
            assert error(found) > min(map(error, every))  # softmax everywhere, which costs too much
        if kinds == KINDS:
            assert found == candidates.mix(costs, budget)
        else:
            assert candidates.single(costs, budget).get(kinds[0]) == found
    assert missed  # the last kind never fits


def test_families_are_those_of_the_kinds():
    found = families(("B3O1", "linear", 4, "S10B16", "C3O1", 2))
    assert list(found.values()) == [(2, 4), ("B3O1", "C3O1"), ("S10B16",), ("linear",)]
    assert describe_plan((1, "C3O1", 8, "C3O1")) == "1R8+2C3O1" and describe_plan((1, 1)) == "softmax"


def test_options_are_ladders_of_kinds_that_differ_in_one_field():
    found = options((2, 8, "linear", "C1O1", "C3O1", "C3O0", "B3O1", "B5O2", "S5B16", "S25B16", "S5"))
    assert {name.partition(" ")[0]: ladder for name, ladder in found.items()} == {
        "R": (2, 8),
        "Tc": ("C1O1", "C3O1"),
        "To": ("C3O0", "C3O1"),
        "causal": ("B3O1", "C3O1"),
        "share": ("S5B16", "S25B16"),
        "block": ("S5B16", "S5"),
    }


def harms(weights, pairs=()):
    """An error of shares of softmax: each block's harm, and of pairs that harm together, besides."""

    def error(shares, batch):
        lost = 1 - shares
        total = (np.array(weights) * lost**2).sum() + sum(harm * lost[a] * lost[b] for a, b, harm in pairs)
        return total * batch  # batches differ, as those of traces do

    return error


WEIGHTS = (0.03, 0.002, 0.05, 0.02, 0.004, 0.01)


@pytest.mark.parametrize(
    "error, keep",
    [
        (harms(WEIGHTS), 3),
        (harms(WEIGHTS), 1),
        (harms(WEIGHTS[::-1]), 3),  # a control: the answer is not a property of the numbers of the blocks
        (harms(WEIGHTS, [(1, 4, 0.08)]), 4),  # the two least harmful blocks must not go together
        (harms([20 * weight for weight in WEIGHTS]), 2),
    ],
)
def test_the_learned_selection_finds_the_blocks_that_brute_force_finds(error, keep):
    batches = np.random.default_rng(0).uniform(0.7, 1.3, STEPS)
    found = learn_selection(error, batches, len(batches), 6, keep)
    chosen = lambda converted: error(np.array([float(block not in converted) for block in range(6)]), 1.0)
    best = min(itertools.combinations(range(6), 6 - keep), key=chosen)
    assert tuple(found["converted"]) == best and abs(found["rounded"] - keep) <= 1
    assert found["rounded"] == sum(share >= 0.5 for share in found["shares"])


def test_penalties_are_those_of_the_paper():
    shares = np.array([0.0, 0.2, 0.5, 0.9], np.float32)
    for power in (20.0, 2.0):
        expected = (2 - 1) ** 2 + sum(1 - abs(2 * share - 1) ** power for share in shares)
        assert float(penalties(shares, 1, power)) == pytest.approx(expected, rel=1e-5)
    assert float(penalties(np.array([0.0, 1.0]), 1, 3.0)) == pytest.approx(0, abs=1e-6)


class FakeErrors:
    """Errors of plans by prompt, whose halves disagree about the kinds: a plan's error is the sum of its blocks'."""

    kinds, layers = KINDS, 3
    by_half = {CHOICE: (1.0, 3.0, 2.0, 9.0), REPORT: (5.0, 3.0, 7.0, 9.0)}  # noqa: RUF012

    def __init__(self):
        self.learned_of = []

    def blocks(self):
        block = np.array([1.0, 2.0, 3.0])[:, None]
        return {half: np.stack([block * of_kind, block * of_kind]) for half, of_kind in self.by_half.items()}

    def plans(self, plans, half):
        of_block = lambda b, kind: 0.0 if kind == 1 else (b + 1) * self.by_half[half][KINDS.index(kind)]
        total = {plan: sum(of_block(*each) for each in enumerate(plan)) for plan in plans}
        return {plan: np.array([error, error + 1.0]) for plan, error in total.items()}

    def learned(self, kind, count):
        self.learned_of.append((kind, count))
        rates = (*[1] * (3 - count), *[kind] * count)  # the most harmful blocks
        return {"shares": [], "converted": [], "rounded": 3 - count, "rates": rates}

    def of_model(self, model):
        return [model.load(), 0.0]


COSTS = BlockCosts("FLOP", (1, *KINDS), np.tile([10.0, 5.0, 4.0, 6.0, 9.5], (3, 1)))


def test_kinds_are_chosen_on_other_prompts_than_the_report():
    errors = FakeErrors()
    arms = arms_of(errors, COSTS)
    at = arms["0.8"]
    assert list(at) == ["hybrid", "chunked hybrid", "linear", MIX, LEARNED["linear"], LEARNED["best"]]
    # C1O1 does not reach .8; the least harmful blocks are the first ones.
    assert at["chunked hybrid"]["kind"] == "C3O1" and at["chunked hybrid"]["rates"] == ("C3O1", "C3O1", 1)
    assert at["hybrid"]["rates"] == (8, 8, 1) and at["hybrid"]["choice"] == 3.5  # 1 + 2, and half a point
    assert at["hybrid"]["report"] == [15.0, 16.0]
    # By the reported errors linear blocks would be best; R8 is, on the prompts to choose by.
    assert at[LEARNED["best"]]["kind"] == 8 and best_family([{"arms": {"flops": arms}}], "flops", "0.8") == "hybrid"
    assert at["linear"]["rates"] == ("linear", 1, 1) and at["linear"]["report"] == [3.0, 4.0]
    assert at[LEARNED["linear"]]["report"] == [9.0, 10.0] and at[LEARNED["best"]]["report"] == [25.0, 26.0]
    assert set(errors.learned_of) == {(8, 1), (8, 2), ("linear", 1), ("linear", 2)}
    assert arms["0.6"]["chunked hybrid"]["rates"] == ("C3O1",) * 3


def test_a_budget_that_a_family_does_not_reach_is_told():
    dear = BlockCosts("ms", (1, *KINDS), np.tile([10.0, 5.0, 4.0, 7.5, 12.0], (3, 1)))
    arms = arms_of(FakeErrors(), dear)
    assert arms["0.7"]["chunked hybrid"] == {"not_reached": 0.75} and "rates" in arms["0.8"]["chunked hybrid"]


def test_contrasts_and_findings_follow_from_the_numbers():
    per_seed = [{"arms": {"flops": arms_of(FakeErrors(), COSTS)}} for _ in range(2)]
    found = {(each.question, each.budget): each.measures[VELOCITY] for each in contrasts_of(per_seed, "flops")}
    assert {question for question, _ in found} == {"mix", "linear", "best", "mix and learned"}
    assert found["linear", "0.8"]["difference"] == 100 * (3.0 - 9.0) and verdict(found["linear", "0.8"]) == BETTER
    assert all(verdict(found["mix", f"{budget:g}"]) in (SAME, WORSE) for budget in BUDGETS)
    mix, *others = findings(contrasts_of(per_seed, "flops"), [{"rounded": 1, "target": 1}, {"rounded": 2, "target": 1}])
    assert "at 0.8 the best single family is hybrid" in mix and "at 0 of 4 budgets, so not at every one" in mix
    assert any("1 of 2 selections" in sentence for sentence in others)
    measured = {VELOCITY: {"low": -2.0, "high": -1.0, "difference": -1.5}}
    contrasts = [Contrast("mix", f"{budget:g}", "mix − linear", "linear", measured) for budget in BUDGETS]
    assert "by more than the interval at every budget." in findings(contrasts, [])[0]
    assert verdict({"low": -1.0, "high": 1.0}) == ALIKE and verdict({"low": 0.5, "high": 1.0}) == WORSE
    scored = [dataclasses.replace(each, measures=measured | {"total": measured[VELOCITY]}) for each in contrasts]
    expected = (
        "in total, the mix, beside the best single family, is worse by more than the interval at 0.9, 0.8, 0.7, 0.6."
    )
    assert expected in findings(scored, []) and expected not in findings(contrasts, [])


def test_models_after_fine_tuning_are_measured_after_half_and_all_steps(monkeypatch):
    errors = FakeErrors()
    arms = arms_of(errors, COSTS)
    loaded = []

    def models(seed, rates):
        loaded.append(rates)
        of = lambda step: Model(f"{rates}_{step}", lambda: float(step))
        return {15: of(15), 30: of(30)}

    scored = lambda seed, models: {
        **{model.name: {"latent_rmse": [model.load()], "total": [0.5]} for model in models},
        "teacher": {"latent_rmse": [0.0], "total": [1.0]},
    }
    monkeypatch.setattr(family_bakeoff, "models_of", models)
    monkeypatch.setattr(measures, "samples", scored)
    seed = type("Seed", (), {"config": load_config("tiny_families")})
    assert measure_samples(seed, errors, arms) == {"latent_rmse": [0.0], "total": [1.0]}
    assert len(loaded) == len(set(loaded))
    for name, arm in arms["0.8"].items():
        if name in LEARNED.values():
            assert "total" not in arm
        else:  # prompts of both models one after the other; errors are averaged
            assert arm["latent_rmse"] == [15.0, 30.0] and arm[FINETUNED] == [22.5, 0.0]
    json.dumps(arms)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hybrid.rates": (2,), "plan.rates": (1, 2)}, "config.hybrid.rates: expected several kinds"),
        ({"trace.holdout": 1}, "config.trace.holdout: expected at least 2 prompts"),
        ({"distill.mode": "sampling"}, "config.distill.mode: .* expected 'traces', found 'sampling'"),
        ({"finetune.schedule": "cosine"}, "config.finetune.schedule: ablations also measure before the last step"),
    ],
)
def test_bad_configs_are_refused(change, message):
    config = load_config("tiny_families")
    check(config)
    with pytest.raises(InputError, match=message):
        check(changed(config, change))
