"""The wheel, installed in a new environment: its files, its command and its configs."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import pytest

import jsurgery

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("jsurgery", "pallas_kernels", "configs", "export", "pyproject.toml", "setup.py", "LICENSE", "README.md")
MOVED = ("configs", "export")  # folders that the wheel has inside jsurgery


def run(*command: object, cwd: pathlib.Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """A wheel built from a copy of the sources, so that neither the checkout nor the wheel gets stray files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir=dist", cwd=folder)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> pathlib.Path:
    """The Python of a new environment with the wheel. Dependencies come from the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # This path comes after site-packages, and .pth files of an editable install there have no effect.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_contains_two_packages_and_all_their_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "jsurgery",
        "pallas_kernels",
        f"jsurgery-{jsurgery.__version__}.dist-info",
    }
    files = {
        path.relative_to(ROOT).as_posix()
        for package in ("jsurgery", "pallas_kernels")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    moved = {f"jsurgery/{path.relative_to(ROOT).as_posix()}" for name in MOVED for path in (ROOT / name).glob("*.py")}
    assert len(files) > 30 and len(moved) > 3
    assert files | moved == {name for name in names if ".dist-info/" not in name}


def test_extras_name_extras_of_jax_and_the_readme_names_ours():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    accelerators = {name: extras[name][0] for name in ("tpu", "cuda", "cuda12")}
    assert accelerators == {"tpu": "jax[tpu]", "cuda": "jax[cuda13]", "cuda12": "jax[cuda12]"}
    offered = importlib.metadata.metadata("jax").get_all("Provides-Extra")
    assert {"tpu", "cuda13", "cuda12"} <= set(offered)
    assert all("etils[epath-gcs]" in extras[name] for name in accelerators)  # workdirs on gs://
    named = set(re.findall(r"jsurgery\[(\w+)\]", (ROOT / "README.md").read_text()))
    assert named >= set(accelerators) and named <= set(extras)


def test_the_command_works_from_anywhere(python, tmp_path):
    assert "surgery" in run(python.with_name("jsurgery"), "--help", cwd=tmp_path)
    assert "surgery" in run(python, "-m", "jsurgery", "--help", cwd=tmp_path)
    failing = subprocess.run([python.with_name("jsurgery"), "surgery"], cwd=tmp_path, capture_output=True)
    assert failing.returncode == 2


def test_shipped_configs_are_found_by_name(python, tmp_path):
    code = """if True:
        import json, sys
        from jsurgery.load_config import config_path, load_config
        print(json.dumps({name: [str(config_path(name)), load_config(name).seed] for name in sys.argv[1:]}))
    """
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    found = json.loads(run(python, "-c", code, *names, cwd=tmp_path))
    installed = str(python.parents[1])
    assert list(found) == names
    assert all(
        path.startswith(installed) and path.endswith(f"jsurgery/configs/{name}.py") for name, (path, _) in found.items()
    )


def test_export_is_part_of_the_package(python, tmp_path):
    """Under the same name in a wheel and in a checkout. It does not import diffusers."""
    code = """if True:
        import sys
        from jsurgery.export import torch_model
        loaded = {"diffusers", "tensorflow"} & set(sys.modules)
        assert not loaded, loaded
        print(torch_model.__name__, torch_model.__file__)
    """
    (site_packages,) = python.parents[1].glob("lib/python*/site-packages")
    for interpreter, cwd, file in [
        (python, tmp_path, site_packages / "jsurgery" / "export" / "torch_model.py"),
        (sys.executable, ROOT, ROOT / "export" / "torch_model.py"),
    ]:
        assert run(interpreter, "-c", code, cwd=cwd).split() == ["jsurgery.export.torch_model", str(file)]


def test_no_other_top_level_packages_are_installed(python, tmp_path):
    code = """if True:
        import sysconfig
        from importlib.machinery import PathFinder

        own = [sysconfig.get_path("purelib")]  # a dependency may bring a package of that name
        print([name for name in ("configs", "export", "tests", "setup") if PathFinder.find_spec(name, own)])
    """
    assert run(python, "-c", code, cwd=tmp_path).strip() == "[]"


def test_public_names_are_imported_lazily_without_torch(python, tmp_path):
    code = """if True:
        import sys
        import jsurgery
        assert jsurgery.__file__.startswith(sys.prefix), jsurgery.__file__
        loaded = {"jax", "flax", "numpy"} & set(sys.modules)
        assert not loaded, loaded
        sys.modules |= dict.fromkeys(("torch", "tensorflow", "transformers", "diffusers"))  # importing them now fails
        public = [getattr(jsurgery, name) for name in jsurgery.__all__]
        assert all(callable(item) for item in public) and set(jsurgery.__all__) <= set(dir(jsurgery))
        try:
            jsurgery.nonsense
        except AttributeError as error:
            print(error)
    """
    assert "nonsense" in run(python, "-c", code, cwd=tmp_path)
