"""Kills and signals by the hundred, in real processes: finished work is kept, and the same command resumes from it.

    python -m tests.faults.soak [--kills=20] [--parts=random,renames,signals,steady] [--stages=...] [--seed=0]

random   `--kills` SIGKILLs per stage at random moments: every process is killed or succeeds, every file with its final
         name is complete after every kill, and finished runs have the same result as an undisturbed run, bit for bit
renames  SIGKILL just before each rename and each removal of a manifest
signals  SIGTERM and SIGINT in distill and finetune, by one process and by two
steady   300 steps of distill and finetune: neither memory nor the number of compiled programs grows

Exit code 0 only if nothing was lost.
"""

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.conftest import build_tiny_pipeline
from tests.faults.workdirs import FOLDERS, Workdirs, check_complete, result, write_clips

PARTS = ("random", "renames", "signals", "steady")
STAGES = ("trace", "distill", "finetune", "evaluate", "encode", "synthesize", "export")
TRAINING = ("distill", "finetune")
NEEDED = ("torch", "onnx", "onnxscript", "onnxruntime")  # packages for export
CODES = {"SIGTERM": 143, "SIGINT": 130}
# Few steps, and so few renames.
SHORT = {"distill": {"distill.steps": "4"}, "finetune": {"finetune.steps": "4"}, "trace": {"trace.prompts": "3"}}
SHORT |= {"evaluate": {"evaluate.prompts": "3", "evaluate.videos": "1"}}


@dataclasses.dataclass
class Tally:
    """Counts for one stage under random kills."""

    kills: int = 0
    launches: int = 0
    resumed: int = 0  # launches that found work of a killed run
    ended: int = 0  # runs, all with the result of the undisturbed run
    files: int = 0  # checked after kills, all complete


def random_kills(stage: str, kills: int, workdirs: Workdirs, rng: random.Random) -> Tally:
    tally, folder = Tally(), FOLDERS.get(stage, stage)
    reference = workdirs.prepare(stage, f"{stage}_undisturbed")
    began = time.monotonic()
    process = workdirs.start(stage, reference)
    at_work = wait_for(reference / folder / "lock", process)
    end_well(process)
    before, during = at_work - began, time.monotonic() - at_work
    expected = result(reference, stage)
    assert expected

    def compare(workdir: pathlib.Path) -> None:
        assert result(workdir, stage) == expected, "the result differs from that of the undisturbed run"
        tally.ended += 1

    workdir = workdirs.prepare(stage, f"{stage}_killed")
    while True:
        tally.launches += 1
        tally.resumed += (workdir / folder / "stage.json").exists()
        process = workdirs.start(stage, workdir)
        if tally.kills == kills:
            end_well(process)
            compare(workdir)
            return tally
        # One kill in four at any moment from the start, the others while the stage is at work.
        if rng.random() < 0.25:
            delay = rng.uniform(0, before)
        else:
            wait_for(workdir / folder / "lock", process)
            delay = rng.uniform(0, during)
        began = time.monotonic()
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            tally.kills += 1
            tally.files += check_complete(workdir)
            continue
        end_well(process)
        compare(workdir)
        during = time.monotonic() - began
        workdir = workdirs.prepare(stage, f"{stage}_killed")


def every_rename(stage: str, workdirs: Workdirs, stride: int = 1) -> tuple[int, list[str]]:
    """(number of kills, each followed by a run that succeeded; the target of each rename)."""
    short = SHORT.get(stage, {})
    reference = workdirs.prepare(stage, f"{stage}_renames")
    process, reached = workdirs.run_signalled("rename", 0, stage, reference, **short)
    assert process.returncode == 0, process.stderr[-3000:]
    expected, kills = result(reference, stage), 0
    for number in range(1, len(reached) + 1, stride):
        workdir = workdirs.prepare(stage, f"{stage}_rename")
        process, found = workdirs.run_signalled("rename", number, stage, workdir, **short)
        if len(found) < number:  # as when two saves overlap, which varies
            continue
        assert process.returncode == -9, process.stderr[-3000:]
        check_complete(workdir)
        process = workdirs.run(stage, workdir, **short)
        assert process.returncode == 0, f"after a kill at {found[-1]}: {process.stderr[-3000:]}"
        assert result(workdir, stage) == expected, f"after a kill at {found[-1]}"
        kills += 1
    return kills, [line.split()[-1].replace(str(reference), "") for line in reached]


def signals(stage: str, workdirs: Workdirs) -> str:
    """A summary; raises AssertionError if a signal does not stop a run, or if the result differs."""
    reference = workdirs.prepare(stage, f"{stage}_reference")
    assert workdirs.run(stage, reference).returncode == 0
    expected, seen = result(reference, stage), []
    for name, code in CODES.items():
        workdir = workdirs.prepare(stage, f"{stage}_signalled")
        began = time.monotonic()
        process, _ = workdirs.run_signalled(name, 6, stage, workdir)
        assert process.returncode == code, (process.returncode, process.stderr[-3000:])
        last = process.stderr.splitlines()[-1]
        assert last.startswith(f"jsurgery: {stage}: stopped by {name}"), process.stderr
        assert not any(workdir.glob("model/*")) and check_complete(workdir)
        seen.append(f"{name}: {process.returncode}, {time.monotonic() - began:.0f} s with its start")
        resumed = workdirs.run(stage, workdir)
        assert resumed.returncode == 0 and result(workdir, stage) == expected, resumed.stderr[-3000:]
    two = workdirs.prepare(stage, f"{stage}_two")
    assert workdirs.run_two("SIGTERM", 0, stage, two) == [0, 0]
    for name, code in CODES.items():
        workdir = workdirs.prepare(stage, f"{stage}_two_signalled")
        codes = workdirs.run_two(name, 6, stage, workdir)
        assert codes == [code, code], codes
        assert check_complete(workdir)
        assert workdirs.run_two(name, 0, stage, workdir) == [0, 0]
        assert result(workdir, stage) == result(two, stage)
        seen.append(f"{name} to one of two: {codes}")
    return "; ".join(seen)


def steady(stage: str, workdirs: Workdirs, steps: int = 300, settled: int = 50) -> str:
    """A summary of resident memory from step `settled` on and of programs compiled after the first logged step."""
    fields = {f"{stage}.steps": str(steps), "log_every": "1", "checkpoint.every": "25"}
    process, lines = workdirs.run_signalled("SIGTERM", 0, stage, workdirs.prepare(stage, f"{stage}_steady"), **fields)
    assert process.returncode == 0, process.stderr[-3000:]
    rows = [tuple(map(int, line.split())) for line in lines]
    assert [step for step, *_ in rows] == list(range(1, steps + 1))
    growth = rows[-1][1] / rows[settled - 1][1] - 1
    compiled = rows[-1][2] - rows[0][2]
    assert rows[0][2] > 0, "no program counted at the first step"
    assert compiled == 0, f"{compiled} programs compiled after the first step"
    assert growth < 0.01, f"{growth:.2%} more memory after step {settled}"
    return f"{growth:+.2%} of {rows[settled - 1][1] / 1e6:.0f} MB, {rows[0][2]} programs at step 1 and at step {steps}"


def wait_for(path: pathlib.Path, process: subprocess.Popen) -> float:
    """Waits until the file exists or the process has ended; returns the time."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    return time.monotonic()


def end_well(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=3600)
    assert process.returncode == 0, errors[-3000:]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20, help="per stage")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, help="a folder to work in, which is kept")
    options = parser.parse_args()
    folder = options.folder or pathlib.Path(tempfile.mkdtemp(prefix="soak"))
    stages, parts, failed, kills = options.stages.split(","), options.parts.split(","), [], 0
    if "export" in stages and (missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]):
        stages.remove("export")
        print(f"export: LEFT OUT: needs {', '.join(missing)}: pip install '.[export]'", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    workdirs = Workdirs(folder, build_tiny_pipeline(folder / "model"))
    write_clips(folder / "videos")

    def attempt(what: str, work: Callable[..., Any], stage: str, *arguments: Any) -> None:
        nonlocal kills
        began = time.monotonic()
        try:
            found = work(stage, *arguments)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failed.append(what)
            print(f"{what}: FAILED: {error}", flush=True)
            return
        kills += found.kills if isinstance(found, Tally) else found[0] if isinstance(found, tuple) else 0
        print(f"{what}: {found}, {time.monotonic() - began:.0f} s", flush=True)

    for stage in stages:
        if "random" in parts:
            rng = random.Random(f"{options.seed} {stage}")
            attempt(f"random kills in {stage}", random_kills, stage, options.kills, workdirs, rng)
        if "renames" in parts and stage != "export":  # whose work is in child processes
            attempt(f"a kill at every rename of {stage}", every_rename, stage, workdirs)
        if "signals" in parts and stage in TRAINING:
            attempt(f"signals in {stage}", signals, stage, workdirs)
        if "steady" in parts and stage in TRAINING:
            attempt(f"300 steps of {stage}", steady, stage, workdirs)
    print(f"lost: {', '.join(failed)}" if failed else f"nothing lost; {kills} kills, each resumed")
    if options.folder is None:
        shutil.rmtree(folder)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
