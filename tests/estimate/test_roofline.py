"""`jsurgery roofline` against sums done by hand, and its errors."""

import json

import pytest

from jsurgery.cli import main

NOTHING = {"flops": 0, "hbm_bytes": 0, "exchanged_bytes": 0, "mesh": {"data": 1, "fsdp": 1}}
FORWARD = 30 * (6.594e12 + 0.618e12 + 0.417e12 + 1.803e12)  # Wan2.1 1.3B, 32,760 tokens, without the embeddings


def run(tmp_path, *flags: str) -> dict:
    report = tmp_path / "roofline.json"
    assert main(["roofline", "--config=wan_1_3b", "--config.distill.mode=traces", f"--json={report}", *flags]) == 0
    return json.loads(report.read_text())


def test_chip_hours_are_steps_times_flops_over_achieved_flops_per_second(tmp_path, capsys):
    found = run(tmp_path, "--topology=v6e:4x4", "--efficiency=0.5", "--clips=100")
    text, trace, distill, attention, velocity, finetune, evaluate, decode, synthesis = found["stages"]
    assert found["chips"] == 16
    assert (
        trace["steps"] == 512 * 50 * 2 and evaluate["steps"] == 4 * 16 * 50 * 2 and synthesis["steps"] == 100 * 50 * 2
    )
    assert velocity["steps"] == 8 * (1 + 30 * 4) and velocity["flops_per_step"] == pytest.approx(FORWARD, rel=0.005)
    hours = trace["steps"] * FORWARD / (0.5 * 918e12) / 3600
    assert trace["chip_hours"]["expected"] == pytest.approx(hours, rel=0.005)
    assert trace["chip_hours"]["bound"] == pytest.approx(hours / 2, rel=0.005)
    saved = 15 * 6.594e12 * (1 - 1 / 2)  # the core of 15R2, without the linear branch
    assert finetune["flops_per_step"] == pytest.approx(16 * 4 * (FORWARD - saved), rel=0.02)
    # Bytes a channel of each of the 32,760 tokens in 30 blocks: four float32 results of softmax are written; a rate
    # reads its linear keys and values twice and the queries, in 16 bits, and two of the results (for "linear" one).
    branches = 4 * 4 + sum(2 * (4 * (1 - kept) + 1) + (8 if kept else 4) for kept in (1 / 2, 1 / 4, 1 / 8, 0))
    moved = branches * 32760 * 1536 * 30
    assert distill["seconds"]["memory"] == pytest.approx(moved / 16 / 1.6e12 + trace["seconds"]["memory"], rel=1e-6)
    assert {row["bound_by"] for row in found["stages"]} == {"compute"}
    assert "least traffic" in trace["counted_by"]
    # UMT5-XXL has 4.6 B parameters in its layers, each used once a token, by one chip while the others wait.
    assert text["seconds"]["compute"] == pytest.approx(2 * 512 * 4.6e9 / 918e12, rel=0.05)
    assert attention["steps"] == 100 and attention["flops_per_step"] == pytest.approx(distill["flops_per_step"])
    assert decode["steps"] == 4 * 6 and decode["seconds"]["compute"] < 24 * 300e12 / 16 / 918e12
    total = sum(row["chip_hours"]["expected"] for row in found["stages"]) - synthesis["chip_hours"]["expected"]
    assert found["chip_hours"]["expected"] == pytest.approx(total)
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("work", "seconds", "bound", "expected"),
    [
        ((197e12, 8e11, 1e11), (1, 1, 1), "compute", 2.5),
        ((197e12, 3.2e12, 2e11), (1, 4, 2), "memory", 10),
        ((197e12, 8e11, 1e12), (1, 1, 10), "exchange", 10),
    ],
)
def test_the_longest_of_three_times_of_a_compiled_program_is_its_bound(
    tmp_path, capsys, work, seconds, bound, expected
):
    """Only compute and memory get longer at 40 % of the peaks. Evaluation takes a part of a step of the sampler."""
    flags = ["--topology=v5e:4x4", "--config.evaluate.batch=4"]
    for stage in ("finetune", "sample"):
        fields = dict(zip(("flops", "hbm_bytes", "exchanged_bytes"), work, strict=True))
        (tmp_path / stage).write_text(json.dumps({"stage": stage, "topology": "v5e:4x4"} | NOTHING | fields))
    *_, finetune, evaluate, _ = run(
        tmp_path, *flags, "--compiled", str(tmp_path / "finetune"), str(tmp_path / "sample")
    )["stages"]
    assert tuple(finetune["seconds"].values()) == pytest.approx(seconds)
    assert tuple(8 * each for each in evaluate["seconds"].values()) == pytest.approx(seconds)  # 4 videos, 2 velocities
    assert finetune["bound_by"] == evaluate["bound_by"] == bound
    assert finetune["step_seconds"] == {"bound": pytest.approx(max(seconds)), "expected": pytest.approx(expected)}
    assert finetune["flops_per_step"] == pytest.approx(16 * 197e12)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.endswith("| compiled program |") for row in rows] == [False] * 6 + [True] * 2 + [False]


def test_a_file_of_all_stages_gives_every_stage_its_exchange(tmp_path, capsys):
    """Errors are measured on an example for each of 8 parts of the batch at once; a step of trace has 2 velocities."""
    work = {"flops": 197e12, "hbm_bytes": 8e11, "exchanged_bytes": 1e11, "mesh": {"data": 4, "fsdp": 2}}
    programs = ("text", "trace", "distill", "attention_errors", "velocity_errors", "finetune", "sample")
    phases = [{"program": name} | work for name in programs] + [{"program": "decode", "error": "too large"}]
    (tmp_path / "all.json").write_text(json.dumps({"topology": "v5e:4x4", "phases": phases}))
    rows = run(tmp_path, "--topology=v5e:4x4", "--config.evaluate.batch=4", "--compiled", str(tmp_path / "all.json"))
    seconds = {row["stage"]: row["seconds"]["compute"] for row in rows["stages"]}
    expected = {"trace": 1 / 2, "distill": 1, "finetune": 1, "evaluate": 1 / 8}
    expected |= {"attention errors of blocks": 1 / 8, "velocity errors of blocks": 1 / 8}
    assert {stage: seconds[stage] for stage in expected} == pytest.approx(expected)
    assert "?" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v7:4x4"], "--topology: expected one like v5e:4x4"),
        (["--topology=v5e:4x"], "--topology: expected one like v5e:4x4"),
        (["--topology=v5e:4x4", "--efficiency=1.5"], "--efficiency: expected a share"),
        (["--topology=v5e:4x4", "--compiled=none.json"], "none.json: expected a file of `jsurgery compile --json`"),
    ],
)
def test_bad_input_is_refused(flags, message, capsys):
    assert main(["roofline", "--config=wan_1_3b", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_report_compiled_for_another_topology_is_refused(tmp_path, capsys):
    compiled = tmp_path / "finetune.json"
    compiled.write_text(json.dumps({"stage": "finetune", "topology": "v5e:2x2", **NOTHING}))
    assert main(["roofline", "--config=wan_1_3b", "--topology=v5e:4x4", f"--compiled={compiled}"]) == 2
    assert "compiled for v5e:2x2, expected v5e:4x4" in capsys.readouterr().err
