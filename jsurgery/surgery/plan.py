"""plan: the rate of every block, from the errors, the cost model and a budget (the paper's eq. 9)."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.attention.hybrid import FeatureMapConfig, HybridConfig, Rate
from jsurgery.cost import Workload, core_flops, num_tokens
from jsurgery.errors import InputError
from jsurgery.runtime.stages import write_json
from jsurgery.surgery.distill import rate_chain, read_errors
from jsurgery.surgery.knapsack import select_homogeneous, solve
from jsurgery.wan.transformer import WanConfig

NAMED_BUDGET = re.compile(r"(\d+)R(\d+|linear)")


def workload(config: ConfigDict, model: WanConfig) -> Workload:
    """What one forward pass works on, for the cost model."""
    hybrid, video = config.hybrid, config.video
    phi = FeatureMapConfig(hybrid.degree, hybrid.layers, hybrid.activation) if hybrid.linear_branch else None
    return Workload(model, num_tokens(video.frames, video.height, video.width), config.text_length, phi)


def named_budget(text: str) -> tuple[int, Rate] | None:
    """("15R2") -> (15, 2)."""
    match = NAMED_BUDGET.fullmatch(text)
    return None if match is None else (int(match[1]), "linear" if match[2] == "linear" else int(match[2]))


def budget_flops(budget: str | float, work: Workload) -> float:
    """FLOPs of the attention cores that a budget allows: "15R2", a share of the teacher's up to 1, or FLOPs."""
    blocks = work.config.num_layers
    teacher = blocks * core_flops(work, 1)
    if isinstance(budget, str):
        named = named_budget(budget)
        if named is None:
            raise InputError(f"config.plan.budget: expected a number or a name like '15R2', found {budget!r}")
        count, rate = named
        if count > blocks:
            raise InputError(f"config.plan.budget: {budget} converts {count} blocks, the model has {blocks}")
        return (blocks - count) * core_flops(work, 1) + count * core_flops(work, rate)
    if budget <= 0:
        raise InputError(f"config.plan.budget: expected a positive number, found {budget}")
    return budget * teacher if budget <= 1 else float(budget)


def one_rate(config: ConfigDict) -> tuple[int, Rate]:
    """What a homogeneous plan, the paper's baseline, converts: (15, 2) for "15R2"."""
    budget, rates = config.plan.budget, tuple(config.plan.rates)
    named = named_budget(budget) if isinstance(budget, str) else None
    if named is None or named[1] not in rates:
        expected = f"homogeneous plans take a name like '15R2' with a rate of {rates}"
        raise InputError(f"config.plan.budget: {expected}, found {budget!r}")
    return named


def check_budget(config: ConfigDict, model: WanConfig) -> None:
    """Raises InputError when no plan fits the budget: before any long work starts."""
    if config.plan.selection == "homogeneous":
        one_rate(config)
    work = workload(config, model)
    budget = budget_flops(config.plan.budget, work)
    cheapest = model.num_layers * min(core_flops(work, rate) for rate in config.plan.rates)
    if budget < cheapest * (1 - 1e-9):
        share = cheapest / (model.num_layers * core_flops(work, 1))
        raise InputError(
            f"config.plan.budget: {config.plan.budget} allows {budget:.4g} attention FLOPs, the cheapest plan of rates "
            f"{tuple(config.plan.rates)} takes {cheapest:.4g} (a share of {share:.3f})"
        )


def plan(config: ConfigDict, model: WanConfig, distilled: epath.Path, folder: epath.Path) -> None:
    """Leaves `plan.json` in `folder`: the rate of every block, cost and error in all, and the bound on the error."""
    found, work = read_errors(distilled), workload(config, model)
    rates: list[Rate] = list(config.plan.rates)
    column = {rate: i for i, rate in enumerate(found["rates"])}
    if unknown := [rate for rate in rates if rate != 1 and rate not in column]:
        raise InputError(f"config.plan.rates: rate {unknown[0]} was not distilled, only {found['rates']} were")
    error = lambda block, rate: 0.0 if rate == 1 else found["errors"][block][column[rate]]
    errors = np.array([[error(block, rate) for rate in rates] for block in range(model.num_layers)])
    costs = np.tile([core_flops(work, rate) for rate in rates], (model.num_layers, 1))
    budget = budget_flops(config.plan.budget, work)
    bound = None
    if config.plan.selection == "heterogeneous":
        solution = solve(errors, costs, budget)
        chosen, bound = [rates[i] for i in solution.indices], solution.lower_bound
    else:
        count, rate = one_rate(config)
        converted = select_homogeneous(errors, rates.index(rate), count)
        chosen = [rate if block in converted else 1 for block in range(model.num_layers)]
    teacher = model.num_layers * core_flops(work, 1)
    cost = sum(core_flops(work, rate) for rate in chosen)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "plan.json",
        {
            "rates": chosen,
            "selection": config.plan.selection,
            "budget": config.plan.budget,
            "budget_flops": budget,
            "cost_flops": cost,
            "teacher_flops": teacher,
            "share_of_teacher": cost / teacher,
            "error": sum(error(block, rate) for block, rate in enumerate(chosen)),
            "error_bound": bound,
        },
    )


def read_plan(folder: epath.Path) -> dict[str, Any]:
    path = folder / "plan.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; run `jsurgery plan` first")
    return json.loads(path.read_text())


def hybrid_config(config: ConfigDict, rates: Sequence[Rate]) -> HybridConfig:
    """What `operate` builds for a plan."""
    hybrid = config.hybrid
    return HybridConfig(
        rates=tuple(rates),
        chain=rate_chain(hybrid.rates),
        lattice=hybrid.lattice,
        stabilizer=hybrid.stabilizer,
        linear_branch=hybrid.linear_branch,
        feature_map=FeatureMapConfig(hybrid.degree, hybrid.layers, hybrid.activation),
    )
