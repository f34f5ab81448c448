"""`evaluate fidelity`: the teacher itself, changed models and the control; metrics; resuming; refusals."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

from jsurgery.cli import main
from jsurgery.evaluate import fidelity, fidelity_numbers
from jsurgery.evaluate.fidelity_numbers import CONTROL, MetricNetworks, summarize, table, velocity_numbers
from jsurgery.wan.checkpoint import load_transformer, save_transformer

PROMPTS = ("a red circle moves left over a grey background", "a blue square stays still over a white background")


@pytest.fixture
def run(tmp_path, tiny_pipeline):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["evaluate", "fidelity", f"--teacher={tiny_pipeline}", f"--prompts_file={tmp_path / 'prompts.txt'}"]
    command += [f"--workdir={tmp_path / 'run'}", f"--json={tmp_path / 'out.json'}"]
    command += ["--height=48", "--width=64", "--steps=3", "--guidance=3"]

    def start(*arguments):
        code = main([*command, *arguments])
        return code, json.loads((tmp_path / "out.json").read_text()) if code == 0 else None

    return start


def scaled_copy(source, folder, scale):
    """A copy of the model folder with all matrices of the transformer's blocks scaled."""
    transformer = load_transformer(source / "transformer")
    for (*_, leaf), param in nnx.to_flat_state(nnx.state(transformer, nnx.Param)):
        if leaf == "kernel" and param.ndim == 3:  # of the stacked blocks
            param[...] = param[...] * scale
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "transformer")
    save_transformer(transformer, folder / "transformer")
    return folder


def test_metrics_are_better_for_a_model_that_is_changed_less(tmp_path, tiny_pipeline, run, capsys, monkeypatch):
    near, far = (scaled_copy(tiny_pipeline, tmp_path / name, s) for name, s in (("near", 1.02), ("far", 1.5)))
    paths = [str(path) for path in (tiny_pipeline, near, far)]
    code, result = run("--durations=9,5", "--model", *paths)
    assert code == 0 and [duration["frames"] for duration in result["durations"]] == [5, 9]
    assert result == json.loads((tmp_path / "run" / "fidelity.json").read_text())
    assert len(result["timesteps"]) == 3 and result["timesteps"][0] > result["timesteps"][2]
    for duration, latent_frames in zip(result["durations"], (2, 3), strict=True):
        same, close, distant, control = (duration["models"][name] for name in (*paths, CONTROL))
        assert same["psnr"] is None and same["psnr_per_frame"] == [None] * duration["frames"]
        assert same["ssim"] == pytest.approx(1, abs=1e-12) and same["velocity_error"] == same["drift"] == 0
        assert same["flicker"] == same["teacher_flicker"] and same["motion"] == same["teacher_motion"]
        assert close["psnr"] > distant["psnr"] and close["ssim"] > distant["ssim"]
        assert 0 < close["velocity_error"] < distant["velocity_error"]
        assert close["psnr"] > control["psnr"] + 3 and close["ssim"] > control["ssim"] + 0.05
        assert "velocity_error" not in control  # as the teacher has no error at any x_t
        assert len(close["velocity_error_per_step"]) == 3 and len(close["velocity_error_per_frame"]) == latent_frames
    text = capsys.readouterr().out
    assert f"| {tiny_pipeline} | 0.62 | ∞ | 1.0000 | 0.0000 | +0.00 |" in text

    monkeypatch.setattr(fidelity, "velocities", None)  # so that computing anything again would fail
    assert run("--durations=5,9", "--model", *paths)[1] == result
    assert run("--durations=5", "--model", str(near), "--seed=1")[0] == 2
    assert "seed was 0, is 1; use another --workdir" in capsys.readouterr().err


def test_velocity_errors_are_relative_norms():
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
    velocity = teacher.copy()
    velocity[1, 2] *= 1.5
    found = velocity_numbers(velocity, teacher)
    assert found["velocity_error"] == pytest.approx(np.array([[0, 0, 0], [0, 0, 0.5]]), abs=1e-6)
    share = np.linalg.norm(teacher[1, 2]) / np.linalg.norm(teacher[1])
    assert found["velocity_error_per_step"] == pytest.approx([0, 0.5 * share], rel=1e-5)


def test_summary_of_two_videos_by_hand():
    rows = [{"mse": [0.0, 16.0, 64.0], "ssim": [1.0, 0.9, 0.8]}, {"mse": [0.0, 16.0, 64.0], "ssim": [1.0, 0.7, 0.6]}]
    for row in rows:
        row |= {"flicker": 1.0, "motion": 2.0, "teacher_flicker": 3.0, "teacher_motion": 4.0}
    found = summarize(rows, np.array([0.0, 0.5, 1.0]))
    assert found["drift"] == pytest.approx(8) and found["ssim_per_frame"] == pytest.approx([1, 0.8, 0.7])
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / (80 / 3)))
    assert found["psnr_per_frame"][0] is None


def test_lpips_and_clip_scores_are_reported_when_their_networks_are_given(monkeypatch):
    """LPIPS compares two videos; CLIP scores each video, so that the teacher has its own scores."""
    rng = np.random.default_rng(0)
    video, teacher = rng.integers(0, 256, (2, 3, 32, 32, 3), np.uint8)
    clip = SimpleNamespace(scores=lambda video, prompt: {"clip_text": video.mean() + len(prompt), "clip_frames": 0.5})
    monkeypatch.setattr(fidelity_numbers, "lpips", lambda weights, one, two: weights * np.arange(1, 1 + len(one)))
    rows = [
        fidelity_numbers.video_numbers(video, teacher, prompt, MetricNetworks(np.float32(0.25), clip))
        for prompt in ("a", "two")
    ]
    found = summarize([{name: np.asarray(value) for name, value in row.items()} for row in rows], np.arange(3) / 8)
    assert found["lpips"] == 0.5 and found["lpips_per_frame"] == [0.25, 0.5, 0.75]
    assert found["clip_text"] == pytest.approx(video.mean() + 2) and found["teacher_clip_text"] == pytest.approx(
        teacher.mean() + 2
    )
    assert found["teacher_clip_frames"] == 0.5 and found["teacher_flicker"] > 0
    lines = table({"durations": [{"seconds": 0.375, "models": {"m": found}}]}).splitlines()
    assert lines[0].split(" | ")[3:6] == ["SSIM", "LPIPS", "drift (levels/s)"]
    assert lines[2].startswith("| teacher | 0.38 | – | – | – | – | ") and " | 0.5000 | " in lines[3]
    without_networks = fidelity_numbers.video_numbers(video, teacher, "a", MetricNetworks())
    assert not [name for name in without_networks if "lpips" in name or "clip" in name]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--lpips=no.safetensors"], ["no.safetensors", "no such file"]),
        (["--clip=no/such/folder/here"], ["no/such/folder/here"]),
        (["--model=no/such/model"], ["no/such/model", "no such folder"]),
        (["--durations=6"], ["--durations: frames", "5 and 9"]),
        (["--durations=5,x"], ["--durations", "'x'"]),
        (["--teacher=no/such/teacher"], ["no/such/teacher"]),
        (["--prompts_file=none.txt"], ["none.txt"]),
    ],
)
def test_bad_arguments_are_refused_before_loading(tmp_path, tiny_pipeline, run, capsys, monkeypatch, arguments, parts):
    monkeypatch.setattr(fidelity, "configured_pipeline", None)
    assert run(f"--model={tiny_pipeline}", *arguments)[0] == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_text_width_is_refused(tmp_path, tiny_pipeline, run, capsys):
    other = shutil.copytree(tiny_pipeline, tmp_path / "other")
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps(config | {"text_dim": 32}))
    (other / "transformer" / "hashes.json").unlink()
    assert run(f"--model={other}")[0] == 2
    assert "expected the teacher's text_dim = 16, found 32" in capsys.readouterr().err
