"""Bad input ends in one line on stderr and exit code 2, with nothing written. Real processes, as a user starts them."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from jsurgery.config import load_config
from jsurgery.errors import InputError
from jsurgery.run import Run
from jsurgery.wan.safetensors_files import check_tensors, read_tensors

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "video.frames": "5",
    "video.height": "64",
    "video.width": "48",
    "hybrid.rates": "(2, 8)",
    "plan.rates": "(1, 2, 8)",
    "plan.budget": "1R8",
}
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def refusal(folder: pathlib.Path, *arguments: str, code: int = 2) -> str:
    """The one line that the command leaves, run in `folder`; everything else about a refusal is checked here."""
    before = sorted(folder.rglob("*"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jsurgery", *arguments]
    ended = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith("jsurgery: ")
    assert sorted(folder.rglob("*")) == before
    return ended.stderr


def surgery(model: pathlib.Path | str, **overrides: str) -> list[str]:
    fields = SMALL | {"model.path": str(model)} | overrides
    return ["surgery", "--config=tiny", "--workdir=run", *(f"--config.{name}={text}" for name, text in fields.items())]


def truncate(file: pathlib.Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.finetune.learning_rte=1"], ["config.finetune.learning_rte", "did you mean", "learning_rate"]),
        (["--config.finetune.steps=many"], ["config.finetune.steps", "int", "'many'"]),
        (["--config.finetune.steps"], ["config.finetune.steps", "VALUE"]),
        (["--config.video.frames=16"], ["config.video.frames", "4k + 1", "13 and 17"]),
        (["--config=nowhere.py"], ["--config=nowhere.py", "no such file"]),
        (["--config=nowhere"], ["--config=nowhere", "tiny"]),
        (["--wokdir=run"], ["--wokdir=run"]),
    ],
)
def test_a_config_that_cannot_work(tmp_path, arguments, parts):
    message = refusal(tmp_path, "surgery", "--config=tiny", "--workdir=run", *arguments)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("arguments", [["surgeri", "--workdir=run"], ["surgery"], []])
def test_a_command_that_is_none(tmp_path, arguments):
    assert "--help" in refusal(tmp_path, *arguments)


def test_a_budget_below_the_cheapest_plan(tmp_path, tiny_pipeline):
    message = refusal(tmp_path, *surgery(tiny_pipeline, **{"plan.budget": "0.001"}))
    assert "config.plan.budget" in message and "cheapest" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mesh.tensor": "3"}, "expected tensor 3 to divide the 2 heads"),
        (
            {"mesh.context": "4", "mesh.exchange": "all_to_all"},
            "context 4 (all_to_all) to divide the 2 heads",
        ),
        ({"mesh.data": "3"}, "expected a batch that data 3 x fsdp 1 divides"),
        ({"mesh.fsdp": "2", "distill.batch": "2", "finetune.accumulate": "8"}, "fsdp 2 divides, found 1 examples"),
    ],
)
def test_a_mesh_that_does_not_divide_the_work(tmp_path, tiny_pipeline, overrides, message):
    assert message in refusal(tmp_path, *surgery(tiny_pipeline, **overrides), code=3)


def test_a_model_that_is_not_there(tmp_path):
    message = refusal(tmp_path, *surgery("no/such/model"))
    assert "config.model.path" in message and "no/such/model" in message and "no such folder" in message


def test_a_truncated_weight_file(tmp_path, tiny_pipeline):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    truncate(model / "transformer" / WEIGHTS["transformer"])
    message = refusal(tmp_path, *surgery("model"))
    assert f"transformer/{WEIGHTS['transformer']}" in message and "truncated" in message


def test_an_output_of_no_known_kind(tmp_path):
    assert ".mp4" in refusal(tmp_path, "sample", "--prompt=a red circle", "--output=out.webm")


def checked(model: pathlib.Path, workdir: pathlib.Path) -> None:
    """What `jsurgery surgery` checks before it works."""
    Run(load_config("tiny", SMALL | {"model.path": str(model)}), str(workdir))


def test_a_sound_model_passes_the_checks(tmp_path, tiny_pipeline):
    checked(tiny_pipeline, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("component", WEIGHTS)
def test_every_component_is_checked(tmp_path, tiny_pipeline, component):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    truncate(model / component / WEIGHTS[component])
    with pytest.raises(InputError, match=f"{component}/{WEIGHTS[component]}.*truncated"):
        checked(model, tmp_path / "run")


@pytest.mark.parametrize("missing", ["transformer/config.json", "tokenizer/spiece.model", f"vae/{WEIGHTS['vae']}"])
def test_a_missing_file_is_named(tmp_path, tiny_pipeline, missing):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    (model / missing).unlink()
    with pytest.raises(InputError, match=missing.split("/")[0]):
        checked(model, tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (lambda sound: b"", "empty"),
        (lambda sound: b"abc", "truncated"),
        (lambda sound: b"<!DOCTYPE html><html>" + b" " * 500, "HTML"),
        (lambda sound: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-LFS"),
        (lambda sound: sound[:50], "truncated"),
        (lambda sound: sound[:-1], "truncated"),
        (lambda sound: sound + b"\0", "truncated or damaged"),
        (lambda sound: sound[:8] + b"x" * (len(sound) - 8), "truncated or damaged"),
    ],
    ids=["empty", "three bytes", "html", "lfs", "half a header", "a byte short", "a byte long", "no json"],
)
def test_the_quick_check_and_the_full_read_refuse_the_same_files(tmp_path, tiny_pipeline, content, cause):
    sound = (tiny_pipeline / "transformer" / WEIGHTS["transformer"]).read_bytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(content(sound))
    for read in (check_tensors, read_tensors):
        with pytest.raises(InputError, match=cause):
            read(file)
    file.write_bytes(sound)
    check_tensors(file)
