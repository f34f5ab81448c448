"""evidence: does each step of the surgery help? Runs the stages of a surgery and evaluates all arms together."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.ablate.write_table import cell
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.evaluate.statistics import MeanAndStd, mean_and_std
from jsurgery.evaluate.surgery_models import evaluate
from jsurgery.io.files import write_json
from jsurgery.io.results import markdown_table
from jsurgery.rates import Rate
from jsurgery.run import Run
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.surgery.distillation.saved_maps import load_maps, read_errors
from jsurgery.surgery.finetune import finetune
from jsurgery.surgery.operate import operate, save_model
from jsurgery.wan.checkpoint import load_transformer
from jsurgery.wan.transformer import WanTransformer

EVIDENCE_RATE = 8


def evidence(config: ConfigDict, workdir: str, seeds: int) -> str:
    """Compares arms of two plans, which convert all blocks or half of them to rate 8, with the teacher.

    Arms of each plan: not distilled (calibrated initial maps), distilled, distilled and fine-tuned, no linear branch,
    and no linear branch but fine-tuned. The teacher is also measured after the same fine-tuning. Leaves `evidence.json`
    and `evidence.md` in the workdir; returns the Markdown.
    """
    per_seed = [evidence_of_seed(config, epath.Path(workdir) / f"seed{seed}", seed) for seed in range(seeds)]
    table = {"seeds": seeds, "prompts": config.evaluate.prompts, "arms": spreads(per_seed), "per_seed": per_seed}
    write_json(epath.Path(workdir) / "evidence.json", table)
    text = markdown(table)
    (epath.Path(workdir) / "evidence.md").write_text(text)
    print(text)
    return text


def evidence_of_seed(config: ConfigDict, workdir: epath.Path, seed: int) -> dict[str, Any]:
    """Runs all arms with one seed, which decides the prompts, all noise, the initial maps and the order of the data."""
    config = config.copy_and_resolve_references()
    config.unlock()
    config.seed = seed
    run = Run(config.lock(), str(workdir))
    run.write_config()
    run.run_stage("trace")
    run.run_stage("distill")
    run.run_stage("latents")
    errors = read_errors(run.stages["distill"].folder)

    blocks = run.model_config.num_layers
    column = errors["rates"].index(EVIDENCE_RATE)
    best = np.argsort([row[column] for row in errors["errors"]], kind="stable")
    plans: dict[str, list[Rate]] = {
        "all": [EVIDENCE_RATE] * blocks,
        "half": [EVIDENCE_RATE if block in best[: blocks // 2] else 1 for block in range(blocks)],
    }
    models: dict[str, Callable[[], WanTransformer]] = {"teacher": lambda: run.teacher}
    models["teacher_finetuned"] = finetuned(run, "teacher", lambda: load_teacher(run))
    for name, rates in plans.items():
        hybrid = HybridConfig.of(config, rates)
        no_linear = dataclasses.replace(hybrid, linear_branch=False)
        build = functools.partial(build_hybrid, run, hybrid)
        models[f"{name}_not_distilled"] = functools.partial(build, "initial")
        models[f"{name}_distilled"] = functools.partial(build, "feature_maps")
        models[f"{name}_finetuned"] = finetuned(run, name, functools.partial(build, "feature_maps"))
        models[f"{name}_no_linear"] = lambda plan=no_linear: operate(run.teacher_to_train, plan, None)
        models[f"{name}_no_linear_finetuned"] = finetuned(
            run, f"{name}_no_linear", lambda no_linear=no_linear: operate(load_teacher(run), no_linear, None)
        )
    # All models on the same mesh: for parameters placed differently, everything would be compiled again.
    models = {name: lambda load=load: run.put_on_mesh(load()) for name, load in models.items()}
    evaluated = evaluation_stage(run)
    evaluated.run(evaluate, config, run.pipeline, models, run.validation_latents, evaluated.folder)

    results = json.loads((evaluated.folder / "evaluation.json").read_text())["models"]
    arms = {name: measures(result) for name, result in results.items()}
    by_rate = {
        str(rate): float(np.mean([row[i] for row in errors["errors"]])) for i, rate in enumerate(errors["rates"])
    }
    return {
        "plans": plans,
        "arms": arms,
        "attention_error_by_rate": by_rate,
        "softmax_share": {
            "rates": errors["rates"],
            "blocks": errors["softmax_share"],
            "teacher": errors["teacher_softmax_share"],
        },
    }


def evaluation_stage(run: Run) -> StageFolder:
    return StageFolder(
        run.workdir,
        "evidence",
        run.config,
        ("evaluate", "finetune"),
        after=[run.stages[name] for name in ("distill", "latents")],
    )


def finetune_stage(run: Run, name: str) -> StageFolder:
    return StageFolder(
        run.workdir,
        f"finetune_{name}",
        run.config,
        ("finetune",),
        after=[run.stages[name] for name in ("distill", "latents")],
    )


def load_teacher(run: Run) -> WanTransformer:
    """A copy of the teacher that training may change."""
    return operate(run.teacher_to_train, HybridConfig(rates=(1,) * run.model_config.num_layers), None)


def build_hybrid(run: Run, hybrid: HybridConfig, maps: str) -> WanTransformer:
    loaded = load_maps(run.stages["distill"].folder / f"{maps}.safetensors", hybrid.rates, hybrid.feature_map)
    return operate(run.teacher_to_train, hybrid, loaded)


def finetuned(run: Run, name: str, build: Callable[[], WanTransformer]) -> Callable[[], WanTransformer]:
    """A function that loads the fine-tuned model. Its first call trains the model, starting from `build()`."""

    def load() -> WanTransformer:
        stage = finetune_stage(run, name)
        model = stage.folder / "model"

        def work() -> None:
            save_model(finetune(run.config, build(), run.pipeline, run.training_latents, stage.folder), model, run.base)

        stage.run(work)
        return load_transformer(model, jnp.dtype(run.config.model.dtype), inference=True)

    return load


def measures(result: dict[str, Any]) -> dict[str, float]:
    row = {"validation_loss": result["validation_loss"], "latent_rmse": float(np.mean(result["latent_rmse"]))}
    if "score" in result:
        normalized = {dimension: score["normalized"] for dimension, score in result["score"].items()}
        row |= {dimension: np.nan if value is None else value for dimension, value in normalized.items()}
    return row


def spreads(per_seed: Sequence[dict[str, Any]]) -> dict[str, dict[str, MeanAndStd]]:
    """arm -> measure -> [mean, standard deviation over seeds]."""
    first = per_seed[0]["arms"]
    return {
        arm: {m: mean_and_std([seed["arms"][arm][m] for seed in per_seed]) for m in row} for arm, row in first.items()
    }


def markdown(table: dict[str, Any]) -> str:
    columns = list(next(iter(table["arms"].values())))
    body = [[arm, *(cell(row[column]) for column in columns)] for arm, row in table["arms"].items()]
    errors = [seed["attention_error_by_rate"] for seed in table["per_seed"]]
    by_rate = ", ".join(f"{rate}: {np.mean([e[rate] for e in errors]):.4f}" for rate in errors[0])
    head = [f"tiny model, {table['seeds']} seeds", *columns]
    shares = [seed["softmax_share"] for seed in table["per_seed"]]
    hybrid, teacher = (np.mean([share[side] for share in shares], axis=0) for side in ("blocks", "teacher"))
    cells = lambda of_hybrid, of_teacher: [f"{a:.3f} ({b:.3f})" for a, b in zip(of_hybrid, of_teacher, strict=True)]
    by_block = [[f"block {i}", *cells(*rows)] for i, rows in enumerate(zip(hybrid, teacher, strict=True))]
    return "\n".join(
        [
            markdown_table(head, body),
            f"\nRelative L1 error of attention, mean over blocks and seeds: {by_rate}",
            "\nShare of the denominator that the softmax tokens carry, after distillation (and in the teacher):\n",
            markdown_table(["rate", *map(str, shares[0]["rates"])], by_block),
            "",
        ]
    )
