"""Numbers that are not finite outside of training: one line names the step and the tensor, and no file is written."""

import shutil

import jax
import numpy as np
import pytest

from jsurgery import cli
from jsurgery.data.latents import clip_record
from jsurgery.data.video_writer import write_video
from jsurgery.errors import InputError
from jsurgery.io.safetensors import read_tensors, write_tensors
from jsurgery.runtime.finite import all_finite, is_finite
from jsurgery.runtime.resumable_sums import ResumableSums
from jsurgery.wan import pipeline as pipeline_module
from jsurgery.wan.model_folder import check_pipeline
from tests.faults.test_bad_input import tree

SIZE = ["--frames=5", "--height=32", "--width=48", "--steps=2"]
FIELDS = [f"--config.video.{field[2:]}" for field in SIZE[:3]] + ["--config.sampler.steps=2"]
FILES = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def poisoned(model, folder, part, tensor, value):
    """A copy of a pipeline in which the last number of a tensor is `value`, or all numbers if it is finite."""
    copy = shutil.copytree(model, folder)
    tensors = read_tensors(copy / FILES[part])
    tensors[tensor].flat[slice(None) if np.isfinite(value) else -1] = value
    write_tensors(copy / FILES[part], tensors)
    return copy


SAMPLED = [
    ("transformer", "proj_out.bias", np.nan, ["sampling: step 1 of 2", "weights proj_out/bias are not finite"]),
    ("transformer", "blocks.1.ffn.net.2.weight", np.inf, ["weights blocks/ffn_out/kernel of block 1 are"]),
    ("transformer", "blocks.1.attn1.to_v.weight", 1e38, ["all weights are finite", "block 1 is the first"]),
    ("vae", "decoder.conv_out.bias", np.inf, ["the VAE's decode chunks: frame 0 of clip 0", "decoder/conv_out/bias"]),
    (
        "text_encoder",
        "encoder.block.0.layer.0.SelfAttention.o.weight",
        3e38,
        ["text_encoder", "from encoder.block.0 on", "its weights are finite, so float32 overflows"],
    ),
    (
        "text_encoder",
        "encoder.block.0.layer.1.DenseReluDense.wo.weight",
        np.nan,
        ["text_encoder", "from encoder.block.0 on", "encoder.block.0.layer.1.DenseReluDense.wo.weight is not finite"],
    ),
]


@pytest.mark.parametrize(("part", "tensor", "value", "parts"), SAMPLED)
def test_sample_names_the_step_and_the_tensor(tmp_path, tiny_pipeline, capsys, part, tensor, value, parts):
    model = poisoned(tiny_pipeline, tmp_path / "model", part, tensor, value)
    check_pipeline(str(model))  # what its headers tell is right
    before = tree(tmp_path)
    assert cli.main(["sample", f"--model={model}", "--prompt=a red circle", f"--output={tmp_path}/o.mp4", *SIZE]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("jsurgery: ") and all(part in message for part in parts), message
    assert tree(tmp_path) == before


def test_finished_videos_are_kept(tmp_path, tiny_pipeline, monkeypatch, capsys):
    """The third step of all, the first of the second video, is said to be not finite."""
    checked = []
    monkeypatch.setattr(pipeline_module, "all_finite", lambda x: checked.append(x) or len(checked) != 3)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    command = ["sample", f"--model={tiny_pipeline}", f"--prompts_file={tmp_path}/prompts.txt", *SIZE]
    assert cli.main([*command, f"--output={tmp_path}/videos"]) == 2
    assert "sampling: step 1 of 2" in capsys.readouterr().err and len(checked) == 3
    assert [file.name for file in (tmp_path / "videos").iterdir()] == ["0000.mp4"]


def test_synthesize_writes_no_shard(tmp_path, tiny_pipeline, capsys):
    model = poisoned(tiny_pipeline, tmp_path / "model", "transformer", "proj_out.bias", np.nan)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = [f"--workdir={tmp_path}/run", f"--prompts_file={tmp_path}/prompts.txt", f"--config.model.path={model}"]
    assert cli.main(["synthesize", *given, *FIELDS, "--config.trace.keep_steps=1"]) == 2
    assert "step 1 of 2: the latents are not finite" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.array_record"))


def test_encode_writes_no_shard(tmp_path, tiny_pipeline, capsys):
    model = poisoned(tiny_pipeline, tmp_path / "model", "vae", "encoder.conv_in.bias", np.nan)
    write_video(tmp_path / "clips" / "a.mp4", np.full((9, 32, 48, 3), 99, np.uint8), 16)
    (tmp_path / "clips" / "a.txt").write_text("a grey wall")
    given = [f"--videos={tmp_path}/clips", f"--workdir={tmp_path}/run", f"--config.model.path={model}"]
    assert cli.main(["encode", *given, *FIELDS[:3]]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "encode chunks" in message and "weights encoder/conv_in/bias" in message, message
    assert not list((tmp_path / "run").rglob("*.array_record"))


def test_fidelity_keeps_the_teachers_numbers(tmp_path, tiny_pipeline, capsys):
    model = poisoned(tiny_pipeline, tmp_path / "model", "transformer", "proj_out.bias", np.nan)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = [f"--prompts_file={tmp_path}/prompts.txt", f"--workdir={tmp_path}/run", f"--teacher={tiny_pipeline}"]
    size = [field for field in SIZE if "frames" not in field]
    assert cli.main(["evaluate fidelity", *given, f"--model={model}", "--durations=5", *size]) == 2
    assert "sampling: step 1 of 2" in capsys.readouterr().err
    written = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("0*"))
    assert written == ["5/control/0000.json", "5/teacher/0000.npz"]


def test_sums_of_held_out_errors_stop_with_what_was_summed(tmp_path):
    sums = ResumableSums(tmp_path / "sums.json", "distill", "settings")
    measure = lambda number: {"error": np.array([[1.0, 2.0], [3.0, np.nan if number == 2 else 4.0]])}
    with pytest.raises(InputError, match=r"distill: errors: `error` of piece 3 of 5: not finite, first at \[1, 1\]"):
        sums.add_up("errors", 5, measure)
    assert ResumableSums(tmp_path / "sums.json", "distill", "settings").saved["errors"]["done"] == 2


def test_what_float16_cannot_hold_is_not_stored(tmp_path):
    latents, text = np.zeros((2, 4, 6, 4), np.float32), np.zeros((3, 16), np.float32)
    assert clip_record(latents + 65504, text, "x")["latents"].max() == 65504
    for bad in (65536.0, np.nan):
        with pytest.raises(InputError, match=r"latents of 'a cat': expected numbers at most 65504"):
            clip_record(latents + np.float32(bad), text, "a cat")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_is_found_among_many(value):
    array = np.full((3, 5, 7), 3e38, np.float32)  # whose sum is no float32
    assert is_finite(array) and all_finite([jax.numpy.asarray(array)])
    array[1, 4, 6] = value
    assert not is_finite(array) and not all_finite([jax.numpy.zeros(2), jax.numpy.asarray(array)])
