"""`jsurgery bench transformer`: its report, and the difference between the two models in it."""

import json

import numpy as np
import pytest
import torch
from flax import nnx

from jsurgery.bench import transformer
from jsurgery.cli import main
from jsurgery.io import results
from jsurgery.wan.checkpoint import load_transformer

SIZE = ["--frames=5", "--height=32", "--width=48", "--text_length=7", "--runs=2"]


@pytest.fixture(autouse=True)
def restore_torch_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_report_with_random_weights(tmp_path, capsys):
    report = tmp_path / "bench.json"
    assert main(["bench", "transformer", "--size=tiny", f"--json={report}", *SIZE]) == 0
    printed = capsys.readouterr().out
    found = json.loads(report.read_text())
    assert "run 2: ours" in printed and "median" in printed and found["machine"]["name"] in printed
    assert found["latents"] == [1, 2, 4, 6, 4] and (found["dtype"], found["reference"]) == ("float32", "diffusers")
    ratios = [run["ours_s"] / run["reference_s"] for run in found["runs"]]
    assert len(ratios) == 2 and found["spread"] == [min(ratios), max(ratios)]
    assert found["median_ratio"] == pytest.approx(np.mean(ratios))
    assert found["relative_difference"] < 1e-5
    assert torch.get_num_threads() == found["machine"]["threads"]
    assert 0 < found["peak_bytes_before"] <= found["peak_bytes"] and found["load_s"] > 0


def test_report_on_a_folder_in_bfloat16(tiny_pipeline, tmp_path):
    report = tmp_path / "bench.json"
    command = ["bench", "transformer", f"--model={tiny_pipeline}", "--dtype=bfloat16", f"--json={report}", *SIZE]
    assert main(command) == 0
    assert 1e-4 < json.loads(report.read_text())["relative_difference"] < 0.05


def test_control_a_changed_bias_is_reported_as_a_difference(tiny_pipeline, tmp_path, monkeypatch):
    def other(folder, dtype):
        model = load_transformer(folder, dtype)
        nnx.update(model.proj_out, nnx.State({"bias": model.proj_out.bias[...] + 0.1}))
        return model

    monkeypatch.setattr(transformer, "load_transformer", other)
    report = tmp_path / "bench.json"
    assert main(["bench", "transformer", f"--model={tiny_pipeline}", f"--json={report}", *SIZE]) == 0
    assert json.loads(report.read_text())["relative_difference"] > 1e-3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["vae"], ["vae: unknown command of `jsurgery bench`"]),
        (["transformer", "--frames=2"], ["--frames", "4k + 1"]),
        (["transformer", "--runs=0"], ["--runs", "positive"]),
        (["transformer", "--width=32000"], ["width axis"]),
        (["transformer", "--size=tiny", "--model=tiny_wan"], ["not allowed with"]),
        (["transformer", "--model=/no/such/model"], ["/no/such/model", "no such folder"]),
    ],
)
def test_bad_arguments_are_refused(arguments, parts, monkeypatch, capsys):
    monkeypatch.setattr(transformer, "random_model", None)
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line


def test_number_of_threads_follows_the_settings_of_xla(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    assert results.xla_threads() == 1
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("NPROC", "3")
    assert results.xla_threads() == 3
