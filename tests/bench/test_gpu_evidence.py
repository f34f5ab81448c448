"""`make gpu-evidence` at toy sizes, with only the packages that it may need; and rows that fail."""

import functools
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tomllib

import pytest

from jsurgery.bench.attention_programs import AttentionShape
from jsurgery.bench.gpu_evidence import __main__ as evidence
from jsurgery.bench.gpu_evidence import kernel_tests, parts
from jsurgery.bench.gpu_evidence.report import TOY_NOTE, Report
from jsurgery.bench.gpu_evidence.rows import FULL, TOY, all_rows, problem_row
from pallas_kernels import reference, stock

ROOT = pathlib.Path(__file__).parents[2]
# The packages on a machine with a GPU; jax needs scipy and ml-dtypes.
ALLOWED = {"jax", "flax", "optax", "ml-collections", "torch", "numpy", "scipy", "ml-dtypes"}
BLOCKER = """
from importlib.machinery import PathFinder

found = PathFinder.find_spec

def not_found(name, path=None, target=None):
    return None if name.partition(".")[0] in {blocked!r} else found(name, path, target)

PathFinder.find_spec = not_found
"""


def blocked_modules() -> set[str]:
    """The module names of all other dependencies, including those of extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    plain = lambda name: re.sub("[-_.]+", "-", name).lower()
    names = {plain(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements} - ALLOWED - {"jsurgery"}
    found = importlib.metadata.packages_distributions()
    return {module for module, owners in found.items() if names & set(map(plain, owners))} | {"etils", "orbax"}


def test_toy_sizes_run_to_the_end_with_only_allowed_packages(tmp_path):
    blocked = blocked_modules()
    assert {"grain", "safetensors", "sentencepiece", "diffusers", "pytest", "av", "PIL"} <= blocked
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(blocked=blocked))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}  # Python runs it when it starts
    run = functools.partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "No module named 'grain'" in run([sys.executable, "-c", "import grain"]).stderr

    done = run([sys.executable, "-m", "jsurgery.bench.gpu_evidence", f"--output={tmp_path / 'out'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(TOY_NOTE)
    found = json.loads((tmp_path / "out" / "gpu_evidence.json").read_text())
    assert found["note"] == TOY_NOTE and found["versions"]["jax"] and found["seconds"] > 0
    assert [row["name"] for row in found["rows"]] == [row.name for row in all_rows(TOY)]
    markdown = (tmp_path / "out" / "gpu_evidence.md").read_text()
    assert markdown in done.stdout
    missing = [row for row in found["rows"] if "missing" in row]
    for row in missing:
        needs_gpu = row.get("implementation") in ("cudnn", "gpu", "torch cudnn")
        assert needs_gpu or (row["implementation"], row["pass"]) == ("torch flex", "forward + backward"), row
        assert "GPU" in row["missing"] or "viable backend" in row["missing"] or "on CPU" in row["missing"]
        assert row["missing"] in markdown
    measured = [row for row in found["rows"] if "missing" not in row]
    assert all(row["passed"] for row in measured if row["group"] == "kernels")
    timed = [row for row in measured if row["group"] != "kernels"]
    assert {row["group"] for row in timed} == {"attention", "part of attention", "whole forward", "distillation step"}
    assert all(len(row["seconds"]) == TOY.runs and row["baseline"] and row["speedup"] > 0 for row in timed)
    assert not any("memory_bytes" in row for row in measured)  # an estimate of the compiler, not measured
    assert "bfloat16" not in markdown and "float32" in markdown and "Baseline, measured in turn" in markdown
    tables = [line.count("|") for line in markdown.splitlines() if line.startswith("|")]
    assert len(tables) == len(measured) + 2 * 5 and set(tables) == {8, 9}


def test_important_rows_come_first_and_all_combinations_are_there():
    rows = all_rows(FULL)
    attention = [row for row in rows if row.group == "attention"]
    assert [row.tokens for row in rows[2:26]] == [32_760] * 24
    for tokens in (12_600, 32_760, 75_600):
        for passes in ("forward", "forward + backward"):
            here = [row for row in attention if (row.tokens, row.passes) == (tokens, passes)]
            assert {row.rate for row in here if row.implementation == "gpu"} == {1, 2, 4, 8, "linear"}
            assert {row.rate for row in here if row.implementation == "stock"} == {2, 4, 8, "linear"}
            assert {"cudnn", "torch flash", "torch flex"} <= {row.implementation for row in here}
    assert [row.name for row in rows if row.group == "whole forward"] == ["softmax", "15R2", "20R8", "30R8"]
    assert [row.video for row in rows if row.group == "distillation step"] == [(81, 480, 832), (81, 320, 480)]
    assert len({json.dumps(row.shown()) for row in rows}) == len(rows)


def test_flops_of_parts_are_those_of_their_products():
    size, (n, heads, d) = AttentionShape(1001, 3, 16, "float32", "lse"), (1001, 3, 16)
    f, phi = 2 * d, 2 * (d * 2 * d + 2 * d * 2 * d)  # features of degree 2, and FLOPs of two layers
    expected = {
        "softmax_zones": 4 * n * n * d,
        "linear_state": n * (phi + 2 * f * d + f),
        "attend_with_state": n * (4 * 126 * d + phi + 2 * f * d + 2 * f),
    }
    found = {row.function: parts.part_flops(row, size) for row in all_rows(FULL) if row.group == "part of attention"}
    assert found == {name: heads * flops for name, flops in expected.items()}


class FakeWorker:
    """A worker whose rows take 30 seconds each. The first fails."""

    now = 0.0

    def __init__(self, toy):
        self.toy, self.asked = toy, 0

    def start(self, seconds):
        return {"on_gpu": True, "machine": {}, "versions": {}}

    def ask(self, row, seconds, left):
        FakeWorker.now += 30
        self.asked += 1
        return {"missing": "out of memory"} if self.asked == 1 else {"passed": True, "error": 0.0} | NUMBERS

    def stop(self):
        pass


NUMBERS = {"tolerance": 1.0, "gradient_error": 0.0, "gradient_tolerance": 1.0, "control_errors": {"other": 2.0}}


def test_rows_without_time_left_are_reported_as_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeWorker, "now", 0.0)
    monkeypatch.setattr(evidence, "Worker", FakeWorker)
    monkeypatch.setattr(evidence.time, "monotonic", lambda: FakeWorker.now)
    rows = all_rows(FULL)
    monkeypatch.setattr(evidence, "all_rows", lambda scale: [row for row in rows if row.group == "kernels"])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert evidence.gather(tmp_path, 1.25, toy=False) == 0
    found = json.loads((tmp_path / "gpu_evidence.json").read_text())
    missing = [row.get("missing") for row in found["rows"]]
    assert missing[:2] == ["out of memory", None] and "note" not in found
    assert set(missing[2:]) == {"time was up: 15 s were left of what may take 20 s"}


def test_the_first_report_has_all_rows_as_not_begun(tmp_path):
    report = Report(tmp_path, all_rows(TOY), {"note": TOY_NOTE})
    found = json.loads(report.json.read_text())
    assert {row["missing"] for row in found["rows"]} == {"not begun"}
    assert report.markdown.read_text().count("not begun") == len(found["rows"])


@pytest.mark.parametrize(("signal_name", "message"), [("SIGSTOP", "stopped after"), ("SIGKILL", "exit code -9")])
def test_a_worker_that_hangs_or_dies_loses_one_row(signal_name, message, monkeypatch):
    worker = evidence.Worker(toy=True)
    assert worker.start(120)["on_gpu"] is False
    os.kill(worker.process.pid, getattr(signal, signal_name))
    row = next(row for row in all_rows(TOY) if row.implementation == "gpu" and row.group == "attention")
    assert message in worker.ask(row, 1, lambda: 60)["missing"]
    assert worker.process is None
    if signal_name == "SIGKILL":
        assert "interpreted" in worker.ask(row, 60, lambda: 120)["missing"]  # by a new process
    worker.stop()


def test_control_a_kernel_without_the_linear_branch_fails(monkeypatch):
    def wrong(q, k, v, query_map, key_map, *, num_softmax, platform, **options):
        k, v = k[:, :num_softmax], v[:, :num_softmax]
        return reference.hybrid_attention(q, k, v, None, None, num_softmax=num_softmax, stabilizer="lse")

    monkeypatch.setattr(stock, "hybrid_attention", wrong)
    found = kernel_tests.kernel_test(problem_row(TOY, "stock", 21, 8, 16, "lse", False), TOY, on_gpu=False)
    assert not found["passed"] and found["error"] > 100 * found["tolerance"]
