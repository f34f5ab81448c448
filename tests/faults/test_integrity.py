"""Changed files of checkpoints are found and named; which checkpoints are kept, and which are restored."""

import functools
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.hashes import MANIFEST, find_damage
from jsurgery.runtime import checkpoints as checkpoints_module
from jsurgery.runtime.checkpoints import Checkpoints

STATE = {"a": np.arange(600, dtype=np.float32).reshape(30, 20), "b": (np.int32(3), np.ones(7, np.float32))}


def state(step: int):
    return jax.tree.map(lambda leaf: jax.numpy.asarray(leaf + step), STATE)


def same(found, step: int) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(state(step)), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def save(folder: pathlib.Path, steps, **options) -> None:
    with Checkpoints(folder, **{"every": 1, "keep": 9} | options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step))


def restore(folder: pathlib.Path, **options):
    with Checkpoints(folder, every=1, keep=9, **options) as checkpoints:
        return checkpoints.restore(state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of steps 3 and 7."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, [3, 7])
    return folder


@pytest.fixture
def files(saved, tmp_path):
    """(newest checkpoint in a copy of `saved`, its files)."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "7"
    return newest, [path for path in sorted(newest.rglob("*")) if path.is_file()]


def payload_of(files: list[pathlib.Path]) -> pathlib.Path:
    return max((path for path in files if path.parent.name == "d"), key=lambda path: path.stat().st_size)


def test_every_flipped_bit_is_found(files):
    newest, found = files
    assert len(found) > 5 and any(path.name == MANIFEST for path in found)
    assert find_damage(epath.Path(newest)) == []
    rng = np.random.default_rng(0)
    trials = 0
    while trials < 100:
        path = found[rng.integers(len(found))]
        if not path.stat().st_size:
            continue
        content = path.read_bytes()
        position, bit = rng.integers(len(content)), rng.integers(8)
        path.write_bytes(content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :])
        damage = find_damage(epath.Path(newest))
        assert damage == [f"{path.relative_to(newest)} is not as it was written"], (path, position, bit)
        path.write_bytes(content)
        trials += 1
    assert find_damage(epath.Path(newest)) == []


def test_control_orbax_alone_does_not_find_a_flipped_bit(files, monkeypatch):
    """Without the comparison of hashes, a state with a flipped bit is restored."""
    newest, found = files
    payload = payload_of(found)
    content = payload.read_bytes()
    monkeypatch.setattr(checkpoints_module, "find_damage", lambda folder: [])
    undetected = 0
    for position in range(len(content) // 3, len(content), len(content) // 7):
        payload.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            _, found = restore(newest.parent)
            undetected += not same(found, 7)
        except Exception:  # Orbax could not decode the payload
            continue
    assert undetected


@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing", "empty"])
def test_restoring_names_the_damaged_file(files, fault):
    newest, found = files
    path = payload_of(found)
    content = path.read_bytes()
    damaged = {"flipped": content[:-1] + bytes([content[-1] ^ 4]), "truncated": content[:-9], "empty": b""}
    path.unlink() if fault == "missing" else path.write_bytes(damaged[fault])
    with pytest.raises(InputError, match="config.checkpoint.on_damage=older") as raised:
        restore(newest.parent)
    message = str(raised.value)
    assert str(newest) in message and str(path.relative_to(newest)) in message and len(message.splitlines()) == 1


def test_an_older_checkpoint_is_restored_if_the_config_allows_it(files, capsys):
    newest, found = files
    payload_of(found).write_bytes(b"?")
    step, older = restore(newest.parent, on_damage="older")
    assert step == 3 and same(older, 3)
    assert "damaged" in capsys.readouterr().err
    save(newest.parent, [7])  # the resumed run saves step 7 again
    assert restore(newest.parent)[0] == 7
    for path in newest.parent.glob("*/d/*"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(InputError, match="no checkpoint is intact"):
            restore(newest.parent, on_damage="older")


def test_a_checkpoint_without_a_manifest_is_ignored(files, capsys):
    newest, _ = files
    (newest / MANIFEST).unlink()
    step, found = restore(newest.parent)
    assert step == 3 and same(found, 3) and "cut short" in capsys.readouterr().err
    save(newest.parent, [4, 8])
    assert not newest.exists() and restore(newest.parent)[0] == 8


def test_the_newest_and_every_nth_checkpoint_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, range(1, 12), every=2, keep=2, keep_every=4)
    assert sorted(int(path.name) for path in folder.iterdir()) == [4, 8, 10]
    with Checkpoints(folder, every=2, keep=1) as checkpoints:
        checkpoints.save(11, state(11), last=True)
    assert [path.name for path in folder.iterdir()] == ["11"]


def test_the_check_runs_before_anything_is_written(tmp_path):
    folder = tmp_path / "checkpoints"
    fail = functools.partial(pytest.fail, "checked at a step that is not saved")
    with Checkpoints(folder, every=5, keep=2) as checkpoints:
        checkpoints.save(4, state(4), check=fail)
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(5, state(5), check=lambda: 1 // 0)
        assert checkpoints.complete_steps() == [] and not folder.exists()
