"""Scores, distances and losses of a run's models, with bootstrap intervals over prompts.

All scores are on one scale: 1 is that of real clips under their own captions, 0 that of real clips whose captions were
dealt at random.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jsurgery.evaluate.statistics import bootstrap_interval, paired_difference

DIMENSIONS = {
    "color": "the colours that the prompt names are there, and no others",
    "shape": "the shapes are those of the prompt",
    "direction": "things move where the prompt says, or stay still",
    "background": "the background has the prompt's colour",
    "flicker": "colours and sizes stay as they are from frame to frame",
    "motion": "things move as far as the prompt calls for",
    "total": "all of them together",
}
MARGIN = 0.04  # of the axis of scores, beyond 0 and 1


def on_scale(value: Any, summary: dict[str, Any]) -> Any:
    """A measured score, or an array of them, on the scale of 0 to 1 that the bounds in its `summary` define."""
    return (value - summary["chance"]) / (summary["upper"] - summary["chance"])


def scaled(summary: dict[str, Any] | None) -> dict[str, float] | None:
    """mean, low and high of a score on that scale; None if it was not measured or has no scale.

    There is none where real clips score no more under their own captions than under others.
    """
    if summary is None or summary["upper"] <= summary["chance"]:
        return None
    return {name: on_scale(summary[name], summary) for name in ("mean", "low", "high")}


def clip_scores(model: dict[str, Any]) -> np.ndarray | None:
    """The score of every clip of a model, [prompts]; None if there is none."""
    total = model.get("score", {}).get("total")
    if scaled(total) is None or "per_clip" not in model:
        return None
    return on_scale(np.mean(list(model["per_clip"].values()), axis=0), total)


def scores(evaluation: dict[str, Any], finetuned_from: str = "distilled") -> dict[str, Any]:
    """The table of scores: a row for each dimension, a cell for each model, None if it was not measured.

    steps: what distillation and fine-tuning each did (`compared`); `finetuned_from` is the model that was fine-tuned.
    """
    models = evaluation["models"]
    measured = [model["score"] for model in models.values() if "score" in model]
    names = list(measured[0]) if measured else []
    rows = [
        {
            "dimension": name,
            "meaning": DIMENSIONS.get(name, ""),
            "cells": [scaled(model.get("score", {}).get(name)) for model in models.values()],
        }
        for name in names
    ]
    losses = [model.get("validation_loss") for model in models.values()]
    totals = {name: scaled(model.get("score", {}).get("total")) for name, model in models.items()}
    return {
        "models": list(models),
        "rows": rows,
        "axis": score_axis({name: total for name, total in totals.items() if total}),
        "losses": losses if any(loss is not None for loss in losses) else None,
        "distances": [bootstrap_interval(model["latent_rmse"]) for model in models.values()],
        "prompts": len(evaluation["prompts"]),
        "steps": compared(evaluation, (("not_distilled", "distilled"), (finetuned_from, "finetuned"))),
    }


def score_axis(totals: dict[str, dict[str, float]]) -> dict[str, Any] | None:
    """Total scores on an axis: places in percent of its width. None without scores.

    rows: (model, total, place of the mean, of the interval's low end, the interval's width).
    """
    if not totals:
        return None
    low = min(0.0, *(total["low"] for total in totals.values())) - MARGIN
    high = max(1.0, *(total["high"] for total in totals.values())) + MARGIN
    place = lambda value: 100 * (value - low) / (high - low)
    rows = [
        (name, total, place(total["mean"]), place(total["low"]), place(total["high"]) - place(total["low"]))
        for name, total in totals.items()
    ]
    return {"rows": rows, "zero": place(0.0), "one": place(1.0)}


def compared(evaluation: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The change from one model to another over the same prompts and noise, for the pairs that were both evaluated.

    It is that of the score, or, without scores, of the distance to the teacher. Its 95 % interval is a bootstrap over
    the pairs of clips; `noise` says that it contains 0, so that these prompts do not tell the models apart.
    """
    models, changes = evaluation["models"], []
    for before, after in pairs:
        if before not in models or after not in models:
            continue
        old, new, measure = clip_scores(models[before]), clip_scores(models[after]), "score"
        if old is None or new is None:
            measure, old, new = "distance", *(np.array(models[name]["latent_rmse"]) for name in (before, after))
        if measure == "distance" and before == "teacher":
            continue
        change = paired_difference([new], [old])
        noise = change["low"] <= 0 <= change["high"]
        changes.append({"before": before, "after": after, "measure": measure, "noise": noise, **change})
    return changes


def quality(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """The last model against the teacher, and its distance against that of the model without distillation."""
    models = evaluation["models"]
    last = next((name for name in reversed(models) if name != "teacher"), None)
    if last is None or "teacher" not in models:
        return None
    teacher, final = models["teacher"], models[last]
    result = {"model": last, "distance": bootstrap_interval(final["latent_rmse"])}
    if last != "not_distilled" and "not_distilled" in models:
        result["undistilled_distance"] = bootstrap_interval(models["not_distilled"]["latent_rmse"])
    totals = [scaled(model.get("score", {}).get("total")) for model in (teacher, final)]
    if totals[0] and totals[1]:
        result["scores"] = totals[0]["mean"], totals[1]["mean"]
        if change := compared(evaluation, [("teacher", last)]):
            result["change"] = change[0]
    if "validation_loss" in teacher and "validation_loss" in final:
        result["losses"] = teacher["validation_loss"], final["validation_loss"]
    return result
