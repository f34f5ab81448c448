"""The lock of a stage's folder: a second run is refused and names the first; the lock of a killed run is free."""

import errno
import fcntl
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
    """A process that holds the lock of `tmp_path`/stage."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "stage")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_holder_is_named_until_it_is_killed(tmp_path, other):
    stage = StageFolder(tmp_path, "stage", ConfigDict({"seed": 0}), ["seed"])
    runs = []
    with pytest.raises(InputError) as raised:
        stage.run(lambda: runs.append(1))
    message = str(raised.value)
    assert f"process {other.pid} on {socket.gethostname()}" in message and str(tmp_path / "stage") in message
    assert len(message.splitlines()) == 1 and not runs
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["lock"], "the refused run wrote a file"

    other.send_signal(signal.SIGKILL)
    other.wait()
    assert json.loads((tmp_path / "stage" / "lock").read_text())["pid"] == other.pid
    stage.run(lambda: runs.append(1))
    assert runs == [1] and not (tmp_path / "stage" / "lock").exists()


def test_the_lock_is_released_after_an_error(tmp_path):
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


def test_only_one_process_holds_the_lock(tmp_path):
    """Four processes take the lock again and again; `mkdir` would fail if two held it at once."""
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
    workers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    counts = [int(process.communicate(timeout=120)[0]) for process in workers]
    assert [process.returncode for process in workers] == [0] * 4 and min(counts) > 0


def test_a_file_system_without_locks_is_no_other_run(tmp_path, monkeypatch, capsys):
    """NFS without its daemon and Lustre mounted without `flock` answer so."""

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    runs = []
    StageFolder(tmp_path, "stage", ConfigDict({"seed": 0}), ["seed"]).run(lambda: runs.append(1))
    line = capsys.readouterr().err
    assert runs == [1] and "has no locks" in line and len(line.splitlines()) == 1
