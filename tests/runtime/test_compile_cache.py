"""The cache of compiled programs: shared by processes, safe against damaged files, bounded in size."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jsurgery.cli import main
from jsurgery.runtime import compile_cache
from jsurgery.runtime.compile_cache import default_folder, prune, use_compile_cache

# Samples; with the argument "again" a second time, after damaging two cached files and clearing JAX's own caches.
SAMPLE = """
import json, sys, warnings
import jax
from jsurgery.cli import main
from jsurgery.runtime.compile_cache import default_folder

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/", 1)[-1]))
again, *arguments = sys.argv[1:]

def sample(output):
    events.clear()
    with warnings.catch_warnings(record=True) as caught:
        code = main([*arguments, f"--output={output}"])
    warned = sum("persistent compilation cache" in str(warning.message) for warning in caught)
    asked, found = (events.count(f"{name}") for name in ("compile_requests_use_cache", "cache_hits"))
    print(json.dumps({"code": code, "compiled": asked - found, "found": found, "warned": warned}), flush=True)

sample("first.png")
if not again:
    sys.exit()
cut, changed = sorted(default_folder().glob("*-cache"), key=lambda file: file.stat().st_size)[-2:]
whole = cut.read_bytes(), changed.read_bytes()
cut.write_bytes(whole[0][:1000])
changed.write_bytes(whole[1][:500] + b"broken" + whole[1][506:])
jax.clear_caches()
sample("second.png")
"""


@pytest.fixture(scope="module")
def start(tiny_pipeline, tmp_path_factory):
    """Starts a process that runs SAMPLE in a new folder. All processes have the same, new home folder."""
    home = tmp_path_factory.mktemp("home")
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    environment.pop("XDG_CACHE_HOME", None)
    flags = [f"--model={tiny_pipeline}", "--prompt=a red circle", "--frames=1", "--height=32", "--width=32"]
    flags += ["--steps=2", "--config=tiny", "--config.text_length=4"]

    def started(again=""):
        folder = tmp_path_factory.mktemp("sampled")
        command = [sys.executable, "-c", SAMPLE, again, "sample", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return folder, subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    return started


def results(folder: pathlib.Path, process: subprocess.Popen) -> tuple[list[dict], set[bytes]]:
    """The counts of each run of the command in a process, and the set of the images that they made."""
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-2000:]
    counts = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return counts, {file.read_bytes() for file in folder.glob("*.png")}


def test_processes_share_the_cache(start):
    """Two processes fill the cache. A third finds all programs, and recompiles two whose files are damaged."""
    filling = [results(*started) for started in (start(), start())]
    (whole, damaged), images = results(*start("again"))
    assert all(count["code"] == 0 for count in (*filling[0][0], *filling[1][0], whole, damaged))
    assert (whole["compiled"], whole["warned"]) == (0, 0) and whole["found"] > 5
    assert sum(counts[0]["compiled"] for counts, _ in filling) >= whole["found"]
    assert (damaged["compiled"], damaged["warned"]) == (2, 2) and damaged["found"] == whole["found"] - 2
    assert len(images) == 1 and all(others == images for _, others in filling)


@pytest.fixture
def settings():
    """JAX's settings, restored afterwards. The cache is reset, as JAX keeps the folder of its first compilation."""
    compilation_cache.reset_cache()
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "persistent_cache_min_entry_size_bytes")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    compilation_cache.reset_cache()
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_config_may_turn_the_cache_off(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compile_cache, "default_folder", lambda: tmp_path)
    flags = [f"--workdir={tmp_path / 'run'}", "--config.model.path=/nowhere"]
    assert main(["plan", *flags, "--config.compile_cache=False"]) == 2
    assert settings.jax_compilation_cache_dir is None
    assert main(["plan", *flags]) == 2
    assert settings.jax_compilation_cache_dir == str(tmp_path)


def test_a_folder_set_in_jax_is_kept(settings, tmp_path):
    settings.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
    use_compile_cache()
    assert settings.jax_compilation_cache_dir == str(tmp_path / "chosen")


def test_a_folder_that_cannot_be_written_causes_only_a_warning(settings, tmp_path):
    (tmp_path / "file").write_text("")
    use_compile_cache(tmp_path / "file" / "below")
    with pytest.warns(UserWarning, match="persistent compilation cache"):
        assert jax.jit(lambda x: 3 * x + 1)(2.0) == 7


def test_pruning_removes_the_least_recently_used_files(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}-cache").write_bytes(bytes(100))
        os.utime(tmp_path / f"{number}-cache", (1000 + number, 1000))
    prune(tmp_path, 1000)
    assert len(list(tmp_path.iterdir())) == 10
    prune(tmp_path, 999)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{number}-cache" for number in range(6, 10)]
    prune(tmp_path / "missing", 1)


def test_folders_differ_by_processor_features_but_not_by_clock_rate(tmp_path, monkeypatch):
    folders = set()
    for features in ("avx2", "avx2 avx512f"):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : A\nflags : {features}\ncpu MHz : 1\n")
        monkeypatch.setattr(compile_cache, "CPU_INFO", tmp_path / "cpuinfo")
        folders.add(default_folder())
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : A\nflags : avx2\ncpu MHz : 2\n")
    assert len(folders) == 2 and default_folder() in folders
