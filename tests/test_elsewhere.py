"""What other machines read: workflows and issue templates of GitHub, Dockerfiles, CITATION.cff; they fit the code."""

import importlib.metadata
import json
import pathlib
import re
import tomllib

import pytest
import yaml

from jsurgery import cli
from jsurgery.version import __version__

ROOT = pathlib.Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def read(path: pathlib.Path):
    return yaml.safe_load(path.read_text())


def commands(workflow: dict) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_workflows_call_make_targets_that_exist():
    called = [words.split() for path in WORKFLOWS for words in commands(read(path))]
    assert {target for _, target in called} == {"lint", "test", "docs", "wheel"} <= TARGETS
    assert {program for program, _ in called} == {"make"}


def test_workflows_test_the_pythons_that_the_package_supports():
    jobs = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = [text.rpartition(" ")[2] for text in project["classifiers"] if " 3." in text]
    assert jobs["test"]["strategy"]["matrix"]["python"] == [text for text in supported if "." in text]
    for job in jobs.values():
        versions = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
        assert set(versions) <= {*supported, "${{ matrix.python }}"} and len(versions) == 1


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_issue_templates_ask_for_the_json_of_verify(path):
    template = read(path)
    if path.stem == "config":
        assert set(template) == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= template.keys()
    (asked,) = (field for field in template["body"] if "jsurgery verify" in field["attributes"]["label"])
    assert asked["validations"] == {"required": True} and asked["attributes"]["render"] == "json"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_copies_what_the_package_is_built_from(path):
    text = path.read_text()
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()}
    assert all((ROOT / name).exists() for name in copied)
    built = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt"}
    assert copied == built | {"configs", "export", "jsurgery", "pallas_kernels"}
    extra = re.search(r"^ARG EXTRA=(\w+)|/source\[(\w+)\]", text, re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extra and (extra[1] or extra[2]) in extras
    version = re.search(r"^FROM python:(3\.\d+)", text, re.MULTILINE)
    assert version and f"Programming Language :: Python :: {version[1]}" in (ROOT / "pyproject.toml").read_text()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not copied & set(ignored)


def test_the_citation_has_the_version_and_the_paper():
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == __version__ == importlib.metadata.version("jsurgery")
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["title"].startswith("jsurgery")
    assert citation["references"][0]["url"].endswith("2509.24899")


def test_the_lines_to_expect_on_pods_are_those_of_dry_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "pods.md").read_text()
    line = re.compile(r"^(trace|distill): (\w+) (\d+) of \3 devices, ([\d.]+) of (\d+) GiB each$", re.MULTILINE)
    quoted = {
        (stage, axis, int(count), float(told), int(room)) for stage, axis, count, told, room in line.findall(page)
    }
    expected = set()
    for machine in ("v5e:4x4", "8xh100"):
        assert f"--config=wan_1_3b@{machine} --coordinator=auto" in page
        flags = ["--workdir=run", "--dry_run", "--disk=1e9", "--json=dry.json"]
        assert cli.main(["surgery", f"--config=wan_1_3b@{machine}", *flags]) == 0
        found = json.loads((tmp_path / "dry.json").read_text())
        for stage in ("trace", "distill"):
            row = max((row for row in found["phases"] if row["stage"] == stage), key=lambda row: row["bytes"])
            ((axis, count),) = ((axis, size) for axis, size in row["mesh"].items() if size > 1)
            expected.add((stage, axis, count, round(row["bytes"] / 2**30, 1), 16 if machine == "v5e:4x4" else 80))
        if machine == "v5e:4x4":
            assert f"{sum(row['hours'] for row in found['hours']):.1f} hours" in page
    assert quoted == expected
