"""The page that compares several runs."""

import json
import shutil

import pytest

from jsurgery.cli import main
from jsurgery.errors import InputError
from jsurgery.report.compare import names, write_comparison
from tests.report.made_up_run import HOSTILE, PLAN, Page, tiny_config, write, write_run


@pytest.fixture(scope="module")
def original_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(folder / "teacher")
    write_run(folder / "one", config, prompts=3, videos=1)
    config.finetune.steps, config.plan.budget = 77, "4R8"
    write_run(folder / "<b>two", config, prompts=3, videos=1, plan=[1, 8, 8, 8, 8, 1], seed=1)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def runs(original_runs, tmp_path):
    return shutil.copytree(original_runs, tmp_path / "runs")


def page_of(runs, *names):
    page = runs / "pages" / "compare.html"
    write_comparison([runs / name for name in names], page)
    return Page(page.read_text())


def test_the_page_shows_the_results_of_two_runs(runs):
    page = page_of(runs, "one", "<b>two")
    assert page.sections == {"runs", "clips", "plans", "scores", "training", "config"}
    assert page.external() == [] and "What this page lacks" not in page.text
    assert "<b>two" in page.text and HOSTILE in page.text and page.tags.count("b") == 2 * len(PLAN)
    for name in ("one", "<b>two"):
        evaluation = json.loads((runs / name / "evaluation" / "evaluation.json").read_text())
        total = evaluation["models"]["finetuned"]["score"]["total"]
        assert (
            page.text.count(f"{total['normalized']:.3f}") >= 2
        )  # in the table of all scores and in that of dimensions
        plan = json.loads((runs / name / "plan" / "plan.json").read_text())
        assert f"{100 * (1 - plan['share_of_teacher']):.1f}%" in page.text
    text = page.text.replace("\n", "")
    assert "finetune.steps100077" in text and "plan.budget" in text and "finetune.batch" not in text
    assert [row["models"] for row in page.rows] == [["teacher", "run-0", "run-1"]]
    assert page.videos[0].shape[2] == 3 * page.rows[0]["offset"]


def test_the_page_names_missing_files(runs):
    shutil.rmtree(runs / "<b>two" / "evaluation")
    (runs / "<b>two" / "plan" / "plan.json").unlink()
    page = page_of(runs, "one", "<b>two", "empty")
    assert page.sections == {"runs", "clips", "plans", "scores", "training", "config"}
    for text in ("The plan and what it saves: plan/plan.json is not there", "config.json is not there", "No plan yet."):
        assert text in page.text


def test_clips_of_different_prompts_are_not_compared(runs):
    path = runs / "one" / "evaluation" / "evaluation.json"
    found = json.loads(path.read_text())
    write(path, found | {"prompts": ["a", "b", "c"]})
    assert "clips" not in page_of(runs, "one", "<b>two").sections


def test_the_command_writes_the_page_or_refuses_bad_arguments(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--compare", str(runs / "one"), str(runs / "empty")]) == 0
    assert capsys.readouterr().out.strip() == "compare.html" and (tmp_path / "compare.html").exists()
    one = str(runs / "one")
    for arguments in ([one], [one, one], [one, str(runs / "no")], [one, str(runs / "empty"), "--config=tiny"]):
        assert main(["report", "--compare", *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_runs_are_named_by_the_ends_of_their_paths(tmp_path):
    assert names(["/a/x/run", "/a/y/run", "/b/z"]) == ["x/run", "y/run", "b/z"]
    assert names(["/a/x", "/a/y"]) == ["x", "y"]
    with pytest.raises(InputError, match="that differ"):
        names([tmp_path, tmp_path])
