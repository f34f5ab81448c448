"""Scores, distances and losses of a run's models, with bootstrap intervals over prompts."""

from typing import Any

import numpy as np

from jsurgery.evaluate.statistics import bootstrap_interval

DIMENSIONS = {
    "color": "the colours that the prompt names are there, and no others",
    "shape": "the shapes are those of the prompt",
    "direction": "things move where the prompt says, or stay still",
    "background": "the background has the prompt's colour",
    "flicker": "1 is steady: colours and sizes stay as they are from frame to frame",
    "motion": "things move as far as the prompt calls for",
    "total": "the mean of the dimensions",
}


def scores(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The table of scores: a row for each dimension, a cell for each model, None if it was not measured."""
    models = evaluation["models"]
    scored = [model["score"] for model in models.values() if "score" in model]
    first = scored[0] if scored else {}
    rows = [
        {
            "dimension": name,
            "meaning": DIMENSIONS.get(name, ""),
            "cells": [model.get("score", {}).get(name) for model in models.values()],
            "upper": summary["upper"],
            "chance": summary["chance"],
        }
        for name, summary in first.items()
    ]
    losses = [model.get("validation_loss") for model in models.values()]
    return {
        "models": list(models),
        "rows": rows,
        "total": first.get("total"),
        "totals": [(name, model["score"]["total"]) for name, model in models.items() if "score" in model],
        "losses": losses if any(loss is not None for loss in losses) else None,
        "distances": [bootstrap_interval(model["latent_rmse"]) for model in models.values()],
        "prompts": len(evaluation["prompts"]),
    }


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
    if "score" in teacher and "score" in final:
        result["scores"] = teacher["score"]["total"]["mean"], final["score"]["total"]["mean"]
        if "per_clip" in teacher and "per_clip" in final:
            totals = [np.mean(list(model["per_clip"].values()), axis=0) for model in (teacher, final)]
            result["difference"] = bootstrap_interval(totals[1] - totals[0])
    if "validation_loss" in teacher and "validation_loss" in final:
        result["losses"] = teacher["validation_loss"], final["validation_loss"]
    return result
