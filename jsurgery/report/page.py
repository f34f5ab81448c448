"""The stage `report`: one self-contained page about what a surgery did, saved, and cost in quality."""

import dataclasses
import importlib.metadata
import itertools
import math
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.attention.kinds.registry import rate_key, rate_name
from jsurgery.config import flatten
from jsurgery.io.files import check_writable, replacing
from jsurgery.rates import Rate
from jsurgery.report.attention_diagram import attention_diagram
from jsurgery.report.charts import Chart, line_chart
from jsurgery.report.comparison_gif import write_comparison_gif
from jsurgery.report.fidelity import fidelity
from jsurgery.report.first_frame import read_first_frame
from jsurgery.report.flop_savings import costs
from jsurgery.report.model_card import other_kinds
from jsurgery.report.pareto_slider import trade_off
from jsurgery.report.run_files import RunFiles, read_run
from jsurgery.report.scores import clip_scores, quality, scores
from jsurgery.report.templates import depths, render
from jsurgery.report.video_player import embed
from jsurgery.runtime.progress import clock
from jsurgery.version import __version__
from jsurgery.wan.cost import Workload, parameters, workload
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_sizes import PUBLISHED

TINY = 100_000_000  # parameters under which a model is called tiny
PROJECT = "https://github.com/jsurgery/jsurgery"
MODELS = ("teacher", "not_distilled", "distilled", "finetuned")
STAGES = {  # a stage's command -> what the page gets from it
    "trace": "the teacher’s samples, from which the new parts learn",
    "distill": "new parts for every block at every rate, and how far off they are",
    "plan": "how much exact attention each block keeps",
    "operate": "the rebuilt model",
    "finetune": "the rebuilt model, trained as a whole",
    "evaluate": "clips and scores of the model after each stage",
    "report": "the whole page",
}


def write_report(config: ConfigDict | None, workdir: epath.PathLike, *, coming: Sequence[str] = ()) -> epath.Path:
    """Writes `workdir/report.html` from the files that the stages have left so far, and returns its path.

    The page names missing files and shows the rest. It loads nothing from outside, which its content security policy
    enforces, and stays under 15 MB. Also writes `comparison.gif`.
    Raises InputError if the folder does not exist, or if the page cannot be written there.

    config: the run's own; by default the config that is saved in `workdir`.
    coming: the stages that a running surgery has yet to run. The page then lists them instead of missing files, reloads
        itself, and has no clips, because these take longest to write.
    """
    run = read_run(workdir, config)
    page = run.workdir / "report.html"
    check_writable(page, "--workdir")
    text = render_run(run, coming)
    with replacing(page) as temporary:
        temporary.write_text(text)
    if run.config is not None and not coming:
        write_comparison_gif(run)
    return page


def render_run(run: RunFiles, coming: Sequence[str] = ()) -> str:
    """The page of one run; `coming` as in `write_report`."""
    config, plan = run.config, run.plan
    front, subject, tables = trade_off(run), None, []
    if config is not None and run.model is not None:
        work = workload(config, run.model)
        subject = describe(config, run.model, work)
        tables = costs(work, plan["rates"], config) if plan else []
    rates = [*(config.hybrid.rates if config is not None else ()), *(plan["rates"] if plan else ())]
    return render(
        "page.html.jinja",
        name=run.workdir.resolve().name,
        config=config,
        subject=subject,
        stages=stages(config),
        plan=plan,
        depth=depths(rates),
        other_kinds=other_kinds(rates),
        depth_of={rate_name(rate): depth for rate, depth in depths(rates).items()},
        front=front[0] if front else None,
        front_chart=front[1] if front else None,
        costs=tables,
        heat=heat_map(run.errors, plan["rates"] if plan else None) if run.errors else None,
        time=step_time(run, tables),
        diagram=attention_diagram(config, run.model, plan["rates"]) if config and run.model and plan else None,
        made=made(run.made_by),
        project=PROJECT,
        scores=scores(run.evaluation, finetuned_from(config)) if run.evaluation else None,
        quality=quality(run.evaluation) if run.evaluation else None,
        clips=clips(run) if not coming else None,
        fidelity=fidelity(run.fidelity, stages(config)) if run.fidelity else None,
        charts=training_charts(run),
        parity=parity(run.parity) if run.parity else [],
        fields=grouped_fields(config) if config is not None else {},
        versions=versions(),
        coming=[(name, STAGES[name]) for name in coming],
        commands=len(STAGES),
        first_frame=read_first_frame(run.workdir) if coming else None,
        absent=run.absent if not coming else [],
        unfinished=run.evaluation is None,
    )


def describe(config: ConfigDict, model: WanConfig, work: Workload) -> dict[str, Any]:
    """The facts about the teacher that the page's texts need: name, size, and whether it is published or tiny."""
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


def step_time(run: RunFiles, tables: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The measured seconds of a sampling step of one clip, and what the last model saves of the teacher's.

    None if the teacher's or the last model's were not measured, or not on one machine and in batches of one size.
    models: name -> median (`mean`) and quartiles. noise: whether the quartiles of the two overlap, or the rebuilt
    models, which compute alike, differ as much among themselves. attention: the share of the attention cores in the
    teacher's FLOPs, None if those are not known.
    """
    last = list(run.evaluation["models"])[-1] if run.evaluation else "teacher"
    settings = {(measured["machine"], measured["clips"]) for measured in run.speed.values()}
    if last == "teacher" or not {"teacher", last} <= set(run.speed) or len(settings) > 1:
        return None
    clips = run.speed[last]["clips"]
    models = {
        name: {"mean": measured["seconds"] / clips, "low": measured["low"] / clips, "high": measured["high"] / clips}
        for name, measured in run.speed.items()
    }
    teacher, final, attention = models["teacher"], models[last], None
    alike = [model["mean"] for name, model in models.items() if name != "teacher"]
    overlap = final["low"] <= teacher["high"] and teacher["low"] <= final["high"]
    if tables:
        blocks, forward = sum(tables[0]["blocks_at"].values()), tables[0]["forward"]["teacher"]
        attention = blocks * tables[0]["teacher"]["core"] / forward
    return {
        "models": models,
        "teacher": teacher["mean"],
        "last": final["mean"],
        "saved": 1 - final["mean"] / teacher["mean"],
        "noise": overlap or max(alike) - min(alike) >= abs(teacher["mean"] - final["mean"]),
        "machine": run.speed[last]["machine"],
        "attention": attention,
    }


def made(made_by: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The commands of a run, its machine (None if there were several), and the wall time of each of its stages."""
    if not made_by:
        return None
    machines = {stage["machine"] for stage in made_by.values()}
    return {
        "commands": list(dict.fromkeys(stage["command"] for stage in made_by.values())),
        "machine": machines.pop() if len(machines) == 1 else None,
        "total": clock(sum(stage["seconds"] for stage in made_by.values())),
        "ended": max(stage["ended"] for stage in made_by.values())[:16].replace("T", ", ") + " UTC",
        "stages": [{"name": name, "time": clock(stage["seconds"]), **stage} for name, stage in made_by.items()],
    }


def stages(config: ConfigDict | None) -> dict[str, tuple[str, str]]:
    """name -> (label, meaning) of the models that the page compares."""
    control, steps, start = False, None, "the hybrid model"
    if config is not None:
        control, steps = config.finetune.subject == "teacher", config.finetune.steps
        operated = "the distilled model" if config.finetune.distilled else "the model without distillation"
        start = "the original" if control else operated
    return {
        "teacher": ("Teacher", "the original model, every block with full softmax attention"),
        "not_distilled": ("No distillation", "after the operation, new parts merely calibrated"),
        "distilled": ("Distilled", "new parts trained to imitate the original attention"),
        "finetuned": (
            "Teacher, fine-tuned" if control else "Fine-tuned",
            f"{start}, trained as a whole" + (f" for {steps:,} steps" if steps is not None else ""),
        ),
    }


def finetuned_from(config: ConfigDict | None) -> str:
    """The name of the model with which fine-tuning began."""
    if config is None:
        return "distilled"
    return (
        "teacher"
        if config.finetune.subject == "teacher"
        else "distilled"
        if config.finetune.distilled
        else "not_distilled"
    )


def heat_map(errors: dict[str, Any], chosen: Sequence[Rate] | None) -> dict[str, Any]:
    """Rows by rate, cells by block: errors before and after training, and the attention share of the softmax tokens.

    heat: square root of error over largest error, for a cell's colour. A softmax block is the teacher's: error 0.
    """
    largest = max(map(max, errors["errors"])) or 1.0
    teacher_share = errors["teacher_softmax_share"]
    rows = []
    if chosen and 1 in chosen and 1 not in errors["rates"]:
        cells = [{"block": b, "error": 0.0, "heat": 0.0, "chosen": rate == 1} for b, rate in enumerate(chosen)]
        rows.append({"rate": 1, "cells": cells, "mean": 0.0, "initial_mean": 0.0})
    for column, rate in enumerate(errors["rates"]):
        cells = [
            {
                "block": block,
                "error": row[column],
                "heat": math.sqrt(row[column] / largest),
                "chosen": chosen is not None and chosen[block] == rate,
                "initial": errors["initial_errors"][block][column],
                "share": errors["softmax_share"][block][column],
                "teacher_share": teacher_share[block][column] if teacher_share else None,
            }
            for block, row in enumerate(errors["errors"])
        ]
        means = {name: float(np.mean(errors[f"{name}s"], axis=0)[column]) for name in ("error", "initial_error")}
        rows.append({"rate": rate, "cells": cells, "mean": means["error"], "initial_mean": means["initial_error"]})
    return {
        "rows": rows,
        "blocks": len(errors["errors"]),
        "samples": errors["samples"],
        "with_teacher": bool(teacher_share),
        "velocity": velocity_rows(errors, chosen),
        "velocity_samples": errors.get("velocity_samples"),
    }


def velocity_rows(errors: dict[str, Any], chosen: Sequence[Rate] | None) -> list[dict[str, Any]]:
    """Rows by rate, cells by block, of the velocity's relative RMS error; empty if it was not measured."""
    measured = np.sqrt(errors.get("velocity_errors", [])).tolist()
    largest = max(map(max, measured), default=0.0) or 1.0
    rows = []
    for column, rate in enumerate(errors["rates"] if measured else ()):
        cells = [
            {
                "error": row[column],
                "heat": math.sqrt(row[column] / largest),
                "chosen": chosen is not None and chosen[block] == rate,
            }
            for block, row in enumerate(measured)
        ]
        rows.append({"rate": rate, "cells": cells, "mean": float(np.mean([cell["error"] for cell in cells]))})
    return rows


def clips(run: RunFiles) -> dict[str, Any] | None:
    """The player's data: a row for each prompt, with scores and distances of its clips; None if there are no clips."""
    models = run.evaluation["models"] if run.evaluation else {}
    names = list(models) or [name for name in MODELS if (run.videos / name).is_dir()]
    prompts = run.prompts
    shown = min(len(prompts), run.config.evaluate.videos) if run.config is not None else len(prompts)
    rows, missing = embed({name: run.videos / name for name in names}, prompts[:shown])
    if not rows:
        if run.evaluation:
            run.absent.append("The clips: no file in evaluation/videos can be read.")
        return None
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        run.absent.append(f"Clips that are missing or cannot be read: {', '.join(missing[:3])}{more}.")
    for row in rows:
        row["notes"] = {name: clip_numbers(models[name], row["number"]) for name in row["models"] if name in models}
    labels = {name: stages(run.config).get(name, (name.replace("_", " "),))[0] for name in names}
    return {"rows": rows, "prompts": len(prompts), "labels": labels}


def clip_numbers(model: dict[str, Any], prompt: int) -> dict[str, float]:
    """A clip's distance to the teacher's clip and, if measured, its score."""
    numbers, of_clips = {"distance": model["latent_rmse"][prompt]}, clip_scores(model)
    return numbers if of_clips is None else numbers | {"score": float(of_clips[prompt])}


def training_charts(run: RunFiles) -> list[Chart]:
    """The losses of distillation by rate, and loss and gradient norm of fine-tuning."""
    if run.config is None:
        return []
    rates = sorted(run.config.hybrid.rates, key=rate_key)
    by_rate = {f"loss_{r}": rate_name(r) for r in rates if any(f"loss_{r}" in row for row in run.distilled)}
    target = {"value": "output", "attention": "weights"}[run.config.distill.loss]
    candidates = [
        line_chart(f"Distillation: error of the attention {target}, mean over blocks", run.distilled, by_rate),
        line_chart("Fine-tuning: loss", run.finetuned, {"loss": "loss"}),
        line_chart("Fine-tuning: gradient norm", run.finetuned, {"gradient_norm": "gradient norm"}),
    ]
    return [chart for chart in candidates if chart]


def parity(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each format and precision: number of parts, the worst part, its bound, and how many exceed it."""
    key = lambda row: (row["format"], row["precision"], row.get("chip", ""), row["part"] in ("all", "video"))
    size = lambda row: math.inf if row["relative_error"] is None else row["relative_error"]
    worst_rows = []
    for _, group in itertools.groupby(sorted(rows, key=key), key=key):
        group = list(group)
        worst = max(group, key=size)
        worst_rows.append({**worst, "parts": len(group), "over": sum(not row["passed"] for row in group)})
    return worst_rows


def grouped_fields(config: ConfigDict) -> dict[str, list[tuple[str, Any]]]:
    """The config's fields by section; fields outside of sections come first."""
    groups: dict[str, list[tuple[str, Any]]] = {"": []}
    for field, value in flatten(config):
        groups.setdefault(field.rpartition(".")[0], []).append((field, value))
    return groups


def versions() -> dict[str, str]:
    """The versions of the packages that made this page."""
    packages = {package: importlib.metadata.version(package) for package in ("jax", "flax")}
    return {"jsurgery": __version__} | packages | {"python": platform.python_version()}
