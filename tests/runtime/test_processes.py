"""Several processes at one run: flags, what one does for all, failures, and a surgery by two that is that of one."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from jsurgery.cli import main
from jsurgery.data import encode
from jsurgery.data.shards import Records
from jsurgery.errors import InputError
from jsurgery.io.safetensors import read_tensors
from jsurgery.load_config import load_config
from jsurgery.run import Run
from jsurgery.runtime import processes
from jsurgery.runtime.metrics import read_metrics
from tests.conftest import FULL_GRID
from tests.runtime import two_processes
from tests.runtime.two_processes import bound_scores, run_apart, write_inputs

FIELDS = {
    "video.frames": "5", "video.height": "64", "video.width": "48", "sampler.steps": "3", "trace.prompts": "4",
    "trace.holdout": "1", "trace.keep_steps": "2", "trace.batch": "2", "hybrid.rates": "2", "plan.rates": "2",
    "plan.budget": "2R2", "distill.steps": "3", "distill.batch": "2", "finetune.steps": "2", "finetune.batch": "2",
    "finetune.ema": "0.9", "data.clips": "4", "evaluate.validation_clips": "4", "log_every": "1",
    "evaluate.prompts": "4", "evaluate.batch": "2", "evaluate.videos": "1",
    # Adam's first steps are as large as the rate, whichever way a gradient of nearly zero points.
    "distill.learning_rate": "5e-5", "finetune.learning_rate": "1e-5",
}  # fmt: skip
# Four devices a process: examples, tokens and parameters lie across both.
MESH = {"mesh.fsdp": "2", "mesh.context": "2", "mesh.tensor": "2"}
STAGES = ("distill", "plan", "operate", "finetune", "evaluate")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def in_two_processes(*command: str) -> list[subprocess.CompletedProcess]:
    """Runs a command whose "NUMBER" and "HOST:PORT" are filled in, with four CPU devices each."""
    coordinator = f"localhost:{free_port()}"
    root = str(pathlib.Path(__file__).parents[2])
    flags = "--xla_force_host_platform_device_count=4 " + os.environ["XLA_FLAGS"]
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": root}
    fill = lambda text, number: text.replace("HOST:PORT", coordinator).replace("NUMBER", str(number))
    started = [
        subprocess.Popen(
            [sys.executable, *(fill(text, number) for text in command)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ended = [process.communicate(timeout=900) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, ended, strict=True)
    ]


@pytest.fixture(scope="module")
def fields(tiny_pipeline):
    return FIELDS | {"model.path": str(tiny_pipeline)}


@pytest.fixture(scope="module")
def alone(fields, tmp_path_factory):
    """A run of one process on one device, and its traces and latents in a workdir of their own."""
    workdir, begun = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run = Run(load_config("tiny", fields), str(workdir))
    run.run_stage("trace")
    run.run_stage("latents")
    bound_scores(workdir)
    shutil.copytree(workdir, begun, dirs_exist_ok=True)
    for stage in STAGES:
        run.run_command(stage)
    inputs = pathlib.Path(f"{begun}_inputs")
    write_inputs(inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "decode_in_processes", None)  # so that it is restored
        if FULL_GRID:
            run_apart(pathlib.Path(f"{workdir}_apart"), inputs, workdir / "hybrid", fields)
    return workdir, begun


@pytest.fixture(scope="module")
def two(alone, fields):
    """How two processes ended, and their workdir, beside which lies what each told."""
    _, workdir = alone
    ended = in_two_processes(
        two_processes.__file__, "HOST:PORT", "NUMBER", str(workdir), json.dumps(fields), json.dumps(MESH), *STAGES
    )
    assert [one.returncode for one in ended] == [0, 0], [one.stderr[-3000:] for one in ended]
    return ended, workdir


@pytest.fixture(scope="module")
def told(two) -> list[list]:
    """What each of the two told of."""
    files = (pathlib.Path(f"{two[1]}_told_{number}") for number in range(2))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_what_one_does_is_all_s_and_what_one_raises_too(told):
    first, second = told
    assert len(first) == len(second) == 9
    assert first[0] == second[0] == [{"said": ""}, {"said": "é" * 2000}]
    assert first[1] == second[1] == {"by": 0}
    assert (first[2], second[2]) == (["InputError", "no such file"], ["InputError", "process 0: no such file"])
    assert (first[3], second[3]) == (["ValueError", "a fault"], ["RuntimeError", "process 0: a fault"])
    assert (first[4], second[4]) == (["InputError", "process 1: no such host"], ["InputError", "no such host"])


def test_processes_that_were_not_started_alike(told):
    first, second = told
    assert first[5] == second[5]
    assert first[5][0] == "InputError" and "--process_id=1" in first[5][1] and "log_every was 1, is 2" in first[5][1]


def test_a_mesh_that_leaves_devices_out(told):
    expected = "data 1 x fsdp 1 x context 1 x tensor 1 = 1 devices, found 8 (cpu) in 2 processes; expected all of them"
    for found in told:
        assert found[6][0] == "DoesNotFit" and expected in found[6][1]


def test_a_state_is_saved_and_restored_by_both(told):
    for found in told:
        assert found[7] == {"step": 7, "held": [[4, 3]] * 4, "kernel": list(range(48))}


def files(workdir: pathlib.Path) -> list[str]:
    """Paths below `workdir`, without those that have a time in their name or belong to Orbax."""
    found = (path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if not {"tensorboard", "checkpoints"} & set(path.parts))


def test_both_sample_the_traces_of_one(alone, two):
    folder = two[1].with_name(two[1].name + "_traced") / "trace"
    expected, found = (Records(at / "steps") for at in (alone[0] / "trace", folder))
    assert len(found) == len(expected) == 8
    for index in range(8):
        one, other = expected[index], found[index]
        np.testing.assert_allclose(other.pop("latents"), one.pop("latents"), atol=5e-3)  # float16
        assert one == other
    assert json.loads((folder / "stage.json").read_text())["complete"]


def test_there_is_one_set_of_files_and_one_voice(alone, two):
    (first, second), workdir = two
    assert files(workdir) == files(alone[0])
    for stage in ("distill", "finetune"):
        assert len(list((workdir / stage / "tensorboard").iterdir())) == 1
        steps = [[path.name for path in (at / stage / "checkpoints").iterdir()] for at in (workdir, alone[0])]
        assert sorted(steps[0]) == sorted(steps[1]) != []
        assert f"{stage}: " in first.stderr and f"{stage}: " not in second.stderr


def distance(found: dict, expected: dict) -> float:
    """Of all tensors together, relative."""
    assert found.keys() == expected.keys()
    difference = sum(float(np.sum((found[name] - expected[name]) ** 2.0)) for name in found)
    return (difference / sum(float(np.sum(values**2.0)) for values in expected.values())) ** 0.5


def test_two_processes_distil_and_tune_as_one(alone, two):
    expected, found = alone[0], two[1]
    for file in ("distill/initial.safetensors", "distill/feature_maps.safetensors", "model/hybrid_wan.safetensors"):
        assert distance(read_tensors(found / file), read_tensors(expected / file)) < 1e-5, file
    learnt = [("distill/feature_maps", "distill/initial", 3e-4), ("model/hybrid_wan", "hybrid/hybrid_wan", 3e-5)]
    for after, before, least in learnt:
        trained, untrained = (read_tensors(expected / f"{name}.safetensors") for name in (after, before))
        assert distance(trained, untrained) > least, "there was something to learn"
    reports = [json.loads((at / "distill" / "errors.json").read_text()) for at in (found, expected)]
    for field in ("errors", "initial_errors", "softmax_share", "teacher_softmax_share", "samples", "velocity_errors"):
        np.testing.assert_allclose(reports[0][field], reports[1][field], rtol=1e-5)
    plans = [json.loads((at / "plan" / "plan.json").read_text())["rates"] for at in (found, expected)]
    assert plans[0] == plans[1]
    for stage in ("distill", "finetune"):
        for row, wanted in zip(read_metrics(found / stage), read_metrics(expected / stage), strict=True):
            assert row == pytest.approx(wanted, rel=1e-5)


def test_two_processes_evaluate_as_one(alone, two):
    expected, found = (at / "evaluation" for at in (alone[0], two[1]))
    difference = np.load(found / "teacher.npy") - np.load(expected / "teacher.npy")
    assert np.linalg.norm(difference) < 1e-5 * np.linalg.norm(np.load(expected / "teacher.npy"))
    one, other = (json.loads((at / "evaluation.json").read_text())["models"] for at in (expected, found))
    assert list(one) == list(other) == ["teacher", "not_distilled", "distilled", "finetuned"]
    for name, result in one.items():
        assert other[name]["latent_rmse"] == pytest.approx(result["latent_rmse"], rel=1e-5, abs=1e-7)
        assert other[name]["validation_loss"] == pytest.approx(result["validation_loss"], rel=1e-5)
        for dimension, values in result["per_clip"].items():
            assert other[name]["per_clip"][dimension] == pytest.approx(values, abs=0.02)
    assert min(one["finetuned"]["latent_rmse"]) > 1e-3, "there was something to compare"


def compare_what_each_does_for_itself(alone, two):
    one, other = (pathlib.Path(f"{at}_apart") for at in (alone[0], two[1]))
    numbers = [json.loads((at / "fidelity.json").read_text())["durations"][0]["models"] for at in (one, other)]
    (expected, control), (found, other_control) = (list(each.values()) for each in numbers)
    for name in ("velocity_error", "velocity_error_per_step", "velocity_error_per_frame"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert found["psnr"] == pytest.approx(expected["psnr"], rel=1e-4)  # of rounded pixels
    assert other_control["psnr"] == pytest.approx(control["psnr"], rel=1e-4)
    for folder in ("synthesized", "encoded/5x64x48"):
        records = [Records(at / folder) for at in (one, other)]
        assert len(records[0]) == len(records[1]) == 4
        for index in range(4):
            for name, values in records[0][index].items():
                exact = values.dtype == np.uint8
                same = np.array_equal if exact else lambda a, b: np.allclose(a, b, rtol=2e-3, atol=1e-3)  # float16
                assert same(records[1][index][name], values), (folder, index, name)
    videos = [sorted(path.name for path in (at / "videos").iterdir()) for at in (one, other)]
    assert videos[0] == videos[1] and len(videos[0]) == 4


if FULL_GRID:  # `make kernels`: these commands take both processes a minute
    test_two_processes_compare_synthesize_and_encode_as_one = compare_what_each_does_for_itself


def test_all_devices_work_in_every_command(told):
    """No two devices do the same work; a piece that two shared would count a half for each."""
    by_command = [found[8] for found in told]
    commands = ["trace", "distill", "finetune", "evaluate"]
    commands += ["evaluate fidelity", "evaluate vbench", "synthesize", "encode"] if FULL_GRID else []
    assert [list(found) for found in by_command] == [commands] * 2
    for command in commands:
        amounts = [amount for found in by_command for amount in found[command].values()]
        assert len(amounts) == 8 and len(set(amounts)) == 1, (command, amounts)
        assert amounts[0] >= 1 and amounts[0] % 1 == 0, (command, amounts)


def test_the_command_in_two_processes(two, fields):
    _, workdir = two
    config = [f"--config.{name}={text}" for name, text in (fields | MESH).items()]
    flags = ["--coordinator=HOST:PORT", "--num_processes=2", "--process_id=NUMBER"]
    ended = in_two_processes("-m", "jsurgery", "plan", f"--workdir={workdir}", *config, *flags)
    assert [one.returncode for one in ended] == [0, 0], [one.stderr[-3000:] for one in ended]
    assert ["up to date" in one.stderr for one in ended] == [True, False]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--process_id=0"], ["--process_id", "together"]),
        (["--num_processes=2", "--process_id=0"], ["--num_processes, --process_id", "--coordinator=HOST:PORT"]),
        (["--coordinator=localhost:1234"], ["together", "--coordinator=auto"]),
        (
            ["--coordinator=localhost:1234", "--num_processes=2", "--process_id=2"],
            ["--process_id", "0 to 1", "found 2"],
        ),
        (["--coordinator=localhost:1234", "--num_processes=2", "--process_id=-1"], ["0 to 1", "found -1"]),
        (["--coordinator=localhost:1234", "--num_processes=2", "--process_id=one"], ["--process_id", "'one'"]),
        (["--coordinator=localhost:1234", "--num_processes=0", "--process_id=0"], ["--num_processes", "found 0"]),
        (["--coordinator=localhost", "--num_processes=2", "--process_id=0"], ["HOST:PORT", "'localhost'"]),
        (["--coordinator=localhost:99999", "--num_processes=2", "--process_id=1"], ["localhost:99999"]),
        (["--coordinator=auto", "--process_id=0"], ["--process_id", "auto"]),
        (["--coordinator=auto"], ["--coordinator=auto"]),
    ],
)
@pytest.mark.parametrize("command", ["finetune"])
def test_flags_that_do_not_go_together(tmp_path, capsys, monkeypatch, command, flags, parts):
    monkeypatch.setattr(processes, "PATIENCE", 0)
    assert main([command, f"--workdir={tmp_path / 'run'}", *flags]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0)
    with pytest.raises(InputError, match="no process 0 there"):
        processes.join(f"localhost:{free_port()}", 2, 1)


def test_a_process_that_is_alone_asks_nobody():
    processes.join(None, None, None)
    assert processes.is_first() and not processes.several()
    assert processes.gather_messages("hello") == ["hello"]
    assert processes.on_first(lambda: 1) == processes.on_all(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        processes.on_first(lambda: 1 / 0)
