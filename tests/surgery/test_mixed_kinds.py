"""A surgery whose candidates are of several families, on a random model; what comes after it.

`FULL_GRID=1` runs all stages. Otherwise fine-tuning and evaluation, which only call the model, are left out.
"""

import json

import numpy as np
import pytest

from jsurgery.attention.kinds.registry import kind_of
from jsurgery.cli import main
from jsurgery.wan.checkpoint import load_transformer
from tests.conftest import FULL_GRID

RATES = (2, "linear", "C1O1", "S30B4")
SIZES = {
    "video.frames": 9, "video.height": 64, "video.width": 48, "sampler.steps": 2, "trace.prompts": 3,
    "trace.holdout": 1, "trace.keep_steps": 2, "trace.batch": 3, "hybrid.rates": RATES, "distill.steps": 2,
    "distill.velocity_steps": 1, "plan.rates": ("C1O1", "S30B4"), "plan.budget": "1C1O1+1S30B4", "finetune.steps": 1,
    "finetune.batch": 2, "data.clips": 2, "evaluate.prompts": 1, "evaluate.validation_clips": 2, "evaluate.videos": 1,
    "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def surgery(tiny_pipeline, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mixed")
    arguments = [f"--config.{field}={value}" for field, value in SIZES.items()]
    arguments += [f"--config.model.path={tiny_pipeline}", "--config=tiny", f"--workdir={workdir}"]
    for command in ("surgery",) if FULL_GRID else ("trace", "distill", "plan", "operate", "report"):
        assert main([command, *arguments]) == 0
    return workdir, arguments


def test_every_stage_knows_every_kind(surgery):
    workdir, _ = surgery
    read = lambda name: json.loads((workdir / name).read_text())
    errors = read("distill/errors.json")
    assert errors["rates"] == list(RATES)
    for name in ("errors", "initial_errors", "velocity_errors"):
        assert np.shape(errors[name]) == (2, len(RATES)) and np.all(np.array(errors[name]) > 0)
    plan = read("plan/plan.json")
    assert set(plan["rates"]) <= {"C1O1", "S30B4"} and plan["cost_flops"] <= plan["budget_flops"]
    config = load_transformer(workdir / "hybrid").config
    assert config.rates == tuple(plan["rates"]) and config.hybrid.to_json()["format_version"] == 2
    report = (workdir / "report.html").read_text()
    assert set(plan["rates"]) == {"C1O1", "S30B4"} and all(
        kind_of(rate).description in report for rate in plan["rates"]
    )
    if FULL_GRID:
        evaluation = read("evaluation/evaluation.json")["models"]
        assert all(np.isfinite(of["latent_rmse"]).all() for of in evaluation.values())


def test_plan_and_cost_name_the_kinds(surgery, capsys):
    _, arguments = surgery
    assert main(["plan", *arguments]) == 0
    assert "softmax within chunks of" in capsys.readouterr().out
    assert main(["cost", *arguments[:-1], "--plan=1R2+1C1O1"]) == 0
    assert "C1O1" in capsys.readouterr().out


def test_export_refuses_the_kinds_by_name(surgery, capsys):
    workdir, arguments = surgery
    sizes = [argument for argument in arguments if argument.startswith("--config.video")]
    assert main(["export", f"--workdir={workdir}", f"--model={workdir / 'hybrid'}", *sizes]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "export knows softmax, R-hybrids and linear blocks, found" in line
    assert not (workdir / "export").exists()
