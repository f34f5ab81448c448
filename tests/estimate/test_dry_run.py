"""`--dry_run`: what it tells, against sums by hand, and what it refuses."""

import json
import re

import jax
import pytest

from jsurgery.cli import main
from jsurgery.load_config import load_config
from jsurgery.wan.cost import core_flops, workload
from jsurgery.wan.model_sizes import PUBLISHED

# Wan2.1 1.3B: parameters, and those of the feature maps of a block at a rate (12 heads, two layers of width 256).
PARAMETERS = 1_418_996_800
MAPS = 2 * 12 * (128 * 256 + 256 * 256 + 2 * 256 + 1)
GIB, GB = 2**30, 1e9


def dry_run(tmp_path, *flags, config="wan_1_3b_lowres@v5e-8", command="surgery"):
    report = tmp_path / "dry.json"
    code = main(
        [command, f"--config={config}", f"--workdir={tmp_path / 'run'}", "--dry_run", f"--json={report}", *flags]
    )
    assert not (tmp_path / "run").exists(), "a dry run wrote to the workdir"
    return code, json.loads(report.read_text()) if report.exists() else None


def test_a_whole_surgery_from_prompts_alone_on_one_free_session(tmp_path, capsys):
    code, found = dry_run(tmp_path, "--disk=100", "--kept=20")
    output = capsys.readouterr().out
    assert code == 0 and "fine-tuning reads the 184 clips" in output and "nothing is run or measured" in output
    phases = {(row["stage"], row["phase"]): row for row in found["phases"]}
    assert found["devices"] == 8 and len(phases) == 10
    assert all(row["bytes"] < 0.95 * 16 * GIB for row in phases.values())
    training = phases["finetune", "fine-tuning"]
    assert training["mesh"] == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    # The blocks' matrices are divided by 8. The embeddings are not, nor biases, norms and modulation (under a percent).
    embeddings = 1536 * (4096 + 1536 + 256 + 1536 + 9216 + 64 + 64)
    parameters = PARAMETERS + 15 * MAPS
    expected = 3 * 4 * (embeddings + (parameters - embeddings) / 8)
    assert expected < training["held"]["parameters and their moments"] < 1.01 * expected
    weights = phases["trace", "sampling"]["held"]["weights"]
    assert 2 * PARAMETERS < weights < 2.05 * PARAMETERS, "16 bits a weight"
    maps = phases["distill", "distillation"]["held"]["feature maps and their moments"]
    assert maps == 3 * 4 * 30 * 4 * MAPS
    disk = {row["stage"]: row for row in found["disk"]}
    assert disk["finetune"]["kept"] == pytest.approx(4 * parameters, rel=1e-3)
    assert disk["finetune"]["scratch"] == 2 * 3 * disk["finetune"]["kept"], "a checkpoint, and its successor"
    assert sum(row["kept"] for row in found["disk"]) < 20 * GB
    hours = sum(row["hours"] for row in found["hours"])
    assert 0.5 < hours <= 6 and {row["stage"] for row in found["hours"]} >= {"trace", "distill", "finetune"}


@pytest.mark.parametrize(
    ("flags", "config", "code", "parts"),
    [
        ((), "wan_1_3b_lowres@v5e-1", 3, ["finetune", "95% of 16 GiB", "found", "v5e-8 and 8xh100 would do"]),
        ((), "wan_1_3b_lowres@4090", 3, ["finetune", "95% of 24 GiB"]),
        (("--disk=30",), "wan_1_3b_lowres@v5e-8", 2, ["--workdir=", "found 30.0 GB"]),
        (("--disk=100", "--kept=5"), "wan_1_3b_lowres@v5e-8", 2, ["--kept=5", "the results take"]),
        (("--config.model.path=/no/such/model",), "wan_1_3b_lowres@v5e-8", 2, ["/no/such/model"]),
        ((), "wan_1_3b_lowres@v9-1", 2, ["wan_1_3b_lowres@v9-1", "v5e-8"]),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(tmp_path, capsys, flags, config, code, parts):
    assert dry_run(tmp_path, *flags, config=config)[0] == code
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("jsurgery: ")]
    assert all(part in line for part in parts), line


def test_a_numeric_budget_takes_its_share_of_the_attention(tmp_path, capsys):
    flops = {}
    for budget in ("1.0", "0.7", "15R2", "0.3"):
        code, found = dry_run(tmp_path, "--disk=100", f"--config.plan.budget={budget}")
        assert code == 0
        flops[budget] = next(row["flops_per_step"] for row in found["hours"] if row["stage"] == "finetune")
    config = load_config("wan_1_3b_lowres", {})
    cores = 30 * core_flops(workload(config, PUBLISHED["Wan2.1 1.3B"]), 1)
    passes = config.finetune.batch * (3 + (config.model.remat != "none"))
    assert flops["1.0"] - flops["0.7"] == pytest.approx(0.3 * cores * passes, rel=1e-6)
    assert flops["0.3"] < flops["0.7"] < flops["15R2"] < flops["1.0"]
    assert dry_run(tmp_path, "--config.plan.budget=0.2")[0] == 2
    assert "the cheapest plan of rates" in capsys.readouterr().err


def test_missing_prompts_are_told_before_anything_else(tiny_pipeline, tmp_path, capsys):
    flags = [f"--config.model.path={tiny_pipeline}", "--config.prompts=/no/prompts.txt"]
    assert dry_run(tmp_path, *flags, config="tiny")[0] == 2
    assert "/no/prompts.txt: no such file" in capsys.readouterr().err


def test_this_machine_is_the_default(tmp_path, capsys):
    code, found = dry_run(tmp_path, config="tiny")
    assert code == 0 and found["machine"] == jax.devices()[0].device_kind and not found["hours"]
    assert re.search(r"\| finetune \| fine-tuning \| 1 device \|", capsys.readouterr().out)


def test_a_disk_too_small_is_foreseen_by_the_command_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jsurgery.surgery.disk.free_bytes", lambda folder: 1000)
    assert main(["surgery", "--config=tiny", f"--workdir={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "of free disk, found 0.0 GB" in line and not (tmp_path / "run" / "trace").exists()


@pytest.mark.parametrize(
    ("command", "flags", "videos"),
    [
        ("sample", ["--prompts_file=PROMPTS", "--output=OUT"], 3),
        ("synthesize", ["--prompts_file=PROMPTS", "--workdir=OUT"], 3),
        ("encode", ["--videos=CLIPS", "--workdir=OUT"], 2),
        ("evaluate vbench", ["--prompts=PROMPTS", "--output=OUT", "--seeds=2"], 6),
        (
            "evaluate fidelity",
            ["--teacher=tiny_wan", "--model", "tiny_wan", "--prompts_file=PROMPTS", "--workdir=OUT", "--durations=5,9"],
            3 * 3 * 2,
        ),
    ],
)
def test_other_commands_that_compute(tmp_path, command, flags, videos):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    (tmp_path / "clips").mkdir()
    for name in ("a", "b"):
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(b"")
        (tmp_path / "clips" / f"{name}.txt").write_text(name)
    places = {"PROMPTS": "prompts.txt", "CLIPS": "clips", "OUT": "out"}
    for word, place in places.items():
        flags = [flag.replace(word, str(tmp_path / place)) for flag in flags]
    report = tmp_path / "dry.json"
    arguments = [*command.split(), *flags, "--config=wan_1_3b@v5e-8", "--dry_run", f"--json={report}"]
    assert main(arguments) == 0 and not (tmp_path / "out").exists()
    found = json.loads(report.read_text())
    assert {row["stage"] for row in found["phases"]} == {command.split()[-1]}
    (hours,) = found["hours"]
    assert hours["steps"] == (videos if command == "encode" else videos * 100)
