"""Names of repositories are downloaded from the Hub; paths are not."""

import json
import pathlib
import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from jsurgery import cli
from jsurgery.errors import InputError
from jsurgery.wan.hub import CONFIGS, FILES, WITHOUT_WEIGHTS, local_path
from jsurgery.wan.model_folder import check_pipeline, model_path


@pytest.fixture
def requested(monkeypatch) -> list:
    """The downloads that were requested; none takes place."""
    calls = []

    def snapshot_download(repository, **options):
        calls.append((repository, options))
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", None),
        ("Wan-AI/Wan2.1-T2V-14B@0fad780", "Wan-AI/Wan2.1-T2V-14B", "0fad780"),
        ("a/b@refs/pr/2", "a/b", "refs/pr/2"),
    ],
)
def test_a_repository_is_downloaded(tmp_path, monkeypatch, requested, name, repository, revision):
    monkeypatch.chdir(tmp_path)
    assert local_path(name) == "/cache/snapshot"
    assert requested == [(repository, {"revision": revision, "allow_patterns": FILES})]
    assert not any(pattern.endswith((".pth", ".bin", "*")) for pattern in FILES)


def test_a_repository_of_another_task_is_refused_before_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshot, patterns = tmp_path / "snapshot", []
    snapshot.mkdir()
    experts = {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (snapshot / "model_index.json").write_text(json.dumps(experts))
    download = lambda _, allow_patterns, **__: patterns.append(allow_patterns) or str(snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"model_index.json: transformer_2: .*Wan2.2 A14B"):
        model_path("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    assert patterns == [CONFIGS]
    (snapshot / "model_index.json").write_text(json.dumps(experts | {"transformer_2": [None, None]}))
    assert str(model_path("Wan-AI/Wan2.1-T2V-14B-Diffusers")) == str(snapshot)
    assert patterns == [CONFIGS, CONFIGS, FILES]


def test_a_dry_run_downloads_no_weights(tmp_path, monkeypatch, capsys, tiny_pipeline):
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "snapshot"
    kept = shutil.ignore_patterns("*.safetensors", "hashes.json")
    shutil.copytree(tiny_pipeline, snapshot, ignore=kept)
    patterns = []
    download = lambda _, allow_patterns, **__: patterns.append(allow_patterns) or str(snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    flags = ["--config.model.path=org/name", "--dry_run", "--disk=100", "--config.plan.budget=1R8"]
    surgery = ["surgery", "--config=tiny", "--workdir=run", *flags]
    assert cli.main(surgery) == 0 and "fine-tuning" in capsys.readouterr().out
    assert cli.main(["sample", "--model=org/name", "--prompt=x", "--dry_run"]) == 0
    assert patterns and all(each in (CONFIGS, WITHOUT_WEIGHTS) for each in patterns)
    assert not any("safetensors" in pattern for each in patterns for pattern in each)
    assert cli.main([*surgery, "--config.prompts=/no/prompts.txt"]) == 2
    assert "/no/prompts.txt: no such file" in capsys.readouterr().err
    # A folder of the user's own that has no weights is refused, in a dry run as well.
    shutil.copytree(snapshot, tmp_path / "own")
    assert cli.main([flag.replace("org/name", str(tmp_path / "own")) for flag in surgery]) == 2
    assert "own" in capsys.readouterr().err
    with pytest.raises(InputError, match="safetensors"):  # outside of a dry run they are asked for, and missed
        check_pipeline("org/name")
    assert patterns[-1] == FILES


def test_a_path_is_not_downloaded(tmp_path, monkeypatch, requested):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("org/name").mkdir(parents=True)
    for path in (
        "org/name",
        "tiny_wan",
        "/absent/model",
        "./org/other",
        "../org/other",
        "a/b/c",
        "gs://b/m",
        "",
        "~/m",
    ):
        assert local_path(path) == path
    assert requested == []


def test_a_missing_repository_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def snapshot_download(*_, **__):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404 Client Error.\n\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match="org/name: no such folder, and not to be had from the Hub"):
        local_path("org/name")

    def broken(*_, **__):
        raise TypeError("a fault of ours")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(TypeError):
        local_path("org/name")


def test_an_unreachable_hub_is_refused(tmp_path, monkeypatch, capsys):
    """The Hub's own client with a closed port: an error of one line, exit code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert cli.main(["convert", "--model=org/name@main", "--output=out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jsurgery: org/name@main: no such folder, and ") and "Hub" in line
    assert not (tmp_path / "out").exists()
