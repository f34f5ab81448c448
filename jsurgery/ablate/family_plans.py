"""The plans that families of attention compete with: of one kind in softmax blocks, and the planner's mix of all kinds.

A family is what `Kind.family` says. It is represented at a budget by the kind whose whole plan has the least error on
items that no reported error is measured on.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jsurgery.attention.kinds.registry import kind_of, rate_key
from jsurgery.rates import Rate
from jsurgery.surgery.knapsack import COST_TOLERANCE, solve
from jsurgery.surgery.plan import BlockCosts

BUDGETS = (0.9, 0.8, 0.7, 0.6)  # of the cost of the teacher's attention
Plan = tuple[Rate, ...]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Kinds with the errors [blocks, kinds] of converting one block alone; sums of them are what a plan minimises."""

    kinds: tuple[Rate, ...]
    errors: np.ndarray

    def plan(self, kinds: Sequence[Rate], costs: BlockCosts, budget: float) -> Plan | None:
        """The plan of softmax and `kinds` with the least sum of errors that costs at most `budget` of the teacher.

        None if there is none.
        """
        if cheapest_share((1, *kinds), costs) > budget * (1 + COST_TOLERANCE):
            return None
        columns = [self.kinds.index(kind) for kind in kinds]
        errors = np.concatenate([np.zeros((len(self.errors), 1)), self.errors[:, columns]], axis=1)
        choices: tuple[Rate, ...] = (1, *kinds)
        cost = np.stack([costs.at(kind) for kind in choices], axis=1)
        return tuple(choices[index] for index in solve(errors, cost, budget * costs.teacher).indices)

    def mix(self, costs: BlockCosts, budget: float) -> Plan | None:
        return self.plan(self.kinds, costs, budget)

    def single(self, costs: BlockCosts, budget: float) -> dict[Rate, Plan]:
        """The plan of every kind that reaches the budget."""
        plans = {kind: self.plan([kind], costs, budget) for kind in self.kinds}
        return {kind: plan for kind, plan in plans.items() if plan is not None}


def cheapest_share(kinds: Sequence[Rate], costs: BlockCosts) -> float:
    """The least cost of converting all blocks to `kinds`, as a share of the teacher's."""
    return float(np.min([costs.at(kind) for kind in kinds], axis=0).sum() / costs.teacher)


def families(kinds: Sequence[Rate]) -> dict[str, tuple[Rate, ...]]:
    """The kinds of every family, families by their first kind in the order of tables."""
    found: dict[str, tuple[Rate, ...]] = {}
    for kind in sorted(kinds, key=rate_key):
        family = kind_of(kind).family
        found[family] = (*found.get(family, ()), kind)
    return found


def best_kinds(plans: Mapping[Rate, Plan], choice_errors: Mapping[Plan, float]) -> dict[str, Rate]:
    """Of every family that has a plan, the kind whose plan has the least error."""
    by_family = families(tuple(plans))
    return {name: min(kinds, key=lambda kind: choice_errors[plans[kind]]) for name, kinds in by_family.items()}


def converted(plan: Plan) -> int:
    return sum(rate != 1 for rate in plan)


def describe_plan(plan: Plan) -> str:
    """(1, 2, "C3O1", 2) -> "2R2+1C3O1": how many blocks have which kind; "softmax" if all do."""
    counts = {kind: plan.count(kind) for kind in sorted({*plan} - {1}, key=rate_key)}
    return "+".join(f"{count}{kind_of(kind).plan_name}" for kind, count in counts.items()) or "softmax"


def options(kinds: Sequence[Rate]) -> dict[str, tuple[Rate, ...]]:
    """Ladders of kinds that differ in a single option, which names them: {"Tc (C1O1, C3O1)": ("C1O1", "C3O1")}.

    The options of a kind are the fields of its class.
    """
    ladders: dict[tuple, list[Rate]] = {}
    for rate in sorted(kinds, key=rate_key):
        kind = kind_of(rate)
        names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        fields = {name: getattr(kind, name) for name in names}
        for name in fields:
            others = tuple((other, value) for other, value in fields.items() if other != name)
            ladders.setdefault((type(kind), name, others), []).append(rate)
    found = {}
    for (_, name, _), ladder in ladders.items():
        if len(ladder) > 1:
            values = {rate: getattr(kind_of(rate), name) for rate in ladder}
            ladder.sort(key=lambda rate, values=values: (values[rate] is None, values[rate]))  # None: a default
            found[f"{OPTIONS.get(name, name)} ({', '.join(kind_of(rate).name for rate in ladder)})"] = tuple(ladder)
    return found


OPTIONS = {"chunk": "Tc", "overlap": "To", "percent": "share"}  # what the papers call fields of kinds
