"""Two runs in one folder: the second is refused and told of the first; one that was killed is no obstacle."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from jsurgery.errors import InputError
from jsurgery.runtime.lock import locked
from jsurgery.runtime.stage_folder import StageFolder

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """
import sys, time, types
sys.modules["jax"] = types.SimpleNamespace(distributed=types.SimpleNamespace(is_initialized=lambda: False))
sys.modules["jax.experimental"] = types.SimpleNamespace(multihost_utils=None)
from etils import epath
from jsurgery.runtime.lock import locked
with locked(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds `tmp_path`/stage."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "stage")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_other_is_named_until_it_is_killed(tmp_path, other):
    stage = StageFolder(tmp_path, "stage", ConfigDict({"seed": 0}), ["seed"])
    runs = []
    with pytest.raises(InputError) as told:
        stage.run(lambda: runs.append(1))
    message = str(told.value)
    assert f"process {other.pid} on {socket.gethostname()}" in message and str(tmp_path / "stage") in message
    assert len(message.splitlines()) == 1 and not runs
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["lock"], "nothing else was touched"

    other.send_signal(signal.SIGKILL)
    other.wait()
    assert json.loads((tmp_path / "stage" / "lock").read_text())["pid"] == other.pid
    stage.run(lambda: runs.append(1))
    assert runs == [1] and not (tmp_path / "stage" / "lock").exists()


def test_it_is_given_back_whatever_happens(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "stage"):
            raise ZeroDivisionError
    with (
        locked(tmp_path / "stage"),
        pytest.raises(InputError, match=f"process {os.getpid()}"),
        locked(tmp_path / "stage"),
    ):
        pass
    with locked(tmp_path / "stage"), locked(tmp_path / "other"):
        pass


def test_one_at_a_time(tmp_path):
    """Eight processes that try for a while: never two inside at once."""
    script = """
import os, pathlib, sys, time, types
sys.modules["jax"] = types.SimpleNamespace(distributed=types.SimpleNamespace(is_initialized=lambda: False))
sys.modules["jax.experimental"] = types.SimpleNamespace(multihost_utils=None)
from jsurgery.errors import InputError
from jsurgery.runtime.lock import locked
folder, entered, until = pathlib.Path(sys.argv[1]), 0, time.monotonic() + 1
while time.monotonic() < until or not entered:
    try:
        with locked(folder):
            os.mkdir(folder / "inside")
            os.rmdir(folder / "inside")
            entered += 1
    except InputError:
        pass
print(entered)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path / "stage")]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    counts = [int(process.communicate(timeout=120)[0]) for process in started]
    assert [process.returncode for process in started] == [0] * 4 and min(counts) > 0
