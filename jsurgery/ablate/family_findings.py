"""Findings of the bake-off that the numbers decide, as sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from jsurgery.ablate.family_bakeoff import FINETUNED, MIX
from jsurgery.ablate.family_contrasts import VELOCITY, Contrast
from jsurgery.ablate.family_plans import BUDGETS

QUESTIONS = {  # about the learned selection
    "linear": "the planner’s choice of linear blocks, beside LinVideo’s of as many, is",
    "best": "the planner’s choice of blocks of the best kind, beside LinVideo’s of as many, is",
    "mix and learned": f"{MIX}, beside LinVideo’s selection of blocks of the best kind, is",
}
OTHERS = {FINETUNED: "in velocity error after fine-tuning", "latent_rmse": "in latent RMSE", "total": "in total"}
LARGER_IS_BETTER = ("total",)
BETTER, SAME, ALIKE, WORSE = "better", "same", "alike", "worse"
WORDS = {
    BETTER: "better by more than the interval",
    SAME: "the same plan in every seed",
    ALIKE: "not different by more than the interval",
    WORSE: "worse by more than the interval",
}


def findings(contrasts: Sequence[Contrast], learned: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which family is best at each budget and whether the mix beats it; then the planner and the learned selection."""
    found = [of_the_mix({each.budget: each for each in contrasts if each.question == "mix"})]
    asked = [
        ("mix", measure, f"{text}, the mix, beside the best single family, is") for measure, text in OTHERS.items()
    ]
    asked += [(question, VELOCITY, text) for question, text in QUESTIONS.items()]
    for question, measure, text in asked:
        which = {
            each.budget: verdict(each.measures[measure], measure in LARGER_IS_BETTER)
            for each in contrasts
            if each.question == question and measure in each.measures
        }
        told = [
            f"{words} at {', '.join(budgets)}"
            for value, words in WORDS.items()
            if (budgets := [budget for budget in which if which[budget] == value])
        ]
        if told:
            found.append(f"{text} {'; '.join(told)}.")
    if learned:
        hits = sum(arm["rounded"] == arm["target"] for arm in learned)
        found.append(f"learned shares round to the number of blocks asked for in {hits} of {len(learned)} selections.")
    return found


def of_the_mix(by_budget: Mapping[str, Contrast]) -> str:
    told, verdicts = [], []
    for budget in (f"{budget:g}" for budget in BUDGETS):
        if budget not in by_budget:
            told.append(f"at {budget} no single family is there to compare")
            continue
        contrast = by_budget[budget]
        paired = contrast.measures[VELOCITY]
        verdicts.append(verdict(paired))
        told.append(
            f"at {budget} the best single family is {contrast.other}, and the mix is {WORDS[verdicts[-1]]} "
            f"({paired['difference']:+.3f} [{paired['low']:+.3f}, {paired['high']:+.3f}] points)"
        )
    wins = verdicts.count(BETTER)
    every = "at every budget" if wins == len(BUDGETS) else f"at {wins} of {len(BUDGETS)} budgets, so not at every one"
    return f"{'; '.join(told)}. The mix beats the best single family by more than the interval {every}."


def verdict(paired: Mapping[str, float], larger_is_better: bool = False) -> str:
    """A key of WORDS: on which side of zero the interval of a difference is, if on one."""
    low, high = paired["low"], paired["high"]
    if low == high == 0:
        return SAME
    if larger_is_better:
        low, high = -high, -low
    return BETTER if high < 0 else WORSE if low > 0 else ALIKE
