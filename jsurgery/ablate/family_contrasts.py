"""Paired differences of the bake-off: the mix and the best single family, the planner and the learned selection."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jsurgery.ablate.family_bakeoff import FINETUNED, LEARNED, MIX, SAMPLED
from jsurgery.evaluate.statistics import paired_difference

PERCENT = 100  # errors are shown in percent
VELOCITY = "velocity_squared"
MEASURES = (("report", VELOCITY, PERCENT), (FINETUNED, FINETUNED, PERCENT), *((each, each, 1) for each in SAMPLED))

Seeds = Sequence[Mapping[str, Any]]  # the results of `families.of_seed`
Found = Sequence[Mapping[str, Any]]  # an arm in every seed


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A paired difference, over the prompts of all seeds.

    Attributes:
      question: what it answers, a key of `family_findings.QUESTIONS`.
      budget: of the arms.
      pair: the arms, in words.
      other: what the second arm is called.
      measures: measure -> difference; see `paired_difference`.
    """

    question: str
    budget: str
    pair: str
    other: str
    measures: Mapping[str, Mapping[str, float]]

    @property
    def title(self) -> str:
        return f"{self.budget}: {self.pair}"


def arms_at(per_seed: Seeds, unit: str, budget: str, name: str) -> Found | None:
    """An arm in every seed; None where it is missing or does not reach the budget."""
    arms = [each["arms"][unit][budget].get(name, {}) for each in per_seed]
    return arms if all("rates" in arm for arm in arms) else None


def best_family(per_seed: Seeds, unit: str, budget: str) -> str | None:
    """The family with the least error on the prompts that kinds are chosen by; None if none reaches the budget."""
    names = [name for name, arm in per_seed[0]["arms"][unit][budget].items() if "choice" in arm]
    reached = {name: arms for name in names if (arms := arms_at(per_seed, unit, budget, name))}
    return min(reached, key=lambda name: np.mean([arm["choice"] for arm in reached[name]]), default=None)


def planned_alike(per_seed: Seeds, unit: str, budget: str, learned: Found) -> Found | None:
    """The planner's arm, in every seed, with the kind of a learned one."""
    found = []
    for each, rival in zip(per_seed, learned, strict=True):
        arms = each["arms"][unit][budget].values()
        found += [arm for arm in arms if "choice" in arm and arm["kind"] == rival["kind"]][:1]
    return found if len(found) == len(per_seed) else None


def contrasts_of(per_seed: Seeds, unit: str) -> list[Contrast]:
    """All differences at the budgets of a unit; those whose arms are not there are left out."""
    found = []
    for budget in per_seed[0]["arms"][unit]:
        mix, best = arms_at(per_seed, unit, budget, MIX), best_family(per_seed, unit, budget)
        if mix and best and (family := arms_at(per_seed, unit, budget, best)):
            found.append(Contrast("mix", budget, f"{MIX} − {best}", best, compare(mix, family)))
        for question, name in LEARNED.items():
            learned = arms_at(per_seed, unit, budget, name)
            planned = learned and planned_alike(per_seed, unit, budget, learned)
            if learned and planned:
                pair = f"the planner’s blocks − {name}"
                found.append(Contrast(question, budget, pair, name, compare(planned, learned)))
        learned = arms_at(per_seed, unit, budget, LEARNED["best"])
        if mix and learned:
            pair = f"{MIX} − {LEARNED['best']}"
            found.append(Contrast("mix and learned", budget, pair, LEARNED["best"], compare(mix, learned)))
    return found


def compare(first: Found, second: Found) -> dict[str, dict[str, float]]:
    """Measure -> paired difference, of the measures that both arms have in every seed."""
    found = {}
    for measure, column, factor in MEASURES:
        if all(measure in arm for arm in (*first, *second)):
            a, b = ([factor * np.array(arm[measure]) for arm in arms] for arms in (first, second))
            found[column] = paired_difference(a, b)
    return found


def learned_arms(per_seed: Seeds, unit: str) -> list[Mapping[str, Any]]:
    """All learned selections of all seeds and budgets."""
    arms = [arm for each in per_seed for found in each["arms"][unit].values() for arm in found.values()]
    return [arm for arm in arms if "target" in arm]
