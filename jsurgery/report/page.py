"""report: one self-contained page that says what a surgery did, what it saved and what it cost in quality."""

import base64
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from ml_collections import ConfigDict

from jsurgery.attention.hybrid import Rate
from jsurgery.config import flat
from jsurgery.cost import Workload, block_flops, model_flops, num_tokens, parameters
from jsurgery.evaluate.video_file import write_video
from jsurgery.report.charts import Chart, line_chart
from jsurgery.report.clips import embed_rows, side_by_side
from jsurgery.runtime.progress import read_metrics
from jsurgery.surgery.plan import workload
from jsurgery.wan.pipeline import model_path, transformer_folder
from jsurgery.wan.transformer import WanConfig, read_config

HERE = pathlib.Path(__file__).parent
PUBLISHED = {
    "Wan2.1 1.3B": WanConfig(),
    "Wan2.1 14B": WanConfig(num_attention_heads=40, num_layers=40, ffn_dim=13824),
}
TINY = 100_000_000  # parameters under which a model is called tiny
FULL_SIZE = {"frames": 81, "height": 480, "width": 832}  # what savings are also computed for, with Wan2.1 1.3B
UNITS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("FLOP", 1.0))
PARTS = ("core", "projections", "cross_attention", "ffn", "total")
DIMENSIONS = {
    "color": "the colours that the prompt names are there, and no others",
    "shape": "the shapes are those of the prompt",
    "direction": "things move where the prompt says, or stay still",
    "background": "the background has the prompt's colour",
    "flicker": "1 is steady: colours and sizes stay as they are from frame to frame",
    "motion": "things move as far as the prompt calls for",
    "total": "the mean of the dimensions",
}
RESAMPLES = 2000
MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"


def write_report(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes `report.html` in `workdir` from what the stages left there; what a missing stage would show is left out.

    Beside it `comparison.gif`: the teacher's clips in the upper row, the final model's in the lower. The page loads
    nothing from anywhere, by its content security policy too. It stays under 15 MB.
    """
    workdir = epath.Path(workdir)
    model = read_config(transformer_folder(model_path(config.model.path)))
    temporary = workdir / "report.html.tmp"
    temporary.write_text(render(config, model, workdir))
    temporary.replace(workdir / "report.html")
    grid = side_by_side(workdir / "evaluation" / "videos", ["teacher", "finetuned"], config.evaluate.videos)
    if grid is not None:
        write_video(workdir / "comparison.gif", grid, config.video.fps)


def render(config: ConfigDict, model: WanConfig, workdir: epath.Path) -> str:
    """The page of a model that underwent surgery in `workdir`."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed, "percent": percent, "rate": rate_name, "count": count}
    plan = read_json(workdir / "plan" / "plan.json")
    errors = read_json(workdir / "distill" / "errors.json")
    evaluation = read_json(workdir / "evaluation" / "evaluation.json")
    script = (HERE / "page.js").read_text()
    work = workload(config, model)
    return environment.get_template("page.html.jinja").render(
        config=config,
        subject=describe(config, model, work),
        stages=stages(config),
        plan=plan,
        depth=depths([*config.hybrid.rates, *(plan["rates"] if plan else ())]),
        costs=costs(work, plan["rates"], config) if plan else [],
        errors=error_table(errors, plan["rates"] if plan else None) if errors else None,
        shares=share_table(errors) if errors else None,
        scores=scores(evaluation) if evaluation else None,
        quality=quality(evaluation) if evaluation else None,
        clips=clips(evaluation, workdir / "evaluation" / "videos") if evaluation else [],
        charts=training_charts(config, workdir),
        fields=grouped_fields(config),
        versions=versions(),
        style=Markup((HERE / "page.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def read_json(path: epath.Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def describe(config: ConfigDict, model: WanConfig, work: Workload) -> dict[str, Any]:
    """What was operated on, in words."""
    model = dataclasses.replace(model, hybrid=None)
    names = [name for name, published in PUBLISHED.items() if published == model]
    size = parameters(model)
    return {
        "name": names[0] if names else pathlib.PurePath(config.model.path).name,
        "published": bool(names),
        "tiny": size < TINY,
        "procedural": config.prompts == "sprites",
        "parameters": size,
        "blocks": model.num_layers,
        "tokens": work.tokens,
    }


def stages(config: ConfigDict) -> dict[str, tuple[str, str]]:
    """(label, meaning) of the models that are compared."""
    control, steps = config.finetune.subject == "teacher", config.finetune.steps
    operated = "the distilled model" if config.finetune.distilled else "the model without distillation"
    start = "the original" if control else operated
    return {
        "teacher": ("Teacher", "the original model, every block with full softmax attention"),
        "not_distilled": ("No distillation", "after the operation, new parts merely calibrated"),
        "distilled": ("Distilled", "new parts trained to imitate the original attention"),
        "finetuned": (
            "Teacher, fine-tuned" if control else "Fine-tuned",
            f"{start}, trained as a whole for {steps:,} steps",
        ),
    }


def costs(work: Workload, rates: Sequence[Rate], config: ConfigDict) -> list[dict[str, Any]]:
    """`cost_table` of this model; then, if that is another, of Wan2.1 1.3B at full size with the same mix of rates."""
    video = config.video
    tables = [{"full_size": False, "size": video.to_dict(), **cost_table(work, rates)}]
    tokens = num_tokens(FULL_SIZE["frames"], FULL_SIZE["height"], FULL_SIZE["width"])
    full = Workload(PUBLISHED["Wan2.1 1.3B"], tokens, feature_map=work.feature_map)
    if (full.config, full.tokens) != (dataclasses.replace(work.config, hybrid=None), work.tokens):
        tables.append({"full_size": True, "size": FULL_SIZE, **cost_table(full, rates)})
    return tables


def cost_table(work: Workload, rates: Sequence[Rate]) -> dict[str, Any]:
    """FLOPs by part: a block at each rate, the plan's mean block, what it saves; and those of a whole forward pass."""
    used = sorted({1, *rates}, key=rate_key)
    by_rate = {rate: {part: getattr(block_flops(work, rate), part) for part in PARTS} for rate in used}
    mean = {part: sum(by_rate[rate][part] for rate in rates) / len(rates) for part in PARTS}
    blocks = work.config.num_layers
    teacher, hybrid = model_flops(work, [1] * blocks), model_flops(work, []) + blocks * mean["total"]
    unit, scale = next(unit for unit in UNITS if by_rate[1]["total"] > unit[1] / 10)
    return {
        "unit": unit,
        "scale": scale,
        "tokens": work.tokens,
        "by_rate": by_rate,
        "blocks_at": {rate: list(rates).count(rate) for rate in used},
        "teacher": by_rate[1],
        "plan": mean,
        "saved": {part: 1 - mean[part] / by_rate[1][part] for part in PARTS},
        "forward": {"teacher": teacher, "plan": hybrid, "saved": 1 - hybrid / teacher},
    }


def error_table(errors: dict[str, Any], chosen: Sequence[Rate] | None) -> dict[str, Any]:
    """Rows of cells (rate, error, heat, chosen); heat is the square root of the error's share of the largest."""
    rates, largest = errors["rates"], max(map(max, errors["errors"])) or 1.0
    softmax = [1] if chosen and 1 in chosen and 1 not in rates else []  # softmax is the teacher's own: no error

    def cell(block: int, rate: Rate) -> dict[str, Any]:
        error = 0.0 if rate in softmax else errors["errors"][block][rates.index(rate)]
        marked = chosen is not None and chosen[block] == rate
        return {"error": error, "heat": math.sqrt(error / largest), "chosen": marked}

    def means(name: str) -> list[float]:
        return [0.0] * len(softmax) + np.mean(errors[name], axis=0).tolist()

    return {
        "rates": [*softmax, *rates],
        "rows": [[cell(block, rate) for rate in (*softmax, *rates)] for block in range(len(errors["errors"]))],
        "mean": means("errors"),
        "initial_mean": means("initial_errors"),
        "samples": errors["samples"],
    }


def share_table(errors: dict[str, Any]) -> dict[str, Any]:
    """Rows of (the softmax tokens' share of the denominator, the teacher's own share on them or None)."""
    ours = errors["softmax_share"]
    teacher = errors["teacher_softmax_share"] or [[None] * len(row) for row in ours]
    rows = [list(zip(mine, theirs, strict=True)) for mine, theirs in zip(ours, teacher, strict=True)]
    return {"rates": errors["rates"], "rows": rows, "with_teacher": bool(errors["teacher_softmax_share"])}


def scores(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The table of scores: a row for each dimension, cells in the models' order; None where nothing was measured."""
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
        "distances": [interval(model["latent_rmse"]) for model in models.values()],
        "prompts": len(evaluation["prompts"]),
    }


def quality(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """The last model against the teacher, and against what the operation alone would have left."""
    models = evaluation["models"]
    last = next((name for name in reversed(models) if name != "teacher"), None)
    if last is None or "teacher" not in models:
        return None
    teacher, final = models["teacher"], models[last]
    found = {"model": last, "distance": interval(final["latent_rmse"])}
    if last != "not_distilled" and "not_distilled" in models:
        found["undistilled_distance"] = interval(models["not_distilled"]["latent_rmse"])
    if "score" in teacher and "score" in final:
        found["scores"] = teacher["score"]["total"]["mean"], final["score"]["total"]["mean"]
        if "per_clip" in teacher and "per_clip" in final:
            totals = [np.mean(list(model["per_clip"].values()), axis=0) for model in (teacher, final)]
            found["difference"] = interval(totals[1] - totals[0])
    if "validation_loss" in teacher and "validation_loss" in final:
        found["losses"] = teacher["validation_loss"], final["validation_loss"]
    return found


def interval(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean with a 95 % percentile bootstrap interval, over prompts."""
    values = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def clips(evaluation: dict[str, Any], folder: epath.Path) -> list[dict[str, Any]]:
    """Rows of (prompt, clips): a clip is its model, its data URI, and its own score and distance where measured."""
    models = evaluation["models"]
    rows = embed_rows(folder, list(models), len(evaluation["prompts"]))

    def clip(name: str, source: str, prompt: int) -> dict[str, Any]:
        per_clip = models[name].get("per_clip")
        score = float(np.mean([values[prompt] for values in per_clip.values()])) if per_clip else None
        return {"model": name, "source": source, "score": score, "distance": models[name]["latent_rmse"][prompt]}

    return [
        {"prompt": evaluation["prompts"][i], "clips": [clip(name, source, i) for name, source in row.items()]}
        for i, row in enumerate(rows)
    ]


def training_charts(config: ConfigDict, workdir: epath.Path) -> list[Chart]:
    """Losses of distillation, by rate, and of fine-tuning."""
    distilled, finetuned = read_metrics(workdir / "distill"), read_metrics(workdir / "finetune")
    rates = sorted(config.hybrid.rates, key=rate_key)
    by_rate = {f"loss_{rate}": rate_name(rate) for rate in rates if any(f"loss_{rate}" in row for row in distilled)}
    target = {"value": "output", "attention": "weights"}[config.distill.loss]
    candidates = [
        line_chart(f"Distillation: error of the attention {target}, mean over blocks", distilled, by_rate),
        line_chart("Fine-tuning: loss", finetuned, {"loss": "loss"}),
        line_chart("Fine-tuning: gradient norm", finetuned, {"gradient_norm": "gradient norm"}),
    ]
    return [chart for chart in candidates if chart]


def grouped_fields(config: ConfigDict) -> dict[str, list[tuple[str, Any]]]:
    """The config's fields by section; those outside of any come first."""
    groups: dict[str, list[tuple[str, Any]]] = {"": []}
    for field, value in flat(config):
        groups.setdefault(field.rpartition(".")[0], []).append((field, value))
    return groups


def versions() -> dict[str, str]:
    found = {}
    for package in ("jsurgery", "jax", "flax"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def depths(rates: Sequence[Rate]) -> dict[Rate, int]:
    """How strongly each rate is coloured, in percent: softmax not at all, the fewest softmax tokens fully."""
    ordered = sorted({1, *rates}, key=rate_key)
    last = len(ordered) - 1
    return {rate: 100 if i and i == last else 55 * i // max(1, last - 1) for i, rate in enumerate(ordered)}


def rate_key(rate: Rate) -> float:
    return math.inf if rate == "linear" else float(rate)


def rate_name(rate: Rate) -> str:
    return "softmax" if rate == 1 else "linear" if rate == "linear" else f"R{rate}"


def number(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%".replace("-", MINUS)


def count(value: int) -> str:
    """A large count in words: 1.42 billion, 2.9 million."""
    for name, scale in (("billion", 1e9), ("million", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value:,}"
