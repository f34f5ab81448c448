"""Stages, checkpoints, shards, arrays and videos on an object store, where a rename is a copy and a deletion."""

import json
import tempfile
from typing import Any

import fsspec
import numpy as np
import pytest
from etils import epath
from etils.epath import backend as backends
from ml_collections import ConfigDict

from jsurgery.data import sprites
from jsurgery.data.clip_index import find_clips
from jsurgery.data.shards import Records, shard_path, write_shard
from jsurgery.data.video_writer import read_settings, write_video
from jsurgery.errors import InputError
from jsurgery.io.files import load_array, save_array, write_json
from jsurgery.io.hashes import MANIFEST, find_damage, write_manifest
from jsurgery.io.safetensors import write_shards
from jsurgery.runtime.checkpoints import Checkpoints
from jsurgery.runtime.metrics import Metrics
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.wan.folder_hashes import check_hashes, write_hashes
from tests.faults.fake_gcs import FakeGcs, Killed, empty_bucket, served

STEPS, EVERY = 4, 2


@pytest.fixture
def store(monkeypatch):
    return empty_bucket(monkeypatch)


def launch() -> None:
    """Runs a stage whose training adds up the numbers of its steps, and whose result is the sum."""
    config = ConfigDict({"seed": 0})
    stage = StageFolder("gs://bucket/run", "training", config, ["seed"])

    def train() -> None:
        with Checkpoints(stage.folder / "checkpoints", every=EVERY, keep=1) as checkpoints:
            start, state = checkpoints.restore({"sum": np.zeros(3), "steps": np.zeros(1)})
            metrics = Metrics(stage.folder, start)
            for step in range(start, STEPS):
                state = {"sum": state["sum"] + step, "steps": state["steps"] + 1}
                metrics.log(step + 1, loss=step)
                metrics.flush()
                checkpoints.save(step + 1, state, last=step + 1 == STEPS)
        write_json(stage.folder / "result.json", {name: leaf.tolist() for name, leaf in state.items()})

    stage.run(train)


def check_complete(folder: epath.Path) -> None:
    """Fails if a checkpoint with a manifest, or a stage marked as complete, is not complete."""
    for manifest in [key for key in fsspec_keys(folder) if key.endswith(MANIFEST)]:
        assert find_damage(epath.Path(f"gs://{manifest}").parent) == []
    if (folder / "stage.json").exists() and json.loads((folder / "stage.json").read_text())["complete"]:
        assert json.loads((folder / "result.json").read_text())["steps"] == [STEPS]


def fsspec_keys(folder: epath.Path) -> list[str]:
    store = backends.fsspec_backend.fs(folder)
    return list(store.objects)


def without_times(content: bytes) -> Any:
    """A file's content; of a stage's marker without what tells how it was made, and so how long it took."""
    if b'"made_by"' not in content:
        return content
    marker = json.loads(content)
    marker.pop("made_by")
    return marker


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
        assert all(without_times(expected[key]) == without_times(content) for key, content in found.items()), number
        resumed += store.changes - at_restart < changes
    assert resumed > changes / 4, "expected more runs to resume from earlier files"


def test_control_a_manifest_without_its_files_is_found(store):
    """If the manifest were written first, a killed run could leave this."""
    launch()
    folder = epath.Path("gs://bucket/run/training/checkpoints/4")
    del store.objects["bucket/run/training/checkpoints/4/d/0.npy"]
    assert find_damage(folder) == ["d/0.npy is missing"]


def test_an_object_store_has_no_lock(store):
    launch()
    assert not [key for key in store.objects if key.endswith("lock")] and fsspec.get_filesystem_class("gcs") is FakeGcs


def write_files(folder: epath.Path) -> None:
    """A shard, an array and a video, by libraries that know no object stores."""
    write_shard(shard_path(folder, 0), ({"latents": np.full((2, 3), number)} for number in range(5)))
    save_array(folder / "latents.npy", np.arange(6).reshape(2, 3))
    write_video(folder / "videos" / "0000.mp4", sprites.render(sprites.scene_at(0, 0), 5, 32, 48), 8, {"seed": 3})


def test_shards_arrays_and_videos_are_written_and_read(store, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = epath.Path("gs://bucket/run")
    write_files(folder)
    names = ["bucket/run/00000.array_record", "bucket/run/latents.npy", "bucket/run/videos/0000.mp4"]
    assert sorted(store.objects) == names and not list(tmp_path.iterdir()), "files are left in the temporary folder"
    with served(store):
        records = Records(folder)
        assert [records[number]["latents"].tolist() for number in (4, 0)] == [[[4] * 3] * 2, [[0] * 3] * 2]
        assert len(records) == 5
    assert load_array(folder / "latents.npy").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_settings(folder / "videos" / "0000.mp4") == {"seed": 3}

    expected, changes = dict(store.objects), store.changes
    assert changes == 9, "each file is uploaded, copied to its name, and its upload deleted"
    for number in range(1, changes + 1):
        store.objects, store.changes, store.killed_at = {}, 0, number
        with pytest.raises(Killed):
            write_files(folder)
        found = {name: content for name, content in store.objects.items() if name in names}
        assert list(found) == names[: number // 3], "a name without its whole file, or a file without its name"
        assert all(len(content) == len(expected[name]) for name, content in found.items())
        store.killed_at = 0


def test_a_manifest_takes_the_hashes_of_the_store(store):
    """Nothing is read again after writing; damage is found as before, and an object without a hash is read."""
    folder = epath.Path("gs://bucket/run/checkpoints/7")
    rng = np.random.default_rng(0)
    for name in ("d/a", "d/b", "c"):
        (folder / name).write_bytes(rng.bytes(1000))
    store.read.clear()
    write_manifest(folder)
    assert store.read == [] and find_damage(folder) == []
    assert sorted(set(store.read)) == [f"bucket/run/checkpoints/7/{name}" for name in ("c", "d/a", "d/b", MANIFEST)]
    whole = store.objects["bucket/run/checkpoints/7/d/b"]
    for position, bit in rng.integers([1000, 8], size=(20, 2)):
        flipped = bytes([whole[position] ^ (1 << bit)])
        store.objects["bucket/run/checkpoints/7/d/b"] = whole[:position] + flipped + whole[position + 1 :]
        assert find_damage(folder) == ["d/b is not as it was written"]

    store.hashes = False
    write_manifest(folder)
    assert json.loads((folder / MANIFEST).read_text())["files"]["c"][1].isalnum() and find_damage(folder) == []


@pytest.mark.parametrize("times", [True, False], ids=["with times", "without"])
def test_a_model_folder_is_hashed_once_while_its_files_keep_their_time(store, times):
    folder, key = epath.Path("gs://bucket/model"), f"bucket/model/{times}.safetensors"
    file = epath.Path(f"gs://{key}")
    hashes = write_shards(folder, str(times), {"a": np.arange(100_000.0)})
    write_hashes(folder, hashes)
    store.times = {key: 1_700_000_000} if times else {}
    read = []
    for _ in range(3):
        before = store.bytes_read
        check_hashes(folder)
        read.append(store.bytes_read - before >= file.stat().length)
    assert read == [True, not times, not times]

    store.objects[key] = store.objects[key][:-1] + b"\xff"
    store.times = {key: 1_700_000_001} if times else {}
    with pytest.raises(InputError, match="safetensors: damaged, or changed since it was written: its hash differs"):
        check_hashes(folder)


INDEXES = {
    "csv": "path,caption\na.mp4,one\ngs://bucket/clips/b/c.mp4,two\ngs://other/d.mp4,three\n../e.mp4,four\n",
    "tsv": "path\tcaption\na.mp4\tone\ngs://bucket/clips/b/c.mp4\ttwo\ngs://other/d.mp4\tthree\n../e.mp4\tfour\n",
    "jsonl": "".join(
        json.dumps({"path": path, "caption": caption}) + "\n"
        for path, caption in (("a.mp4", "one"), ("gs://bucket/clips/b/c.mp4", "two"), ("gs://other/d.mp4", "three"))
    ),
}


@pytest.mark.parametrize("suffix", INDEXES)
@pytest.mark.parametrize("where", ["gs", "local"])
def test_an_index_of_clips_in_a_bucket(store, tmp_path, suffix, where):
    """Rows lead to files below the index's folder, or below --root, in the bucket, and nowhere else."""
    index, root = f"gs://bucket/clips/index.{suffix}", None
    if where == "local":
        index, root = str(tmp_path / f"index.{suffix}"), "gs://bucket/clips"
    epath.Path(index).write_text(INDEXES[suffix])
    clips = find_clips(index, root)
    assert [clip.path for clip in clips[:2]] == ["gs://bucket/clips/a.mp4", "gs://bucket/clips/b/c.mp4"]
    assert [clip.caption for clip in clips[:2]] == ["one", "two"] and not clips[0].problem and not clips[1].problem
    assert all("outside of gs://bucket/clips" in clip.problem for clip in clips[2:]) and len(clips) > 2


def test_clips_of_a_folder_in_a_bucket(store):
    for name in ("a.mp4", "b/c.MOV", "._a.mp4", "d.gif"):
        store.objects[f"bucket/clips/{name}"] = b"a video"
    store.objects["bucket/clips/a.txt"] = b"one"
    clips = find_clips("gs://bucket/clips")
    assert [(clip.path, clip.caption) for clip in clips] == [
        ("gs://bucket/clips/a.mp4", "one"),
        ("gs://bucket/clips/b/c.MOV", ""),
    ]
    del store.objects["bucket/clips/a.txt"]
    store.objects["bucket/clips/metadata.csv"] = b"file_name,text\na.mp4,one\nb/c.MOV,two\n"
    assert [clip.caption for clip in find_clips("gs://bucket/clips")] == ["one", "two"]
