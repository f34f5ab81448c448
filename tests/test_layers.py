"""The layers of the package: modules import only from lower layers; there are no cycles of files or folders.

Imports inside functions, for type checkers, and by importlib with a literal name count, too.
"""

import ast
import graphlib
import pathlib
from collections.abc import Iterator

import pytest

from tests import changed

# From the bottom. The entries of one row do not import each other; the modules of one folder may.
LAYERS = (
    ("jsurgery.errors", "jsurgery.version", "pallas_kernels"),
    ("jsurgery.rates", "jsurgery.diffusion", "jsurgery.io"),
    ("jsurgery.attention",),
    ("jsurgery.config",),
    ("jsurgery.load_config", "jsurgery.configs"),
    ("jsurgery.runtime",),
    ("jsurgery.wan",),
    ("jsurgery.data",),
    ("jsurgery.sample", "jsurgery.surgery", "jsurgery.train"),
    ("jsurgery.stream",),
    ("jsurgery", "jsurgery.estimate"),  # the package's public names
    ("jsurgery.evaluate",),
    ("jsurgery.report", "jsurgery.export"),
    ("jsurgery.run",),
    ("jsurgery.bench", "jsurgery.ablate"),
    ("jsurgery.commands",),
    ("jsurgery.cli",),
    ("jsurgery.__main__",),
)


def find_modules() -> dict[str, pathlib.Path]:
    """{name: file} of every module of the package, without tests."""
    return {name: path for name, path in changed.modules().items() if not name.startswith("tests.")}


def imported(name: str, source: str, modules: dict[str, pathlib.Path]) -> Iterator[str]:
    """Those of `modules` that the source of a module imports anywhere."""
    package = name if modules[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            ancestors = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*ancestors, *([node.module] if node.module else [])])
            names = [full if (full := f"{base}.{alias.name}") in modules else base for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        yield from (each for each in names if each in modules and each != name)


def entry(name: str) -> tuple[int, str]:
    """The number of a module's layer, and its entry there. The entry "jsurgery" stands only for its __init__.py."""
    for number, row in enumerate(LAYERS):
        for of in row:
            if name == of or (of != "jsurgery" and name.startswith(of + ".")):
                return number, of
    raise AssertionError(f"{name} belongs to no layer; add it to LAYERS in {__file__}")


def wrong_imports(edges: set[tuple[str, str]]) -> list[str]:
    """The imports that do not lead to a lower layer, as "importer -> imported"."""
    wrong = []
    for importer, of in sorted(edges):
        (own, own_entry), (other, other_entry) = entry(importer), entry(of)
        if other > own or (other == own and other_entry != own_entry):
            wrong.append(f"{importer} -> {of}")
    return wrong


def check_no_cycle(edges: set[tuple[str, str]]) -> None:
    graph: dict[str, set[str]] = {}
    for importer, of in edges:
        graph.setdefault(importer, set()).add(of)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.fixture(scope="module")
def edges() -> set[tuple[str, str]]:
    modules = find_modules()
    found = {(name, of) for name, path in modules.items() for of in imported(name, path.read_text(), modules)}
    # The worker of an export imports a format by a name that is not a literal.
    formats = {"tflite", "savedmodel", "onnx", "qnn", "ai_hub", "jax_reference", "end_to_end", "video_score"}
    found |= {("jsurgery.export.worker", f"jsurgery.export.{name}") for name in formats}
    assert len(modules) > 180 and len(found) > 800
    return found


def test_modules_import_only_from_lower_layers(edges):
    assert wrong_imports(edges) == []


def test_files_have_no_cyclic_imports(edges):
    check_no_cycle(edges)


def test_folders_have_no_cyclic_imports(edges):
    """A folder inside another counts as part of it."""
    modules = find_modules()

    def folder(name: str) -> str:
        package = name if modules[name].name == "__init__.py" else name.rpartition(".")[0]
        return ".".join(package.split(".")[:2])

    inside = {(a, b) for a, b in ((folder(a), folder(b)) for a, b in edges) if a != b and "jsurgery" not in (a, b)}
    check_no_cycle(inside)


@pytest.mark.parametrize(
    "line",
    [
        "from jsurgery.run import Run",
        "def late():\n    import jsurgery.report.page",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jsurgery.report import page",
        "import importlib\nimportlib.import_module('jsurgery.run')",
    ],
)
def test_control_one_wrong_import_is_found(edges, line):
    modules = find_modules()
    added = {("jsurgery.wan.linear", of) for of in imported("jsurgery.wan.linear", line, modules)}
    assert len(wrong_imports(edges | added)) == 1
    with pytest.raises(graphlib.CycleError):
        check_no_cycle(edges | added)


def test_relative_imports_are_found():
    modules = find_modules()
    found = imported("jsurgery.export.qnn", "from .parts import ExportJob\nfrom . import onnx", modules)
    assert list(found) == ["jsurgery.export.parts", "jsurgery.export.onnx"]


def test_files_and_functions_stay_short():
    """Except `config.base`, which only declares data, and kernels for TPUs."""
    for name, path in find_modules().items():
        if name.startswith("pallas_kernels.tpu_"):
            continue
        source = path.read_text()
        limit = 150 if name == "jsurgery.cli" else 400
        assert len(source.splitlines()) <= limit, f"{path}: longer than {limit} lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (name, node.name) != ("jsurgery.config", "base"):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 80, f"{path}: {node.name} has {lines} lines"
