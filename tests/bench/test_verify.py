"""`jsurgery verify` passes on correct folders and fails for one wrong tensor in any component."""

import dataclasses
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
import torch
import transformers

from jsurgery import errors
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.bench import torch_reference, verify
from jsurgery.cli import main
from jsurgery.io import results
from jsurgery.io.safetensors import read_tensors, write_tensors
from jsurgery.surgery.operate import save_model
from jsurgery.wan import checkpoint
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_folder import check_pipeline

SIZE = ["--frames=1", "--height=32", "--width=48"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = ["token ids", "text embeddings", "VAE encode", "VAE decode", *(f"velocity at {t:g}" for t in verify.TIMESTEPS)]


@pytest.fixture(scope="module")
def hybrid(tiny_pipeline, random_transformer, tmp_path_factory) -> pathlib.Path:
    """A transformer with a block at rate 2 and a linear block, and the VAE and text encoder of `tiny_pipeline`."""
    fields = json.loads((tiny_pipeline / "transformer" / "config.json").read_text())
    fields = {name: fields[name] for name in fields if name in WanConfig.__dataclass_fields__} | {
        "patch_size": (1, 2, 2)
    }
    folder = tmp_path_factory.mktemp("hybrid")
    save_model(random_transformer(WanConfig(**fields, hybrid=HybridConfig((2, "linear")))), folder, str(tiny_pipeline))
    return folder


@pytest.fixture(scope="module")
def hybrid_2_2(tiny_pipeline_2_2, random_transformer, tmp_path_factory) -> pathlib.Path:
    """Likewise of Wan2.2 TI2V 5B's kind, which also has a velocity after a given frame."""
    folder, hybrid = tmp_path_factory.mktemp("hybrid_2_2"), HybridConfig((2, "linear"), lattice="staggered_rows")
    network = dataclasses.replace(check_pipeline(str(tiny_pipeline_2_2)), hybrid=hybrid)
    save_model(random_transformer(network), folder, str(tiny_pipeline_2_2))
    return folder


@pytest.mark.parametrize("kind", ["bundled", "hybrid", "hybrid 2.2"])
def test_correct_folders_pass(kind, hybrid, hybrid_2_2, tmp_path, monkeypatch, capsys):
    model = {"bundled": "tiny_wan", "hybrid": str(hybrid), "hybrid 2.2": str(hybrid_2_2)}[kind]
    size, names = SIZE, NAMES
    if kind == "hybrid 2.2":
        size, names = ["--frames=5", "--height=32", "--width=64"], [*NAMES, "velocity at 999 after a given frame"]
    report = tmp_path / "verify.json"
    embed, devices = verify.PromptEmbedder.__call__, []
    spy = lambda *arguments: devices.append(jax.config.jax_default_device) or embed(*arguments)
    monkeypatch.setattr(verify.PromptEmbedder, "__call__", spy)
    assert main(["verify", f"--model={model}", f"--json={report}", *size]) == 0
    assert [device.platform for device in devices] == ["cpu"] and jax.config.jax_default_device is None
    printed, told = capsys.readouterr()
    assert "verify: text encoder, on the CPU, a layer at a time\n" in told
    found = json.loads(report.read_text())
    assert json.loads(printed) == found and str(hybrid.parent) not in printed
    assert found["passed"] and found["hybrid"] == (kind != "bundled") and found["text_length"] == 16
    assert [check["check"] for check in found["checks"]] == names
    assert all(check["error"] <= check["bound"] <= 1e-4 for check in found["checks"])
    assert any(check["error"] > 0 for check in found["checks"])
    assert found["weights"].keys() == {"transformer", "text_encoder", "tokenizer", "vae"}
    assert found["versions"].keys() >= {"jax", "flax", "torch", "diffusers", "transformers"} and found["devices"]


def perturbed(folder: pathlib.Path, copy: pathlib.Path, name: str) -> pathlib.Path:
    """A copy of a component in which one tensor differs."""
    shutil.copytree(folder, copy)
    (file,) = copy.glob("*.safetensors")
    tensors = read_tensors(file)
    tensors[name] = tensors[name] * 1.01 + 0.01
    write_tensors(file, tensors)
    return copy


def test_a_wrong_tensor_of_the_transformer_fails(tiny_pipeline, tmp_path, monkeypatch, capsys):
    wrong = perturbed(tiny_pipeline / "transformer", tmp_path / "wrong", "blocks.1.ffn.net.2.weight")
    load = checkpoint.load_transformer
    monkeypatch.setattr(verify, "load_transformer", lambda _: load(wrong))
    monkeypatch.setattr(verify, "vae_errors", lambda *_: {"VAE encode": float("nan")})
    report = tmp_path / "verify.json"
    assert main(["verify", f"--model={tiny_pipeline}", f"--json={report}", *SIZE]) == 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jsurgery: ")]
    assert "velocity at 500" in line and "6 of 8 checks" in line
    checks = {check["check"]: check for check in json.loads(report.read_text())["checks"]}
    assert checks["text embeddings"]["passed"] and not checks["velocity at 20"]["passed"]
    assert checks["VAE encode"] == {"check": "VAE encode", "error": None, "bound": 1e-4, "passed": False}


def test_wrong_tensors_of_the_vae_fail(tiny_pipeline, tmp_path, monkeypatch):
    encoder = perturbed(tiny_pipeline / "vae", tmp_path / "encoder", "encoder.conv_out.weight")
    both = perturbed(encoder, tmp_path / "both", "decoder.conv_in.bias")
    load = checkpoint.load_vae
    monkeypatch.setattr(verify, "load_vae", lambda _: load(both))
    errors = verify.vae_errors(tiny_pipeline / "vae", 1, 32, 48)
    assert errors.keys() == {"VAE encode", "VAE decode"}
    assert all(error > verify.BOUNDS[check] for check, error in errors.items())


def test_a_wrong_tensor_of_the_text_encoder_and_a_wrong_token_fail(tiny_pipeline, tmp_path, monkeypatch):
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    wrong = perturbed(tiny_pipeline / "text_encoder", tmp_path / "wrong", name)

    class WrongEmbedder(verify.PromptEmbedder):
        def __init__(self, base):
            super().__init__(base)
            right = self.tokenizer
            self.tensors = checkpoint.open_text_encoder(wrong)[1]
            self.tokenizer = lambda prompts, length: right([*prompts[:2], "a"], length)
            self.tokenizer.kept = right.kept

    monkeypatch.setattr(verify, "PromptEmbedder", WrongEmbedder)
    errors, _ = verify.text_errors(tiny_pipeline, 16)
    assert errors["token ids"] > 0 and errors["text embeddings"] > verify.BOUNDS["text embeddings"]


def test_the_reference_gives_the_same_bits_layer_by_layer(tiny_pipeline):
    folder = tiny_pipeline / "text_encoder"
    token_ids, mask = verify.PromptEmbedder(tiny_pipeline).tokenizer(verify.PROMPTS, 16)
    encoder = transformers.UMT5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = encoder(torch.tensor(token_ids), torch.tensor(mask)).last_hidden_state.numpy()
    np.testing.assert_array_equal(verify.reference_embeddings(folder, token_ids, mask), expected)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--frames=6"], ["--frames", "4k + 1", "5 and 9"]),
        (["--height=40"], ["--height", "32 and 48"]),
        (["--width=32000"], ["width axis", "1024"]),
        (["--frames=-3"], ["--frames", "positive", "'-3'"]),
        (["--model=no/such/model"], ["no/such/model"]),
        (["--json=no/such/folder.json"], ["--json=no/such/folder.json"]),
        (["--config.seed=1"], ["--config.seed", "verify takes no config"]),
    ],
)
def test_bad_arguments_are_refused(arguments, parts, tiny_pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jsurgery.wan.hub.local_path", lambda path, *_: path)
    monkeypatch.setattr(verify, "text_errors", None)
    assert main(["verify", f"--model={tiny_pipeline}", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line


def test_a_missing_library_is_named_with_its_extra(tiny_pipeline, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["verify", f"--model={tiny_pipeline}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "diffusers: not installed" in line and "pip install 'jsurgery[verify]'" in line


def test_a_layout_that_diffusers_does_not_read_is_refused(tiny_pipeline, tmp_path):
    network = check_pipeline(str(tiny_pipeline))
    tensors = read_tensors(tiny_pipeline / "transformer" / WEIGHTS)
    write_tensors(tmp_path / WEIGHTS, {f"model.diffusion_model.{name}": t for name, t in tensors.items()})
    with pytest.raises(errors.InputError, match="jsurgery convert"):
        torch_reference.reference_transformer(tmp_path, network)


def test_errors_are_relative():
    ours = np.array([3.0, 4.0], np.float32)
    assert results.relative_error(ours, np.array([3.0, 3.0])) == pytest.approx(1 / np.sqrt(18))
    assert results.relative_error(ours, ours[:1]) == np.inf
