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
from jsurgery.data.shards import Records
from jsurgery.errors import InputError
from jsurgery.io.safetensors import read_tensors
from jsurgery.load_config import load_config
from jsurgery.run import Run
from jsurgery.runtime import processes
from jsurgery.runtime.metrics import read_metrics

FIELDS = {
    "video.frames": "5", "video.height": "64", "video.width": "48", "sampler.steps": "3", "trace.prompts": "4",
    "trace.holdout": "1", "trace.keep_steps": "2", "trace.batch": "2", "hybrid.rates": "2", "plan.rates": "2",
    "plan.budget": "2R2", "distill.steps": "3", "distill.batch": "2", "finetune.steps": "2", "finetune.batch": "2",
    "finetune.ema": "0.9", "data.clips": "4", "evaluate.validation_clips": "4", "log_every": "1",
    # Adam's first steps are as large as the rate, whichever way a gradient of nearly zero points.
    "distill.learning_rate": "5e-5", "finetune.learning_rate": "1e-5",
}  # fmt: skip
MESH = {"mesh.fsdp": "2", "mesh.tensor": "2"}  # two devices a process: examples and parameters lie across both
STAGES = ("distill", "plan", "operate", "finetune")

TWO = """
import gc, json, sys

gc.set_threshold(50_000, 20, 50)
from jsurgery.load_config import load_config
from jsurgery.errors import DoesNotFit, InputError
from jsurgery.runtime import processes

coordinator, number, workdir, fields, mesh, *stages = sys.argv[1:]
number, fields, mesh = int(number), json.loads(fields), json.loads(mesh)
processes.join(coordinator, 2, number)
import numpy as np
from jsurgery.run import start_run
from jsurgery.runtime.checkpoints import Checkpoints
from jsurgery.runtime.mesh import to_host, make_mesh, put_state

def tell(work):
    try:
        found = work()
    except (InputError, DoesNotFit, ValueError, RuntimeError) as error:
        found = [type(error).__name__, str(error)]
    with open(f"{workdir}_told_{number}", "a") as told:  # the standard output is Gloo's too, which breaks lines
        print(json.dumps(found), file=told)

def fail(error):
    raise error

tell(lambda: processes.gather_messages({"said": "é" * (2000 * number)}))
tell(lambda: processes.on_first(lambda: {"by": number}))
tell(lambda: processes.on_first(lambda: fail(InputError("no such file"))))
tell(lambda: processes.on_first(lambda: fail(ValueError("a fault"))))
tell(lambda: processes.on_all(lambda: fail(InputError("no such host")) if number else "fine"))
tell(lambda: start_run(load_config("tiny", fields | {"log_every": str(1 + number)} | mesh), workdir))
tell(lambda: start_run(load_config("tiny", fields), workdir))

def restored():
    devices = make_mesh(load_config("tiny", mesh).mesh)
    state = put_state(devices, {"ffn_in": {"kernel": np.arange(48, dtype=np.float32).reshape(8, 6)}})
    checkpoints = Checkpoints(workdir + "_state", every=1, keep=1)
    checkpoints.save(7, state, last=True)
    checkpoints.wait()
    step, found = checkpoints.restore(put_state(devices, {"ffn_in": {"kernel": np.zeros((8, 6), np.float32)}}))
    kernel = found["ffn_in"]["kernel"]
    held = [np.asarray(shard.data).shape for shard in kernel.addressable_shards]
    return {"step": step, "held": held, "kernel": to_host(kernel).ravel().tolist()}

tell(restored)
start_run(load_config("tiny", fields | mesh), workdir + "_traced").run_command("trace")
run = start_run(load_config("tiny", fields | mesh), workdir)
for stage in stages:
    run.run_command(stage)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def in_two_processes(*command: str) -> list[subprocess.CompletedProcess]:
    """Runs a command whose "NUMBER" and "HOST:PORT" are filled in, with two CPU devices each."""
    coordinator = f"localhost:{free_port()}"
    root = str(pathlib.Path(__file__).parents[2])
    flags = "--xla_force_host_platform_device_count=2 " + os.environ["XLA_FLAGS"]
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
    shutil.copytree(workdir, begun, dirs_exist_ok=True)
    for stage in STAGES:
        run.run_command(stage)
    return workdir, begun


@pytest.fixture(scope="module")
def two(alone, fields):
    """How two processes ended, and their workdir, beside which lies what each told."""
    _, workdir = alone
    ended = in_two_processes(
        "-c", TWO, "HOST:PORT", "NUMBER", str(workdir), json.dumps(fields), json.dumps(MESH), *STAGES
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
    assert len(first) == len(second) == 8
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
    expected = "data 1 x fsdp 1 x context 1 x tensor 1 = 1 devices, found 4 (cpu) in 2 processes; expected all of them"
    for found in told:
        assert found[6][0] == "DoesNotFit" and expected in found[6][1]


def test_a_state_is_saved_and_restored_by_both(told):
    for found in told:
        assert found[7] == {"step": 7, "held": [[4, 3], [4, 3]], "kernel": list(range(48))}


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
