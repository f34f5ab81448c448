"""Nothing in the packages executes what it reads."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = sorted(
    path for name in ("jsurgery", "pallas_kernels", "export", "configs") for path in (ROOT / name).rglob("*.py")
)
EXECUTING = {"eval", "exec", "compile", "__import__"}
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def faults(source: str) -> list[str]:
    """Unpickling, executing and shells, by name of what is called."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        said = lambda flag, given=given: isinstance(given.get(flag), ast.Constant) and given[flag].value
        if name.split(".")[0] in UNPICKLING or name in EXECUTING or name in ("os.system", "os.popen", "yaml.load"):
            found.append(name)
        if name.endswith("torch.load") and said("weights_only") is not True:
            found.append(f"{name} without weights_only=True")
        if said("allow_pickle"):
            found.append(f"{name} with pickles")
        if said("shell"):
            found.append(f"{name} through a shell")
        if name.endswith("extractall"):
            found.append(f"{name}: an archive may write elsewhere")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_is_read_and_nothing_executed(path):
    assert faults(path.read_text()) == []


def test_control_the_search_finds_each_of_them():
    for line in (
        "pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
        "eval(x)", "os.system(x)", "subprocess.run(x, shell=True)", "archive.extractall()", "dill.loads(x)",
    ):  # fmt: skip
        assert faults(line), line
    for line in ("torch.load(f, weights_only=True)", "np.load(f)", "model.eval()", "re.compile(x)"):
        assert not faults(line), line
