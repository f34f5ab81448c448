"""`jsurgery roofline` against sums done by hand, and its errors."""

import json

import pytest

from jsurgery.cli import main

FORWARD = 30 * (6.594e12 + 0.618e12 + 0.417e12 + 1.803e12)  # Wan2.1 1.3B, 32,760 tokens, without the embeddings


def run(tmp_path, *flags: str) -> dict:
    report = tmp_path / "roofline.json"
    assert main(["roofline", "--config=wan_1_3b", "--config.distill.mode=traces", f"--json={report}", *flags]) == 0
    return json.loads(report.read_text())


def test_chip_hours_are_steps_times_flops_over_achieved_flops_per_second(tmp_path, capsys):
    found = run(tmp_path, "--topology=v6e:4x4", "--efficiency=0.5", "--clips=100")
    trace, distill, velocity, finetune, evaluate, synthesis = found["stages"]
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
    assert {row["bound_by"] for row in found["stages"]} == {"compute"}
    total = sum(row["chip_hours"]["expected"] for row in (trace, distill, velocity, finetune, evaluate))
    assert found["chip_hours"]["expected"] == pytest.approx(total)
    assert "not measured" in capsys.readouterr().out


def test_communication_can_be_the_bound(tmp_path):
    compiled = tmp_path / "finetune.json"
    for moved, seconds, bound in (
        (1e11, 1.0, "compute"),
        (1e12, 10.0, "exchange"),
    ):  # 15 PFLOP on 16 x 197 TFLOP/s: 5 s
        collectives = {
            "all-gather": {"count": 3, "bytes": 0.75 * moved},
            "all-reduce": {"count": 1, "bytes": 0.25 * moved},
        }
        compiled.write_text(json.dumps({"stage": "finetune", "topology": "v5e:4x4", "collectives": collectives}))
        finetune = run(tmp_path, "--topology=v5e:4x4", f"--compiled={compiled}")["stages"][3]
        assert finetune["seconds"]["exchange"] == pytest.approx(seconds)
        assert finetune["bound_by"] == bound


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
    compiled.write_text(json.dumps({"stage": "finetune", "topology": "v5e:2x2", "collectives": {}}))
    assert main(["roofline", "--config=wan_1_3b", "--topology=v5e:4x4", f"--compiled={compiled}"]) == 2
    assert "compiled for v5e:2x2, expected v5e:4x4" in capsys.readouterr().err
