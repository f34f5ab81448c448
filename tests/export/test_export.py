"""`jsurgery export` from end to end, and its artefacts without jsurgery. Needs the packages of the extra `export`."""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jsurgery import cli
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.diffusion import initial_noise
from jsurgery.export import run_export
from jsurgery.load_config import load_config
from jsurgery.surgery.operate import save_model
from jsurgery.wan.checkpoint import load_transformer
from jsurgery.wan.pipeline import load_pipeline

NEEDED = ("litert_torch", "ai_edge_litert", "ai_edge_quantizer", "tensorflow", "onnxscript", "onnxruntime_qnn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]  # importing them changes JAX
if MISSING:
    pytest.skip(f"NOT TESTED: export, without {', '.join(MISSING)}: pip install '.[export]'", allow_module_level=True)

pytestmark = pytest.mark.xdist_group("export")  # one process runs all of these tests on one export
PROMPT = "a red circle moves left over a grey background"
SIZE = {"frames": 5, "height": 32, "width": 48}  # 2 x 2 x 3 tokens: the simulator of the NPU is slow
FIELDS = {"text_length": "7", "sampler.steps": "3", "trace.keep_steps": "1"}
FLAGS = [
    "export",
    "--config=tiny",
    *(f"--{name}={value}" for name, value in SIZE.items()),
    *(f"--config.{name}={value}" for name, value in FIELDS.items()),
]


# Weights made small, so that layers add little to the residual stream, as in trained networks: random weights of full
# size would amplify rounding errors.
SMALL_WEIGHTS = {"vae": ("conv2.weight",), "text_encoder": (".q.weight", ".o.weight", ".wo.weight")}


@pytest.fixture(scope="module")
def workdir(tiny_pipeline, random_transformer, tmp_path_factory):
    """A run whose final model has a block at rate 4 and a linear block, with the teacher's weights and random maps."""
    workdir = tmp_path_factory.mktemp("run")
    base = shutil.copytree(tiny_pipeline, workdir / "base")
    for part, names in SMALL_WEIGHTS.items():
        (file,) = (base / part).glob("*.safetensors")
        tensors = load_file(file)
        save_file({name: x / np.float32(10 if name.endswith(names) else 1) for name, x in tensors.items()}, file)
        (base / part / "hashes.json").unlink(missing_ok=True)
    teacher = load_transformer(base / "transformer")
    hybrid = random_transformer(dataclasses.replace(teacher.config, hybrid=HybridConfig((4, "linear"))))
    nnx.update(hybrid, nnx.state(teacher))
    save_model(hybrid, workdir / "model", base_pipeline=str(base))
    return workdir


def run(workdir, *flags):
    return cli.main([*FLAGS, f"--workdir={workdir}", *flags])


@pytest.fixture(scope="module")
def exported(workdir):
    """The folder of an export in every format and precision."""
    assert run(workdir, "--precision=float32,fp16,int8,int4,w8a16") == 0
    return workdir / "export"


@pytest.fixture(scope="module")
def manifest(exported):
    return json.loads((exported / "manifest.json").read_text())


def test_every_format_is_within_its_parity_bound(exported):
    rows = json.loads((exported / "parity.json").read_text())
    assert all(row["passed"] and row["relative_error"] <= row["bound"] for row in rows)
    found = {(row["format"], row["precision"]) for row in rows}
    assert found == {
        ("torch", "float32"), ("tflite", "float32"), ("tflite", "fp16"), ("tflite", "int8"), ("tflite", "int4"),
        ("tflite", "w8a16"), ("savedmodel", "float32"), ("onnx", "float32"), ("qnn", "fp16"),
    }  # fmt: skip
    bounds = {(row["format"], row["precision"]): row["bound"] for row in rows}
    assert bounds["torch", "float32"] == bounds["tflite", "float32"] == bounds["savedmodel", "float32"] == 1e-5
    assert (bounds["tflite", "w8a16"], bounds["qnn", "fp16"]) == (2e-2, 5e-3)
    chain = {row["precision"]: row["relative_error"] for row in rows if row["part"] == "all"}
    assert chain["float32"] < chain["fp16"] < chain["int8"] < chain["int4"]


def test_the_manifest_matches_the_files_and_the_model(exported, manifest):
    parts = [part["name"] for part in manifest["parts"]]
    assert parts == ["text_encoder", "condition", "embed", "block_00", "block_01", "head", "vae_decoder"]
    made = {(a["format"], a["precision"], a.get("chip"), a["part"]) for a in manifest["artefacts"]}
    assert len(made) == len(manifest["artefacts"]) == 7 * 5 + 7 + 7 + 5
    for artefact in manifest["artefacts"]:
        content = (exported / artefact["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (artefact["bytes"], artefact["sha256"])
    assert manifest["tensors"]["video"]["shape"] == [5, 32, 48, 3]
    assert manifest["tensors"]["tokens_00"]["shape"] == [1, 2 * 2 * 3, 24]
    known = {"token_ids", "mask", "timestep", "latents"}  # inputs that an app makes itself
    for part in manifest["parts"]:
        assert set(part["inputs"]) <= known
        known |= set(part["outputs"])
    assert known == manifest["tensors"].keys()
    rows = manifest["sampler"]["schedule"]
    assert len(rows["sigma"]) == len(rows["predictor"]) == manifest["sampler"]["steps"] == 3


def test_blocks_have_tensors_of_rank_4_at_most_and_no_gather(manifest):
    blocks = [a for a in manifest["artefacts"] if a["format"] == "tflite" and a["part"].startswith("block")]
    assert len(blocks) == 10
    for block in blocks:
        assert block["max_rank"] <= 4
        assert not {"GATHER", "GATHER_ND", "BROADCAST_TO"} & block["operations"].keys()
    softmax = {a["part"]: a["operations"].get("SOFTMAX", 0) for a in blocks if a["precision"] == "float32"}
    assert softmax == {"block_00": 2, "block_01": 1}  # a linear block has softmax in cross-attention only
    assert all("EXP" not in block["operations"] for block in blocks)
    sizes = {a["precision"]: a["bytes"] for a in blocks if a["part"] == "block_00"}
    assert sizes["int4"] < sizes["int8"] < sizes["fp16"] < sizes["float32"]


def test_every_node_is_on_the_npu(manifest):
    compiled = [a for a in manifest["artefacts"] if a["format"] == "qnn"]
    assert {a["chip"] for a in compiled} == {"SM8750"}
    for artefact in compiled:
        assert artefact["npu_share"] == 1 and not artefact["off_npu"]
        assert artefact["ddr"]["read_total"] > 0 and artefact["ddr"]["write_total"] > 0


def test_finished_artefacts_are_kept(exported, workdir, capfd):
    """A command makes only artefacts that are missing or truncated, and with --parts only those of these parts."""
    names = "head", "embed", "condition", "block_00"
    missing, truncated, left, kept = (exported / "onnx" / f"{name}.float32.onnx" for name in names)
    before, content = kept.stat().st_mtime_ns, left.read_bytes()
    missing.unlink()
    left.unlink()
    truncated.write_bytes(truncated.read_bytes()[:100])
    capfd.readouterr()
    assert run(workdir, "--formats=onnx", "--parts=block_00,head,embed") == 0
    log = capfd.readouterr().err
    assert log.count("export: onnx ") == 2 and missing.name in log and truncated.name in log
    assert kept.stat().st_mtime_ns == before and missing.exists() and truncated.stat().st_size > 100
    assert not left.exists()
    left.write_bytes(content)


def test_another_video_size_is_refused(exported, workdir, capsys):
    assert run(workdir, "--frames=9") == 2
    assert "video.frames was 5, is 9" in capsys.readouterr().err


def test_a_parity_error_is_exit_code_4(exported, workdir, tmp_path, capsys, monkeypatch):
    """Checked from the records of finished artefacts, without starting a process."""
    monkeypatch.setattr(run_export, "run_worker", lambda *_: pytest.fail("an artefact is made again"))
    shutil.copytree(workdir, tmp_path / "run")
    record = tmp_path / "run" / "export" / "onnx" / "block_01.float32.onnx.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"relative_error": 0.5}))
    assert run(tmp_path / "run", "--formats=onnx") == 4
    assert "onnx block_01 float32 5.0e-01 > 1e-05" in capsys.readouterr().err


def test_the_artefacts_make_a_video_without_jsurgery(exported, workdir, tmp_path):
    """The exported driver.py, in a process that cannot import jsurgery or JAX, makes the video that JAX makes."""
    alone = shutil.copytree(exported, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("reference", "*.onnx"))
    shape = json.loads((alone / "manifest.json").read_text())["tensors"]["latents"]["shape"]
    noise = np.asarray(initial_noise(0, [0], tuple(shape))[0])
    np.save(tmp_path / "noise.npy", noise)
    code = """if True:
        import sys
        sys.modules |= dict.fromkeys(("jsurgery", "jax", "torch", "tensorflow", "flax"))  # importing them now fails
        import numpy as np
        import driver
        folder, prompt, noise, precision, output = sys.argv[1:]
        np.save(output, driver.Pipeline(folder, precision)(prompt, np.load(noise)))
    """
    config = load_config("tiny", FIELDS)
    config.video.update(SIZE)
    expected = load_pipeline(str(workdir / "model"))(PROMPT, config, seed=0)[0].astype(int)
    for precision, most in (("float32", 1.0), ("w8a16", 12.0)):
        output = tmp_path / f"{precision}.npy"
        arguments = [alone, PROMPT, tmp_path / "noise.npy", precision, output]
        process = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], cwd=alone, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr[-2000:]
        video = np.load(output).astype(int)
        assert video.shape == expected.shape == (5, 32, 48, 3)
        assert np.abs(video - expected).mean() < most, precision
        assert np.abs(video - expected[::-1]).mean() > 2 or np.ptp(expected) == 0


def test_the_driver_is_a_program(exported, tmp_path):
    program = [sys.executable, str(exported / "driver.py"), str(exported), f"--prompt={PROMPT}"]
    subprocess.run([*program, f"--output={tmp_path / 'out.gif'}"], check=True, capture_output=True)
    assert (tmp_path / "out.gif").read_bytes()[:3] == b"GIF"


def test_one_file_holds_the_transformer_of_a_model_without_pipeline(workdir, tmp_path, capfd):
    shutil.copytree(workdir / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    fields = json.loads(file.read_text())
    del fields["base_pipeline"]
    file.write_text(json.dumps(fields))
    (tmp_path / "model" / "hashes.json").unlink()
    assert run(tmp_path, "--formats=tflite", "--precision=float32", "--one_file") == 0
    assert "VAE and text encoder left out" in capfd.readouterr().err
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    assert [part["name"] for part in manifest["parts"]] == ["transformer"] and manifest["tokenizer"] is None
    (whole,) = manifest["artefacts"]
    assert whole["max_rank"] <= 4 and whole["relative_error"] < 1e-5
    assert not {"GATHER", "GATHER_ND", "BROADCAST_TO"} & whole["operations"].keys()


def test_a_run_without_a_model_is_refused(tmp_path, capsys):
    assert run(tmp_path) == 2
    assert "no such folder; run `jsurgery surgery` first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_multiply_adds_of_an_onnx_file_by_hand(tmp_path):
    from onnx import TensorProto, helper, save, shape_inference

    from jsurgery.export.qnn import multiply_adds

    shapes = {"x": (1, 4, 9, 7), "kernel": (6, 4, 3, 3), "w": (5, 2)}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 6, 7, 2))
    nodes = [helper.make_node("Conv", ["x", "kernel"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    model = helper.make_model(helper.make_graph(nodes, "g", given, [made]))
    save(shape_inference.infer_shapes(model), tmp_path / "g.onnx")
    assert multiply_adds(tmp_path / "g.onnx") == 6 * 7 * 5 * (4 * 3 * 3) + 6 * 7 * 2 * 5


def test_the_table_of_memory_traffic_has_every_variant(tiny_pipeline, tmp_path, capsys):
    arguments = ["export", "--ddr_table", "--config=tiny", "--height=64", "--width=48", f"--workdir={tmp_path}"]
    arguments += ["--chips=SM8650", f"--config.model.path={tiny_pipeline}"]
    assert cli.main([*arguments, "--ddr_frames=9", "--ddr_tile=20"]) == 0
    rows = json.loads((tmp_path / "export" / "ddr.json").read_text())
    assert [row["variant"] for row in rows] == [
        "softmax", "softmax, tiled", "hybrid R8", "linear, HedgeHog", "linear", "no attention",
    ]  # fmt: skip
    assert all(row["tokens"] == 36 and row["npu_share"] == 1 and row["ddr"]["read_total"] > 0 for row in rows)
    kept = (tmp_path / "export" / "ddr.json").stat().st_mtime_ns
    assert cli.main([*arguments, "--ddr_frames=9", "--ddr_tile=20"]) == 0  # compiles nothing again
    assert (tmp_path / "export" / "ddr.json").stat().st_mtime_ns == kept
