"""The evidence table on a random model: its arms, standard deviations over seeds, and resuming."""

import json

import numpy as np
import pytest

from jsurgery.ablate.evidence import evaluation_stage, finetune_stage
from jsurgery.cli import main
from jsurgery.load_config import load_config
from jsurgery.run import Run

SIZES = {
    "video.frames": 5, "video.height": 64, "video.width": 48, "sampler.steps": 2, "trace.prompts": 3,
    "trace.holdout": 1, "trace.keep_steps": 2, "trace.batch": 3, "hybrid.rates": '(2, 8, "linear")', "distill.steps": 2,
    "plan.rates": "(2, 8)", "plan.budget": "2R2", "finetune.steps": 1, "finetune.batch": 2, "data.clips": 4,
    "evaluate.prompts": 2, "evaluate.batch": 2, "evaluate.validation_clips": 8, "evaluate.videos": 1, "log_every": 1,
    "finetune.teacher_weight": 0,  # else there is nothing for the teacher to learn
}  # fmt: skip
ARMS = ["teacher", "teacher_finetuned"] + [
    f"{plan}_{arm}"
    for plan in ("all", "half")
    for arm in ("not_distilled", "distilled", "finetuned", "no_linear", "no_linear_finetuned")
]


@pytest.fixture(scope="module")
def ablated(tiny_pipeline, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("evidence")
    arguments = [f"--config.{field}={value}" for field, value in SIZES.items()]
    arguments += ["ablate", "--table=evidence", "--seeds=2", "--config=tiny", f"--workdir={workdir}"]
    arguments += [f"--config.model.path={tiny_pipeline}"]
    assert main(arguments) == 0
    return workdir, arguments


def test_the_table_has_every_arm_with_its_standard_deviation(ablated):
    workdir, _ = ablated
    table = json.loads((workdir / "evidence.json").read_text())
    assert list(table["arms"]) == ARMS
    first, second = (seed["arms"] for seed in table["per_seed"])
    for arm in ARMS:
        for measure in ("validation_loss", "latent_rmse"):
            (mean, deviation), a, b = table["arms"][arm][measure], first[arm][measure], second[arm][measure]
            assert mean == pytest.approx((a + b) / 2) and deviation == pytest.approx(abs(a - b) / 2**0.5, abs=1e-9)
        assert "total" in table["arms"][arm]
    assert first["teacher"]["latent_rmse"] == 0 < first["teacher_finetuned"]["latent_rmse"]
    losses = [first[arm]["validation_loss"] for arm in ARMS]
    assert len(set(losses)) == len(losses)  # twelve different models
    assert first["teacher"]["validation_loss"] != second["teacher"]["validation_loss"]


def test_plan_half_converts_the_blocks_of_smallest_error(ablated):
    workdir, _ = ablated
    for seed in (0, 1):
        found = json.loads((workdir / "evidence.json").read_text())["per_seed"][seed]
        errors = json.loads((workdir / f"seed{seed}" / "distill" / "errors.json").read_text())
        at_rate_8 = [row[1] for row in errors["errors"]]
        assert found["plans"]["all"] == [8, 8]
        assert found["plans"]["half"] == [8 if block == np.argmin(at_rate_8) else 1 for block in (0, 1)]
        assert found["attention_error_by_rate"]["8"] == pytest.approx(np.mean(at_rate_8))


def test_running_again_makes_nothing_new(ablated):
    workdir, arguments = ablated
    kept = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.safetensors")}
    table = (workdir / "evidence.json").read_text()
    assert len(kept) > 10 and main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*.safetensors")} == kept
    assert (workdir / "evidence.json").read_text() == table


FINETUNE_FIELDS = [
    f"finetune.{name}"
    for name in (
        "accumulate", "batch", "clip_norm", "condition_dropout", "distilled", "ema", "learning_rate", "schedule",
        "steps", "subject", "teacher_weight", "warmup", "weight_decay",
    )
]  # fmt: skip
HYBRID_FIELDS = ["activation", "degree", "lattice", "layers", "linear_branch", "rates", "stabilizer"]
DISTILL_FIELDS = [
    "batch", "calibrate", "learning_rate", "loss", "steps", "updates_per_batch", "velocity_steps", "weight_decay",
]  # fmt: skip


def test_stages_record_the_same_fields_as_in_existing_runs(tmp_path):
    """Another recorded field would make the results of existing runs, hours of work, unusable."""
    run = Run(load_config("tiny_evidence"), str(tmp_path))
    assert sorted(run.stages["distill"].made_with) == [
        *(f"distill.{name}" for name in DISTILL_FIELDS), *(f"hybrid.{name}" for name in HYBRID_FIELDS), "stage trace",
    ]  # fmt: skip
    finetune, evaluation = finetune_stage(run, "all"), evaluation_stage(run)
    assert (finetune.name, evaluation.name) == ("finetune_all", "evidence")
    assert sorted(finetune.made_with) == [*FINETUNE_FIELDS, "stage distill", "stage latents"]
    evaluate_fields = [f"evaluate.{name}" for name in ("batch", "prompts", "validation_clips", "videos")]
    assert sorted(evaluation.made_with) == [*evaluate_fields, *FINETUNE_FIELDS, "stage distill", "stage latents"]
