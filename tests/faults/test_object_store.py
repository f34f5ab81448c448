"""The marker logic on an object store, where a rename is a copy and a deletion: whatever dies in between goes on."""

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


class FilesOfOrbax:
    """Writes and reads what Orbax would, through etils: its own writer speaks to Google alone."""

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
    """An empty bucket; `gs://` goes there."""
    install()
    found = FakeGcs()
    monkeypatch.setattr(backends.fsspec_backend, "_get_filesystem", lambda name: found)
    monkeypatch.setattr(epath.gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(checkpoints_module.ocp, "StandardCheckpointer", FilesOfOrbax)
    return found


def launch() -> None:
    """A stage that trains: each step adds its number; ends with what was added up."""
    config = ConfigDict({"seed": 0})
    stage = StageFolder("gs://bucket/run", "training", config, ["seed"])

    def train() -> None:
        with Checkpoints(stage.folder / "checkpoints", every=EVERY, keep=1) as checkpoints:
            start, state = checkpoints.restore({"sum": np.zeros(3), "steps": np.zeros(1)})
            metrics = Metrics.__new__(Metrics)  # TensorBoard's writer knows Google's buckets alone, too
            metrics.folder, metrics.board = stage.folder, Silent()
            metrics.rows = [row for row in read_metrics(stage.folder) if row["step"] <= start]
            for step in range(start, STEPS):
                state = {"sum": state["sum"] + step, "steps": state["steps"] + 1}
                metrics.log(step + 1, loss=step)
                metrics.flush()
                checkpoints.save(step + 1, state, last=step + 1 == STEPS)
        write_json(stage.folder / "result.json", {name: leaf.tolist() for name, leaf in state.items()})

    stage.run(train)


class Silent:
    def add_scalar(self, *_):
        pass

    def flush(self):
        pass


def check(folder: epath.Path) -> None:
    """What claims to be complete is."""
    for manifest in [key for key in fsspec_keys(folder) if key.endswith(MANIFEST)]:
        assert find_damage(epath.Path(f"gs://{manifest}").parent) == []
    if (folder / "stage.json").exists() and json.loads((folder / "stage.json").read_text())["complete"]:
        assert json.loads((folder / "result.json").read_text())["steps"] == [STEPS]


def fsspec_keys(folder: epath.Path) -> list[str]:
    store = backends.fsspec_backend.fs(folder)
    return list(store.objects)


def test_the_client_may_die_before_every_change(store):
    launch()
    expected, changes = dict(store.objects), store.changes
    assert json.loads(expected["bucket/run/training/result.json"]) == {"sum": [6.0] * 3, "steps": [4.0]}
    assert changes > 30 and not [key for key in expected if key.endswith(".tmp")]
    went_on = 0
    for number in range(1, changes + 1):
        store.objects, store.changes, store.dies_at = {}, 0, number
        # it may happen in the thread that seals a checkpoint
        with pytest.raises(Killed):
            launch()
        store.dies_at = 0
        check(epath.Path("gs://bucket/run/training"))
        begun = store.changes
        launch()
        check(epath.Path("gs://bucket/run/training"))
        found = {key: content for key, content in store.objects.items() if not key.endswith(".tmp")}
        assert found.keys() == expected.keys(), number
        name = "bucket/run/training/result.json"
        assert json.loads(found.pop(name)) == json.loads(expected[name])
        assert all(expected[key] == content for key, content in found.items()), number
        went_on += store.changes - begun < changes
    assert went_on > changes / 4, "many of them went on from what was there"


def test_a_marker_without_its_files_would_be_seen(store):
    """The control: were the manifest written first, a death would leave one that lies."""
    launch()
    folder = epath.Path("gs://bucket/run/training/checkpoints/4")
    del store.objects["bucket/run/training/checkpoints/4/d/sum"]
    assert find_damage(folder) == ["d/sum is missing"]


def test_an_object_store_has_no_lock(store):
    launch()
    assert not [key for key in store.objects if key.endswith("lock")] and fsspec.get_filesystem_class("gcs") is FakeGcs
