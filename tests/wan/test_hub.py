"""Repository ids: what is asked of the Hub, and that nothing is asked where a path is meant."""

import pathlib

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from jsurgery import cli
from jsurgery.errors import InputError
from jsurgery.wan.hub import FILES, local_path


@pytest.fixture
def asked(monkeypatch) -> list:
    """The downloads that were asked for; none takes place."""
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
def test_a_repository(tmp_path, monkeypatch, asked, name, repository, revision):
    monkeypatch.chdir(tmp_path)
    assert local_path(name) == "/cache/snapshot"
    assert asked == [(repository, {"revision": revision, "allow_patterns": FILES})]
    assert not any(pattern.endswith((".pth", ".bin", "*")) for pattern in FILES)


def test_a_path_is_not_asked_for(tmp_path, monkeypatch, asked):
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
    assert asked == []


def test_a_repository_that_is_not_there(tmp_path, monkeypatch):
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


def test_offline(tmp_path, monkeypatch, capsys):
    """The Hub's own client, against a port where nobody listens: one line, exit code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert cli.main(["convert", "--model=org/name@main", "--output=out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jsurgery: org/name@main: no such folder, and ") and "Hub" in line
    assert not (tmp_path / "out").exists()
