"""One page about several runs: what each saves, its scores, plan and curves, and where their configs differ."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from jsurgery.config import flatten
from jsurgery.errors import InputError
from jsurgery.io.files import check_writable, replacing
from jsurgery.report.charts import Chart, line_chart
from jsurgery.report.flop_savings import cost_table
from jsurgery.report.page import MODELS, clip_numbers, describe, versions
from jsurgery.report.run_files import RunFiles, read_run
from jsurgery.report.scores import quality, scores
from jsurgery.report.templates import depths, render
from jsurgery.report.video_player import embed
from jsurgery.wan.cost import workload

SHOWN_PROMPTS = 6


def write_comparison(workdirs: Sequence[epath.PathLike], page: epath.PathLike) -> epath.Path:
    """Writes one page about several runs and returns its path; the page names the files that a run lacks.

    Raises InputError for fewer than two runs, for a missing folder, and if the page cannot be written.
    """
    if len(workdirs) < 2:
        raise InputError(f"--compare: expected two runs or more, found {len(workdirs)}")
    runs = dict(zip(names(workdirs), map(read_run, workdirs), strict=True))
    page = epath.Path(page)
    check_writable(page, "--output")
    with replacing(page) as temporary:
        temporary.write_text(render_comparison(runs))
    return page


def names(workdirs: Sequence[epath.PathLike]) -> list[str]:
    """A short name for each run: the shortest ends of the folders' paths that differ."""
    parts = [epath.Path(workdir).resolve().parts for workdir in workdirs]
    if len(set(parts)) < len(parts):
        raise InputError(f"--compare: expected runs that differ, found {', '.join(map(str, workdirs))}")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def render_comparison(runs: dict[str, RunFiles]) -> str:
    rows = {name: summary(run) for name, run in runs.items()}
    shown, labels = clips(runs)
    evaluations = {name: scores(run.evaluation) for name, run in runs.items() if run.evaluation}
    return render(
        "compare.html.jinja",
        runs=rows,
        depth=depths([rate for run in runs.values() if run.plan for rate in run.plan["rates"]]),
        dimensions=dimensions(evaluations),
        clips=shown,
        labels=labels,
        charts=curves(runs),
        differences=differences(runs),
        versions=versions(),
        absent={name: run.absent for name, run in runs.items() if run.absent},
    )


def summary(run: RunFiles) -> dict[str, Any]:
    """A run's column of the page's first table; None for everything that the run lacks."""
    result: dict[str, Any] = {"plan": run.plan, "subject": None, "cost": None}
    if run.config is not None and run.model is not None:
        work = workload(run.config, run.model)
        result["subject"] = describe(run.config, run.model, work)
        result["cost"] = cost_table(work, run.plan["rates"]) if run.plan else None
    return result | {"quality": quality(run.evaluation) if run.evaluation else None}


def dimensions(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by dimension: the score of each run's last model; a run without scores has no cell."""
    rows: dict[str, dict[str, Any]] = {}
    for name, evaluation in evaluations.items():
        for row in evaluation["rows"]:
            entry = rows.setdefault(row["dimension"], {"meaning": row["meaning"], "cells": {}})
            entry["cells"][name] = row["cells"][-1]
    return [{"dimension": dimension, **row} for dimension, row in rows.items()]


def clips(runs: dict[str, RunFiles]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(rows of the player, label of each model): the first run's teacher and every run's last model.

    Empty if the runs were evaluated on different prompts.
    """
    evaluated = {name: (run.videos, run.evaluation) for name, run in runs.items() if run.evaluation}
    if not evaluated or len({tuple(evaluation["prompts"]) for _, evaluation in evaluated.values()}) > 1:
        return [], {}
    videos, first = next(iter(evaluated.values()))
    folders, labels = {"teacher": videos / "teacher"}, {"teacher": "Teacher"}
    models = {"teacher": first["models"]["teacher"]}
    for number, (name, (videos, evaluation)) in enumerate(evaluated.items()):
        last = next(model for model in reversed(MODELS) if model in evaluation["models"])
        key = f"run-{number}"
        folders[key], labels[key], models[key] = videos / last, name, evaluation["models"][last]
    rows, _ = embed(folders, first["prompts"][:SHOWN_PROMPTS])
    for row in rows:
        row["notes"] = {name: clip_numbers(model, row["number"]) for name, model in models.items()}
    return rows, labels


def curves(runs: dict[str, RunFiles]) -> list[Chart]:
    """Charts with a line for each run: the loss of distillation, averaged over rates, and of fine-tuning."""

    def distillation(row: dict[str, float]) -> float | None:
        losses = [value for name, value in row.items() if name.startswith("loss_")]
        return float(np.mean(losses)) if losses else None

    charts = [
        chart("Distillation: error of the attention, mean over blocks and rates", runs, "distilled", distillation),
        chart("Fine-tuning: loss", runs, "finetuned", lambda row: row.get("loss")),
    ]
    return [chart for chart in charts if chart]


def chart(title: str, runs: dict[str, RunFiles], metrics: str, value) -> Chart | None:
    by_step: dict[float, dict[str, float]] = {}
    for name, run in runs.items():
        for row in getattr(run, metrics):
            if (point := value(row)) is not None:
                by_step.setdefault(row["step"], {"step": row["step"]})[f"run {name}"] = point
    rows = [by_step[step] for step in sorted(by_step)]
    return line_chart(title, rows, {f"run {name}": name for name in runs})


def differences(runs: dict[str, RunFiles]) -> dict[str, list[Any]]:
    """Field -> its value in every run, for the fields that differ between runs."""
    configs = [dict(flatten(run.config)) if run.config is not None else {} for run in runs.values()]
    fields = dict.fromkeys(field for config in configs for field in config)
    by_field = {field: [config.get(field) for config in configs] for field in fields}
    return {field: values for field, values in by_field.items() if len({str(v) for v in values if v is not None}) > 1}
