"""`make test-changed`: runs the tests that uncommitted changes can affect, nearest to a change first, for a minute.

The distance of a test file from a changed file is the number of imports between them, including lazy imports and those
in scripts for other processes. Run as a plugin of pytest: `pytest -p tests.changed --minutes=1`.
"""

import importlib.util
import pathlib
import re
import subprocess
import time
from collections.abc import Iterable

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = {"jsurgery": "jsurgery", "pallas_kernels": "pallas_kernels", "jsurgery.export": "export", "tests": "tests"}
FOLDERS["jsurgery.configs"] = "configs"
IMPORT = re.compile(r"^\s*(?:from ([\w.]+) import (\([^)]*\)|[^\n]*)|import ([\w.]+))", re.MULTILINE)
NAMED = re.compile(r"[\"'](jsurgery(?:\.\w+)+)[\"']")  # modules given to importlib


def changed_files() -> list[pathlib.Path]:
    """The files of the working tree that differ from the last commit, and the untracked ones."""
    commands = ("git diff --name-only HEAD", "git ls-files --others --exclude-standard")
    run = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    texts = (subprocess.run(command.split(), **run).stdout for command in commands)
    return [ROOT / line for text in texts for line in text.splitlines()]


def modules() -> dict[str, pathlib.Path]:
    """{name: file} of every module."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


def imported(text: str, package: str, known: Iterable[str]) -> set[str]:
    """Those of the known modules that a file of a package imports, given its text."""
    names = set(NAMED.findall(text))
    for origin, parts, plain in IMPORT.findall(text):
        if origin.startswith("."):
            origin = importlib.util.resolve_name(origin, package).removesuffix(".")
        names |= {plain, origin} | {f"{origin}.{part}" for part in re.findall(r"\w+", parts)}
    return names & set(known)


def distances(changed: Iterable[pathlib.Path]) -> dict[pathlib.Path, int]:
    """{file: distance from the nearest changed file} of each Python file that a change can affect."""
    known = modules()
    texts = {file: file.read_text() for file in known.values()}
    users: dict[pathlib.Path, set[pathlib.Path]] = {}
    for module, file in known.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for name in imported(texts[file], package, known):
            users.setdefault(known[name], set()).add(file)
        if file.name == "conftest.py":
            users.setdefault(file, set()).update(file.parent.rglob("test_*.py"))
    near = {file: 0 for file in changed if file in texts}
    for other in (file for file in changed if file not in texts):  # a template or a document: its users name it
        near |= {file: 1 for file, text in texts.items() if other.name in text}
    reached = sorted(near, key=near.__getitem__)
    for file in reached:  # which grows during the loop
        new = sorted(users.get(file, set()) - near.keys())
        near |= dict.fromkeys(new, near[file] + 1)
        reached += new
    return near


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=1.0, help="no test starts later than this")


class Nearest:
    """Chooses and orders the tests of one pytest run, and reports the files for which there was no time."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        near = distances(changed_files())
        far = [item for item in items if item.path not in near]
        config.hook.pytest_deselected(items=far)
        items[:] = sorted((item for item in items if item.path in near), key=lambda item: near[item.path])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.end:
            pytest.skip("no time left: `make test` runs it")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        skipped = terminalreporter.stats.get("skipped", [])
        late = {report.nodeid.split("::")[0] for report in skipped if "no time left" in str(report.longrepr)}
        if late:
            terminalreporter.write_line(f"no time left for tests of {len(late)} files: " + " ".join(sorted(late)))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Nearest(config.getoption("--minutes")))
