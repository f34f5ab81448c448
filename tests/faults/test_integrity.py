"""Checkpoints whose files are not as they were written are found, and the files named; which stay, and which count."""

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
    """Steps 3 and 7."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, [3, 7])
    return folder


@pytest.fixture
def files(saved, tmp_path):
    """A copy of `saved`, and the files of its newest checkpoint."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "7"
    return newest, [path for path in sorted(newest.rglob("*")) if path.is_file()]


def payload_of(files: list[pathlib.Path]) -> pathlib.Path:
    return max((path for path in files if path.parent.name == "d"), key=lambda path: path.stat().st_size)


def test_one_flipped_bit_anywhere_is_found(files):
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
        place, bit = rng.integers(len(content)), rng.integers(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
        told = find_damage(epath.Path(newest))
        assert told == [f"{path.relative_to(newest)} is not as it was written"], (path, place, bit)
        path.write_bytes(content)
        trials += 1
    assert find_damage(epath.Path(newest)) == []


def test_orbax_alone_does_not_see_it(files, monkeypatch):
    """The control: with no comparison, a flipped bit in a payload loads, as another state."""
    newest, found = files
    payload = payload_of(found)
    content = payload.read_bytes()
    monkeypatch.setattr(checkpoints_module, "find_damage", lambda folder: [])
    silent = 0
    for place in range(len(content) // 3, len(content), len(content) // 7):
        payload.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            _, found = restore(newest.parent)
            silent += not same(found, 7)
        except Exception:  # whatever Orbax says to what it cannot decode
            continue
    assert silent


@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing", "empty"])
def test_restoring_names_the_file(files, fault):
    newest, found = files
    path = payload_of(found)
    content = path.read_bytes()
    damaged = {"flipped": content[:-1] + bytes([content[-1] ^ 4]), "truncated": content[:-9], "empty": b""}
    path.unlink() if fault == "missing" else path.write_bytes(damaged[fault])
    with pytest.raises(InputError, match="config.checkpoint.on_damage=older") as told:
        restore(newest.parent)
    message = str(told.value)
    assert str(newest) in message and str(path.relative_to(newest)) in message and len(message.splitlines()) == 1


def test_an_older_one_where_that_is_allowed(files, capsys):
    newest, found = files
    payload_of(found).write_bytes(b"?")
    step, older = restore(newest.parent, on_damage="older")
    assert step == 3 and same(older, 3)
    assert "damaged" in capsys.readouterr().err
    save(newest.parent, [7])  # gets there again
    assert restore(newest.parent)[0] == 7
    for path in newest.parent.glob("*/d/*"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(InputError, match="no checkpoint is intact"):
            restore(newest.parent, on_damage="older")


def test_without_a_manifest_it_is_not_there(files, capsys):
    newest, _ = files
    (newest / MANIFEST).unlink()
    step, found = restore(newest.parent)
    assert step == 3 and same(found, 3) and "cut short" in capsys.readouterr().err
    save(newest.parent, [4, 8])
    assert not newest.exists() and restore(newest.parent)[0] == 8


def test_which_ones_stay(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, range(1, 12), every=2, keep=2, keep_every=4)
    assert sorted(int(path.name) for path in folder.iterdir()) == [4, 8, 10]
    with Checkpoints(folder, every=2, keep=1) as checkpoints:
        checkpoints.save(11, state(11), last=True)
    assert [path.name for path in folder.iterdir()] == ["11"]


def test_what_may_object_comes_before_anything_is_written(tmp_path):
    folder = tmp_path / "checkpoints"
    refused = functools.partial(pytest.fail, "asked")
    with Checkpoints(folder, every=5, keep=2) as checkpoints:
        checkpoints.save(4, state(4), check=refused)
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(5, state(5), check=lambda: 1 // 0)
        assert checkpoints.complete_steps() == [] and not folder.exists()
