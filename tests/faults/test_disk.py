"""Full disks, read-only disks and disappearing files give errors of one line; earlier files stay intact."""

import os
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jsurgery import cli
from jsurgery.data.shards import Records, shard_path, write_shard
from jsurgery.errors import InputError, file_system_reason
from jsurgery.io.files import write_json
from jsurgery.io.safetensors import read_tensors, write_tensors
from jsurgery.runtime.checkpoints import Checkpoints

MEGABYTE = 1 << 20


@pytest.fixture
def disk(tmp_path):
    """(folder, mount): `mount(*options)` mounts a tmpfs of its own at the folder, or remounts it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            pytest.skip(f"NOT TESTED: no disk can be mounted here: {process.stderr.strip()}")

    yield folder, mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def state(step: int):
    """Random values, which do not compress."""
    return {"weights": jnp.asarray(np.random.default_rng(step).random(MEGABYTE // 8))}  # half a megabyte of float32


def test_a_full_disk_during_a_save_keeps_earlier_checkpoints(disk):
    folder, mount = disk
    mount(f"size={4 * MEGABYTE}")
    saved = []
    with pytest.raises(InputError) as raised, Checkpoints(folder / "checkpoints", every=1, keep=99) as checkpoints:
        for step in range(1, 40):
            checkpoints.save(step, state(step))
            checkpoints.wait()
            saved.append(step)
    message = str(raised.value)
    assert "No space left on device" in message and f"step {saved[-1]} is still there" in message
    assert len(message.splitlines()) == 1 and 1 <= len(saved) < 10

    mount("remount", f"size={16 * MEGABYTE}")
    with Checkpoints(folder / "checkpoints", every=1, keep=99) as checkpoints:
        step, found = checkpoints.restore(state(0))
        assert step == saved[-1] and np.array_equal(found["weights"], state(step)["weights"])
        checkpoints.save(step + 1, state(step + 1))
    with Checkpoints(folder / "checkpoints", every=1, keep=99) as checkpoints:
        assert checkpoints.restore(state(0))[0] == step + 1


def records(count: int):
    return ({"latents": np.random.default_rng(i).random(MEGABYTE // 8)} for i in range(count))


def test_a_full_disk_leaves_other_files_complete(disk):
    """Shards, tensors and JSON: under its final name a file is complete, if need be the earlier version."""
    folder, mount = disk
    mount(f"size={4 * MEGABYTE}")
    shards, tensors, marker = (epath.Path(folder / name) for name in ("shards", "tensors.safetensors", "marker.json"))
    write_shard(shard_path(shards, 0), records(1))
    write_tensors(tensors, {"a": np.ones(9)})
    write_json(marker, {"complete": False})
    with pytest.raises(Exception) as raised:
        write_shard(shard_path(shards, 1), records(9))
    assert "No space left on device" in (file_system_reason(raised.value) or ""), repr(raised.value)
    with pytest.raises(OSError) as raised:
        write_tensors(tensors, {"a": np.random.default_rng(0).random(MEGABYTE)})
    assert "No space left on device" in (file_system_reason(raised.value) or "")
    with (folder / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
        while True:
            filler.write(os.urandom(4096))
    with pytest.raises(OSError) as raised:
        write_json(marker, {"complete": True, "more": "x" * 100_000})
    assert "No space left on device" in (file_system_reason(raised.value) or "")
    assert len(Records(folder / "shards")) == 1 and read_tensors(tensors)["a"].sum() == 9
    assert marker.read_text() == '{\n  "complete": false\n}\n'


def test_a_read_only_disk_is_refused(disk, tiny_pipeline, capsys):
    folder, mount = disk
    mount("size=1m")
    mount("remount", "ro")
    arguments = ["--config.video.frames=5", "--config.video.height=64", "--config.video.width=48"]
    arguments += [f"--config.model.path={tiny_pipeline}", "--config.plan.budget=2R2", f"--workdir={folder / 'run'}"]
    assert cli.main(["trace", *arguments]) == 2
    message = capsys.readouterr().err
    assert "Read-only file system" in message and str(folder / "run") in message and len(message.splitlines()) == 1


def test_a_disappearing_checkpoint_folder_is_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep=9)
    checkpoints.save(1, state(1))
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file is in its place")
    with pytest.raises(InputError, match="could not be saved") as raised:
        checkpoints.save(2, state(2))
        checkpoints.close()
    assert len(str(raised.value).splitlines()) == 1


def test_a_disappearing_shard_is_one_line(tmp_path):
    """A shard is removed while a stage reads it."""
    write_shard(shard_path(tmp_path, 0), records(3))
    source = Records(tmp_path)
    shard_path(tmp_path, 0).unlink()
    with pytest.raises(Exception) as raised:
        [source[i] for i in range(3)]
    assert isinstance(raised.value, InputError) or file_system_reason(raised.value), repr(raised.value)
