"""A changed, truncated or missing file of a model folder is found and named; folders without hashes still load."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import InputError
from jsurgery.io import hashes
from jsurgery.io.hashes import HASHES, folder_fingerprint
from jsurgery.io.safetensors import read_tensors
from jsurgery.surgery.operate import save_model
from jsurgery.wan.checkpoint import load_transformer, read_config, save_transformer
from jsurgery.wan.folder_hashes import check_hashes, write_hashes
from jsurgery.wan.model_folder import BUNDLED, check_pipeline
from tests.conftest import TINY_TRANSFORMER

TRIALS = 100


def files_of(model: pathlib.Path) -> list[pathlib.Path]:
    return [path.relative_to(model) for path in sorted(model.rglob("*")) if path.is_file()]


def refusal(model: pathlib.Path) -> str:
    with pytest.raises(InputError) as raised:
        check_pipeline(str(model))
    return str(raised.value)


@pytest.fixture
def model(tmp_path, tiny_pipeline) -> pathlib.Path:
    return shutil.copytree(tiny_pipeline, tmp_path / "model")


def test_the_file_of_a_flipped_byte_is_named(model):
    """Half of the trials draw from all bytes. The other half draw a file first, so that small files occur too."""
    rng, files = np.random.default_rng(0), files_of(model)
    sizes = np.array([(model / file).stat().st_size for file in files], float)
    found = 0
    for trial in range(TRIALS):
        file = files[rng.choice(len(files), p=sizes / sizes.sum() if trial % 2 else None)]
        content = (model / file).read_bytes()
        at = rng.integers(len(content))
        flipped = bytes([content[at] ^ int(rng.integers(1, 256))])
        (model / file).write_bytes(content[:at] + flipped + content[at + 1 :])
        found += str(model / file) in refusal(model)
        (model / file).write_bytes(content)
    assert found == TRIALS
    check_pipeline(str(model))


def test_truncated_and_missing_files_are_named(model):
    rng, files = np.random.default_rng(1), files_of(model)
    for trial in range(TRIALS):
        file = files[rng.integers(len(files))]
        content = (model / file).read_bytes()
        if trial % 2 and file.name != HASHES:  # a folder without hashes is valid
            (model / file).unlink()
        else:
            os.truncate(model / file, rng.integers(len(content)))
        assert str(model / file) in refusal(model)
        (model / file).write_bytes(content)
    check_pipeline(str(model))


def test_control_without_hashes_a_flipped_byte_loads_silently(model):
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    before = read_tensors(weights)
    content = weights.read_bytes()
    weights.write_bytes(content[:-10] + bytes([content[-10] ^ 64]) + content[-9:])
    with pytest.raises(InputError, match="hash"):
        load_transformer(model / "transformer")
    (model / "transformer" / HASHES).unlink()
    check_pipeline(str(model))
    load_transformer(model / "transformer")
    changed = [name for name, tensor in read_tensors(weights).items() if not np.array_equal(tensor, before[name])]
    assert len(changed) == 1


@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_written_models_have_correct_hashes(tmp_path, random_transformer, shard_bytes):
    """The hashes, which the writer computes while it writes, equal those of the finished files."""
    transformer = random_transformer(TINY_TRANSFORMER)
    save_transformer(transformer, tmp_path, shard_bytes=shard_bytes)
    recorded = json.loads((tmp_path / HASHES).read_text())["files"]
    assert recorded.keys() == {path.name for path in tmp_path.iterdir()} - {HASHES}
    for name, (size, digest) in recorded.items():
        content = (tmp_path / name).read_bytes()
        assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    assert (len(recorded) > 3) == (shard_bytes == 4000)


def test_a_model_can_be_saved_over_one_with_other_shards(tmp_path, random_transformer):
    transformer = random_transformer(TINY_TRANSFORMER)
    for shard_bytes in (4000, 10**9, 9000):
        save_transformer(transformer, tmp_path, shard_bytes=shard_bytes)
        check_hashes(tmp_path)
        load_transformer(tmp_path)


def test_hashes_of_an_operated_model_include_its_base_pipeline(tmp_path, random_transformer):
    hybrid = HybridConfig(rates=(2, 1))
    save_model(random_transformer(dataclasses.replace(TINY_TRANSFORMER, hybrid=hybrid)), tmp_path, "tiny_wan")
    check_hashes(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["base_pipeline"] == "tiny_wan"
    assert read_config(tmp_path).hybrid == hybrid


def test_an_interrupted_write_leaves_no_outdated_hashes(tmp_path, random_transformer, monkeypatch):
    transformer = random_transformer(TINY_TRANSFORMER)
    save_transformer(transformer, tmp_path)

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jsurgery.wan.checkpoint.write_hashes", disk_full)
    with pytest.raises(OSError):
        save_transformer(transformer, tmp_path)
    assert not (tmp_path / HASHES).exists()


def test_checking_one_file_ignores_the_others(tmp_path, model):
    folder = model / "transformer"
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    check_hashes(folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"config\.json"):
        check_hashes(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", ".hidden", ""])
def test_hashes_of_files_elsewhere_are_refused(tmp_path, name):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_hashes(folder, {name: [1, hashlib.sha256(b"x").hexdigest()]})
    with pytest.raises(InputError, match="in this folder"):
        check_hashes(folder)


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"one")
    write_hashes(tmp_path, {}, "a")
    read = []
    from jsurgery.wan import folder_hashes

    monkeypatch.setattr(
        folder_hashes, "size_and_sha256", lambda file, sha256=hashes.size_and_sha256: read.append(file) or sha256(file)
    )
    check_hashes(tmp_path)
    check_hashes(tmp_path)
    assert len(read) == 1
    (tmp_path / "a").write_bytes(b"two")
    with pytest.raises(InputError, match="a: damaged"):
        check_hashes(tmp_path)


def test_an_intact_large_file_is_remembered_by_later_processes(tmp_path, monkeypatch):
    """A new process begins with an empty `_verified`."""
    from jsurgery.wan import folder_hashes

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_hashes, "LARGE", 1)
    model = tmp_path / "model"
    model.mkdir()
    (model / "a").write_bytes(b"one")
    write_hashes(model, {}, "a")
    check_hashes(model)
    monkeypatch.setattr(folder_hashes, "_verified", set())
    with monkeypatch.context() as patch:
        patch.setattr(folder_hashes, "size_and_sha256", lambda file: pytest.fail("read again"))
        check_hashes(model)
        patch.setattr(folder_hashes, "LARGE", 4)
        with pytest.raises(pytest.fail.Exception):
            check_hashes(model)
    (model / "a").write_bytes(b"two")
    with pytest.raises(InputError, match="a: damaged"):
        check_hashes(model)
    (tmp_path / "cache").chmod(0o500)
    (model / "b").write_bytes(b"three")
    write_hashes(model, {}, "a", "b")
    check_hashes(model)


def test_a_download_is_checked_against_the_hashes_in_its_blob_names(tmp_path):
    """In the cache of huggingface_hub, files are links to blobs named by their sha256, or by git's hash if small."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    contents = {"model.safetensors": b"weights", "config.json": b"{}"}
    names = {
        "model.safetensors": hashlib.sha256(b"weights").hexdigest(),
        "config.json": hashlib.sha1(b"blob 2\0{}").hexdigest(),
    }
    for name, content in contents.items():
        (blobs / names[name]).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{names[name]}")
    check_hashes(snapshot)
    for name, content in contents.items():
        (blobs / names[name]).write_bytes(content[:-1] + b"?")
        with pytest.raises(InputError, match=f"{name}: damaged"):
            check_hashes(snapshot)
        (blobs / names[name]).write_bytes(content)
    check_hashes(snapshot)


def test_hashes_of_the_bundled_model_are_complete_and_correct():
    for folder in BUNDLED.values():
        listed = {path for path in folder.rglob("*") if path.is_file() and path.name != HASHES}
        recorded = {
            file.parent / name for file in folder.rglob(HASHES) for name in json.loads(file.read_text())["files"]
        }
        assert recorded == listed
        check_pipeline(str(folder))


def test_hashes_do_not_change_the_fingerprint_of_a_model(model):
    """So that a run can resume after hashes have been added to its teacher."""
    before = folder_fingerprint(epath.Path(model))
    (model / "transformer" / HASHES).unlink()
    assert folder_fingerprint(epath.Path(model)) == before


def test_diffusers_and_transformers_read_a_hashed_folder(model):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    found = diffusers.WanTransformer3DModel.from_pretrained(model / "transformer")
    assert found.config.num_layers == TINY_TRANSFORMER.num_layers
    diffusers.AutoencoderKLWan.from_pretrained(model / "vae")
    transformers.UMT5EncoderModel.from_pretrained(model / "text_encoder")
