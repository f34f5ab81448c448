"""Stages and checkpoints on an object store, where a rename is a copy and a deletion: a killed run resumes."""

import json

import fsspec
import numpy as np
import pytest
from etils import epath
from etils.epath import backend as backends
from ml_collections import ConfigDict

from jsurgery.io.files import write_json
from jsurgery.io.hashes import MANIFEST, find_damage
from jsurgery.runtime import checkpoints as checkpoints_module
from jsurgery.runtime.checkpoints import Checkpoints
from jsurgery.runtime.metrics import Metrics, read_metrics
from jsurgery.runtime.stage_folder import StageFolder
from tests.faults.fake_gcs import FakeGcs, Killed, install

STEPS, EVERY = 4, 2


class FakeCheckpointer:
    """Writes and reads a state through etils, in place of Orbax, whose writer needs Google's servers."""

    def save(self, path, state, force):
        if path.exists():
            path.rmtree()
        for name, leaf in state.items():
            (path / "d" / name).write_bytes(np.asarray(leaf).tobytes())
        (path / "commit_success.txt").write_text("")

    def restore(self, path, abstract):
        return {name: np.frombuffer((path / "d" / name).read_bytes(), np.float64) for name in abstract}

    def wait_until_finished(self):
        pass

    def close(self):
        pass


@pytest.fixture
def store(monkeypatch):
    """An empty bucket, which all `gs://` paths go to."""
    install()
    found = FakeGcs()
    monkeypatch.setattr(backends.fsspec_backend, "_get_filesystem", lambda name: found)
    monkeypatch.setattr(epath.gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(checkpoints_module.ocp, "StandardCheckpointer", FakeCheckpointer)
    return found


def launch() -> None:
    """Runs a stage whose training adds up the numbers of its steps, and whose result is the sum."""
    config = ConfigDict({"seed": 0})
    stage = StageFolder("gs://bucket/run", "training", config, ["seed"])

    def train() -> None:
        with Checkpoints(stage.folder / "checkpoints", every=EVERY, keep=1) as checkpoints:
            start, state = checkpoints.restore({"sum": np.zeros(3), "steps": np.zeros(1)})
            metrics = Metrics.__new__(Metrics)  # whose writer for TensorBoard needs Google, too
            metrics.folder, metrics.board = stage.folder, SilentBoard()
            metrics.rows = [row for row in read_metrics(stage.folder) if row["step"] <= start]
            for step in range(start, STEPS):
                state = {"sum": state["sum"] + step, "steps": state["steps"] + 1}
                metrics.log(step + 1, loss=step)
                metrics.flush()
                checkpoints.save(step + 1, state, last=step + 1 == STEPS)
        write_json(stage.folder / "result.json", {name: leaf.tolist() for name, leaf in state.items()})

    stage.run(train)


class SilentBoard:
    def add_scalar(self, *_):
        pass

    def flush(self):
        pass


def check_complete(folder: epath.Path) -> None:
    """Fails if a checkpoint with a manifest, or a stage marked as complete, is not complete."""
    for manifest in [key for key in fsspec_keys(folder) if key.endswith(MANIFEST)]:
        assert find_damage(epath.Path(f"gs://{manifest}").parent) == []
    if (folder / "stage.json").exists() and json.loads((folder / "stage.json").read_text())["complete"]:
        assert json.loads((folder / "result.json").read_text())["steps"] == [STEPS]


def fsspec_keys(folder: epath.Path) -> list[str]:
    store = backends.fsspec_backend.fs(folder)
    return list(store.objects)


def test_a_run_killed_before_any_change_resumes_to_the_same_result(store):
    launch()
    expected, changes = dict(store.objects), store.changes
    assert json.loads(expected["bucket/run/training/result.json"]) == {"sum": [6.0] * 3, "steps": [4.0]}
    assert changes > 30 and not [key for key in expected if key.endswith(".tmp")]
    resumed = 0
    for number in range(1, changes + 1):
        store.objects, store.changes, store.killed_at = {}, 0, number
        with pytest.raises(Killed):  # perhaps in the thread that writes a checkpoint's manifest
            launch()
        store.killed_at = 0
        check_complete(epath.Path("gs://bucket/run/training"))
        at_restart = store.changes
        launch()
        check_complete(epath.Path("gs://bucket/run/training"))
        found = {key: content for key, content in store.objects.items() if not key.endswith(".tmp")}
        assert found.keys() == expected.keys(), number
        name = "bucket/run/training/result.json"
        assert json.loads(found.pop(name)) == json.loads(expected[name])
        assert all(expected[key] == content for key, content in found.items()), number
        resumed += store.changes - at_restart < changes
    assert resumed > changes / 4, "expected more runs to resume from earlier files"


def test_control_a_manifest_without_its_files_is_found(store):
    """If the manifest were written first, a killed run could leave this."""
    launch()
    folder = epath.Path("gs://bucket/run/training/checkpoints/4")
    del store.objects["bucket/run/training/checkpoints/4/d/sum"]
    assert find_damage(folder) == ["d/sum is missing"]


def test_an_object_store_has_no_lock(store):
    launch()
    assert not [key for key in store.objects if key.endswith("lock")] and fsspec.get_filesystem_class("gcs") is FakeGcs
