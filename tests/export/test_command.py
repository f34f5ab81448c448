"""The part of `jsurgery export` that needs no other library: its plan, records and refusals; nothing is converted."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from jsurgery import cli
from jsurgery.errors import ParityError
from jsurgery.export.artefacts import Artefact
from jsurgery.export.parity import check_parity, missing_samples, parity_rows
from jsurgery.export.parts import ExportJob
from jsurgery.export.run_export import make_job, manifest
from jsurgery.load_config import load_config

ROOT = pathlib.Path(__file__).parents[2]
HEAVY = (
    "torch", "tensorflow", "litert_torch", "ai_edge_litert", "ai_edge_quantizer", "onnx", "onnxscript", "onnxruntime",
    "onnxruntime_qnn", "qai_hub", "diffusers", "transformers", "accelerate",
)  # fmt: skip


def job(tmp_path, **changes):
    found, left_out = make_job(load_config("tiny"), tmp_path, "tiny_wan", blocks_per_file=changes.pop("group", 1))
    assert not left_out and not changes
    return found


@pytest.mark.parametrize(
    ("group", "names"),
    [
        (1, ["block_00", "block_01", "block_02", "block_03", "block_04", "block_05"]),
        (4, ["blocks_00_03", "blocks_04_05"]),
        (6, ["blocks_00_05"]),
    ],
)
def test_blocks_are_grouped_into_parts(tmp_path, group, names):
    found = job(tmp_path, group=group)
    parts = found.parts()
    assert [part.name for part in parts[3:-2]] == names
    assert [i for part in parts for i in part.blocks] == list(range(6))
    made = {"token_ids", "mask", "timestep", "latents"}
    for part in parts:
        assert set(part.inputs) <= made and set(part.inputs) | set(part.outputs) <= found.tensors().keys()
        made |= set(part.outputs)


def test_artefacts_of_every_format(tmp_path):
    found = job(tmp_path)
    names = [part.name for part in found.parts()]
    made = lambda format, *choices: [
        (artefact.part, artefact.precision, artefact.variant) for artefact in found.artefacts(tmp_path, format, choices)
    ]
    assert made("onnx") == made("savedmodel") == [(name, "float32", "") for name in names]
    assert made("tflite", "int8", "float32") == [(name, kind, "") for name in names for kind in ("float32", "int8")]
    assert names[:2] == ["text_encoder", "condition"]  # which do not run on the NPU
    chips = "SM8750", "SM8650"
    assert made("qnn", *chips) == [(name, "fp16", chip) for chip in chips for name in names[2:]]


def test_missing_samples_are_listed(tmp_path):
    for name in ("0/latents", "1/latents", "1/velocity", "2/velocity"):
        file = tmp_path / "reference" / f"{name}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert missing_samples(tmp_path, 4, ("latents", "velocity")) == [0, 2, 3]
    assert missing_samples(tmp_path, 3, ("latents",)) == [2]


def test_a_part_needs_the_parts_that_make_its_inputs(tmp_path):
    found = job(tmp_path)
    needed = lambda *only: [part.name for part in dataclasses.replace(found, only=only).needed()]
    assert needed() == [part.name for part in found.parts()]
    assert needed("embed") == ["embed"] and needed("vae_decoder") == ["vae_decoder"]
    assert needed("block_01") == ["text_encoder", "condition", "embed", "block_00", "block_01"]
    one = dataclasses.replace(found, only=("block_01",))
    assert one.fingerprint == found.fingerprint
    assert [artefact.part for artefact in one.artefacts(tmp_path, "onnx")] == ["block_01"]


def test_a_decoder_whose_layers_no_file_holds_is_left_out(tmp_path):
    """It decodes all frames at once: with 8 channels 145 frames of 480x832 are 1.85 GB, 161 are 2.06."""
    for frames, exported in ((145, True), (161, False)):
        config = load_config("tiny", {"video.frames": str(frames), "video.height": "480", "video.width": "832"})
        found, left_out = make_job(config, tmp_path, "tiny_wan", blocks_per_file=1)
        assert ("vae_decoder" in [part.name for part in found.parts()]) == exported == ("VAE decoder" not in left_out)
    assert left_out["VAE decoder"].startswith("2.1 GB for all frames")
    assert found.fingerprint != dataclasses.replace(found, decoder=True).fingerprint


def test_a_job_is_read_back_from_its_file(tmp_path):
    found = job(tmp_path)
    found.write(tmp_path)
    assert ExportJob.read(tmp_path) == found and ExportJob.read(tmp_path).fingerprint == found.fingerprint
    assert job(tmp_path, group=2).fingerprint != found.fingerprint
    moved = dataclasses.replace(found, transformer="/elsewhere/model", base="/elsewhere/base")
    assert moved.fingerprint == found.fingerprint


def test_only_complete_artefacts_of_the_same_job_have_a_record(tmp_path):
    artefact = Artefact(tmp_path, "onnx", "float32", "head")
    artefact.path.parent.mkdir()
    assert artefact.record("a") is None
    for made_with in ("a", "b"):
        temporary = tmp_path / "temporary"
        temporary.write_bytes(b"graph")
        artefact.finish(made_with, temporary, {"nodes": 3})
    assert artefact.record("a") is None and artefact.record("b")["nodes"] == 3
    artefact.path.write_bytes(b"gra")
    assert artefact.record("b") is None


def test_a_manifest_without_artefacts(tmp_path):
    config, found = load_config("tiny"), job(tmp_path)
    content = json.loads(json.dumps(manifest(config, found, tmp_path, {})))
    assert content["artefacts"] == [] and content["video"] == config.video.to_dict()
    assert content["tensors"]["latents"]["shape"] == [5, 24, 20, 8]
    assert content["tokenizer"] == {"file": "tokenizer/spiece.model", "length": 16, "padding": 0, "end": 1}


def test_a_parity_error_names_the_worst_artefacts():
    record = {"part": "head", "format": "onnx", "precision": "float32", "relative_error": 1e-6, "max_error": 1e-6}
    breaches = [record | {"part": f"block_{i}", "relative_error": 10.0**-i} for i in range(4)]
    unknown = record | {"part": "embed", "relative_error": None, "max_error": None}
    check_parity(parity_rows([record]), "parity.json")
    with pytest.raises(ParityError, match=r"block_0 float32 1.0e\+00 > 1e-05; .*block_1.*; .* and 1 more"):
        check_parity(parity_rows([record, *breaches]), "parity.json")
    with pytest.raises(ParityError, match="embed float32 inf"):
        check_parity(parity_rows([record, unknown]), "parity.json")


@pytest.mark.parametrize("format", ["tflite", "savedmodel", "onnx", "qnn"])
def test_a_missing_package_is_named(tmp_path, format, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ["export", "--model=tiny_wan", f"--workdir={tmp_path}", f"--formats={format}"]
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'jsurgery[export]'" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--formats=tflite,coreml", "tflite,savedmodel,onnx,qnn"),
        ("--precision=int2", "float32,fp16,int8,int4,w8a16"),
        ("--chips=A17", "SM8750,SM8650"),
        ("--frames=6", "4k + 1"),
        ("--workdir=gs://bucket/run", "local folders"),
        ("--parts=block_00,block_09", "--parts=block_09: no such part; expected some of text_encoder, condition, "),
    ],
)
def test_bad_flags_are_refused(tmp_path, flag, message, capsys):
    arguments = ["export", "--model=tiny_wan", f"--workdir={tmp_path}", flag]
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_other_modules_need_none_of_the_packages_for_export():
    """Imports every module except those of the formats, in a process that cannot import these packages."""
    code = f"""if True:
        import importlib.util, pkgutil, sys
        from importlib.machinery import PathFinder
        class Without(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                if name.partition(".")[0] not in {HEAVY}:
                    return super().find_spec(name, path, target)
        sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
        assert importlib.util.find_spec("torch") is None
        import jsurgery
        from jsurgery import cli
        names = [found.name for found in pkgutil.walk_packages(jsurgery.__path__, "jsurgery.")]
        for name in names:
            if not name.endswith("__main__") and not name.startswith("jsurgery.export"):
                importlib.import_module(name)
        import jsurgery.export.run_export, jsurgery.export.parity, jsurgery.export.jax_reference
        print(len(names))
        sys.exit(cli.main(["cost", "--config=tiny"]))
    """
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    assert int(process.stdout.splitlines()[0]) > 60
