"""objective: does the sum of block errors, which the planner minimises, predict the error of a whole plan?

Random plans are run on held-out noisy latents, without sampling. The error of their velocity is compared with the sum
of block errors. A block's error is either that of its own attention after distillation, or that of the velocity with
only this block converted.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy.stats import rankdata

from jsurgery.ablate.seed_run import SeedRun
from jsurgery.ablate.tables import BUDGETS, scaled
from jsurgery.attention.feature_maps import FeatureMapConfig, LearnedMaps
from jsurgery.errors import InputError
from jsurgery.evaluate.statistics import RESAMPLES, mean_and_std
from jsurgery.runtime.progress import Progress
from jsurgery.surgery.distillation.saved_maps import load_all_maps, read_errors
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.surgery.knapsack import solve
from jsurgery.surgery.plan import BlockCosts, block_costs, budget_cost
from jsurgery.surgery.plan_forward import plan_velocity, velocity_errors

PLANS = 50
AIM = 0.9
PREDICTORS = {
    "attention": "block errors of attention, as distillation leaves them",
    "velocity": "velocity error with that one block converted",
    "velocity_squared": "squared velocity error with that one block converted",
}
FAMILIES = {"random": "random plans", "permuted": "plans of one cost"}


def objective(seeds: Sequence[SeedRun]) -> dict[str, Any]:
    """Spearman correlations of predicted total errors with the velocity errors of whole plans."""
    per_seed = [
        seed.measured_once(
            seed.stage("objective", seed.config, ("plan",), [seed.distillation(seed.config)]),
            "objective.json",
            functools.partial(of_seed, seed),
        )
        for seed in seeds
    ]
    rows: dict[str, dict[str, Any]] = {}
    for predictor, text in PREDICTORS.items():
        rows[text] = {}
        for family, name in FAMILIES.items():
            pairs = [(predicted(measured, predictor, family), measured[family]["l1"]) for measured in per_seed]
            low, high = spearman_interval(pairs)
            rows[text][f"Spearman, {name}"] = mean_and_std([spearman(*pair) for pair in pairs])
            rows[text][f"95 %, {name}"] = f"{low:.3f} to {high:.3f}"
        for budget in per_seed[0]["planned"]:
            errors = [measured["planned"][budget][predictor] for measured in per_seed]
            rows[text][f"error of its plan at {budget}"] = mean_and_std(errors)
    line = lambda predictor: {"x": predicted(per_seed[0], predictor, "random"), "y": per_seed[0]["random"]["l1"]}
    titles = {predictor: f"Velocity error over predicted error: {text}" for predictor, text in PREDICTORS.items()}
    return {
        "text": f"{len(seeds)} seeds of {PLANS} plans each, over rates {per_seed[0]['rates']}; the aim is {AIM}. Plans "
        "of one cost are permutations of one set of rates: what the planner decides at a given budget. Block errors "
        "come from one half of the held-out prompts, errors of plans from the other. Intervals: bootstrap over plans.",
        "rows": rows,
        "charts": [{"title": title, "lines": {"plans": line(predictor)}} for predictor, title in titles.items()],
        "per_seed": per_seed,
    }


def of_seed(seed: SeedRun) -> dict[str, Any]:
    """Block errors, and the velocity errors of whole plans, of one seed; all relative, on held-out traces."""
    config = seed.config
    distilled = seed.distilled(config)
    setup, layers = DistillSpec.of(config), seed.layers
    rates = (1, *(rate for rate in config.plan.rates if rate != 1))
    choice = {1: 0} | {rate: i + 1 for i, rate in enumerate(setup.rates)}
    half = len(seed.held_out) // 2
    if not half:
        raise InputError(f"config.trace.holdout: expected at least 2 prompts, found {config.trace.holdout}")
    phi = FeatureMapConfig.of(config)
    maps = load_all_maps(distilled / "feature_maps.safetensors", setup.rates, layers, phi)

    rng = np.random.default_rng(config.seed)
    mixed = np.resize(np.arange(len(rates)), layers)
    families = {
        "random": rng.integers(len(rates), size=(PLANS, layers)),
        "permuted": np.stack([rng.permutation(mixed) for _ in range(PLANS)]),
    }
    run = functools.partial(errors_of, seed, maps, setup, [choice[rate] for rate in rates])
    swaps = np.zeros((layers * len(rates), layers), int)
    swaps[np.arange(len(swaps)), np.repeat(np.arange(layers), len(rates))] = np.tile(np.arange(len(rates)), layers)
    single = {name: e.reshape(layers, -1) for name, e in run(swaps, seed.held_out[:half]).items()}
    measured = read_errors(distilled)
    column = {rate: i for i, rate in enumerate(measured["rates"])}
    block_errors = {
        "attention": np.array([[0.0 if r == 1 else row[column[r]] for r in rates] for row in measured["errors"]]),
        "velocity": single["l1"],
        "velocity_squared": single["squared"],
    }
    costs = block_costs(config, seed.run.model_config)
    plans = {
        (budget, predictor): solve(errors, np.stack([costs.at(rate) for rate in rates], 1), allowed).indices
        for budget, allowed in budgets(costs, layers, rates).items()
        for predictor, errors in block_errors.items()
    }
    chosen = run(np.array(list(plans.values())), seed.held_out[half:])["l1"]
    planned: dict[str, dict[str, float]] = {}
    for (budget, predictor), error in zip(plans, chosen, strict=True):
        planned.setdefault(budget, {})[predictor] = float(error)
    return {
        "rates": list(rates),
        "block_errors": {name: errors.tolist() for name, errors in block_errors.items()},
        **{
            name: {"plans": of.tolist(), "l1": run(of, seed.held_out[half:])["l1"].tolist()}
            for name, of in families.items()
        },
        "planned": planned,
    }


def budgets(costs: BlockCosts, layers: int, rates: Sequence[int | str]) -> dict[str, float]:
    """The costs that the budgets of the paper's Table 5 allow; budgets at other rates than `rates` are left out."""
    by_name = {budget: scaled(budget, layers) for budget in BUDGETS}
    return {name: budget_cost(text, costs) for name, text in by_name.items() if int(text.partition("R")[2]) in rates}


def errors_of(
    seed: SeedRun,
    maps: LearnedMaps,
    setup: DistillSpec,
    choices: Sequence[int],
    plans_PxL: np.ndarray,
    batches: Sequence[dict],
) -> dict[str, np.ndarray]:
    """Every plan's velocity errors, means over batches. A plan has for each block an index into `choices`."""
    choices_PxL, teacher = np.array(choices)[plans_PxL], seed.run.teacher
    errors, progress = [], Progress("objective", len(batches))
    for number in progress.over(range(len(batches))):
        batch = batches[number]
        velocity = plan_velocity(teacher, batch, maps, np.zeros(seed.layers, int), setup)
        errors.append(velocity_errors(teacher, batch, maps, choices_PxL, setup, velocity))
    return jax.tree.map(lambda *arrays: np.mean(arrays, axis=0), *errors)


def predicted(measured: Mapping[str, Any], predictor: str, family: str) -> list[float]:
    """The sum of block errors of every plan."""
    errors = np.array(measured["block_errors"][predictor])
    plans = np.array(measured[family]["plans"])
    return errors[np.arange(errors.shape[0]), plans].sum(axis=1).tolist()


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    return float(rank_correlations(np.array([x]), np.array([y]))[0])


def rank_correlations(x_SxP: np.ndarray, y_SxP: np.ndarray) -> np.ndarray:
    """Spearman's rho of every row; 0 for a row without variation."""
    a, b = (rankdata(values, axis=1) for values in (x_SxP, y_SxP))
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (a, b))
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norm, out=np.zeros(len(a)), where=norm > 0)


def spearman_interval(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[float, float]:
    """The 95 % bootstrap interval of rho's mean over seeds. Plans are resampled within each seed."""
    rng = np.random.default_rng(0)
    rhos = []
    for x, y in pairs:
        picks = rng.integers(len(x), size=(RESAMPLES, len(x)))
        rhos.append(rank_correlations(np.array(x)[picks], np.array(y)[picks]))
    low, high = np.quantile(np.mean(rhos, axis=0), [0.025, 0.975])
    return float(low), float(high)
