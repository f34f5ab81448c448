"""Folders of stages: skipped when complete, resumed when incomplete, refused if the config differs."""

import datetime
import json
import sys

import pytest
from etils import epath
from ml_collections import ConfigDict

from jsurgery.errors import InputError
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.runtime.stage_folder import StageFolder


def config(**changes):
    return ConfigDict({"seed": 0, "trace": {"prompts": 4}, "plan": {"budget": "1R2"}} | changes)


def test_a_complete_stage_is_skipped(tmp_path, capsys):
    runs = []
    for _ in range(2):
        StageFolder(tmp_path, "trace", config(), ["seed", "trace"]).run(lambda: runs.append(1))
    assert len(runs) == 1
    assert "skipped" in capsys.readouterr().err


def test_a_stage_that_failed_runs_again(tmp_path):
    stage = StageFolder(tmp_path, "trace", config(), ["seed"])
    with pytest.raises(ZeroDivisionError):
        stage.run(lambda: 1 / 0)
    runs = []
    StageFolder(tmp_path, "trace", config(), ["seed"]).run(lambda: runs.append(1))
    assert runs


def test_another_config_is_refused_with_the_difference(tmp_path):
    StageFolder(tmp_path, "trace", config(), ["seed", "trace"]).run(lambda: None)
    other = StageFolder(tmp_path, "trace", config(trace={"prompts": 5}), ["seed", "trace"])
    with pytest.raises(InputError, match=r"trace.prompts was 4, is 5"):
        other.done()


def test_fields_of_other_stages_do_not_matter(tmp_path):
    StageFolder(tmp_path, "trace", config(), ["seed", "trace"]).run(lambda: None)
    assert StageFolder(tmp_path, "trace", config(plan={"budget": "2R2"}), ["seed", "trace"]).done()


def test_a_change_of_an_earlier_stage_is_refused_in_later_stages(tmp_path):
    first = StageFolder(tmp_path, "trace", config(), ["trace"])
    StageFolder(tmp_path, "distill", config(), ["seed"], after=[first]).run(lambda: None)
    changed = StageFolder(tmp_path, "trace", config(trace={"prompts": 9}), ["trace"])
    with pytest.raises(InputError, match="stage trace"):
        StageFolder(tmp_path, "distill", config(), ["seed"], after=[changed]).done()


def test_fingerprint_changes_with_both_ends_of_a_large_file(tmp_path):
    (tmp_path / "transformer").mkdir()
    file = tmp_path / "transformer" / "weights.safetensors"
    content = bytearray(3 << 20)
    fingerprints = set()
    for position in (None, 0, len(content) - 1):
        if position is not None:
            content[position] += 1
        file.write_bytes(content)
        fingerprints.add(folder_fingerprint(epath.Path(tmp_path)))
    assert len(fingerprints) == 3


def test_the_marker_of_an_ended_stage_tells_how_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/jsurgery", "trace", "--workdir=my run"])
    stage = StageFolder(tmp_path, "trace", config(), ["seed"])
    stage.begin()
    assert "made_by" not in json.loads((tmp_path / "trace" / "stage.json").read_text())
    began = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    stage.run(lambda: None)
    made_by = json.loads((tmp_path / "trace" / "stage.json").read_text())["made_by"]
    assert made_by["command"] == "jsurgery trace '--workdir=my run'" and made_by["resumed"]
    assert began <= datetime.datetime.fromisoformat(made_by["ended"]) <= datetime.datetime.now(datetime.UTC)
    assert 0 <= made_by["seconds"] < 60 and made_by["machine"]
    StageFolder(tmp_path, "plan", config(), ["seed"]).run(lambda: None)
    assert not json.loads((tmp_path / "plan" / "stage.json").read_text())["made_by"]["resumed"]
