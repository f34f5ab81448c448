"""A run that is killed and terminated while it trains, and killed in the held-out errors, gives an undisturbed result.

`make soak` does the same with hundreds of kills, in every stage.
"""

import pytest

from jsurgery.io.hashes import MANIFEST
from tests.faults.workdirs import Workdirs, check_complete, result


@pytest.fixture(scope="module")
def workdirs(tiny_pipeline, tmp_path_factory):
    return Workdirs(tmp_path_factory.mktemp("faults"), tiny_pipeline)


def test_a_killed_and_terminated_run_ends_with_the_same_result(workdirs):
    undisturbed = workdirs.prepare("distill", "undisturbed")
    process, renames = workdirs.run_signalled("rename", 0, "distill", undisturbed)
    assert process.returncode == 0, process.stderr[-3000:]
    expected = result(undisturbed, "distill")
    # the run is killed when the third checkpoint has been written and its manifest has not
    sealing = [number for number, line in enumerate(renames, 1) if line.endswith(f"{MANIFEST}")]
    sealing = [number for number in sealing if renames[number - 1].startswith(("rename", "replace"))]
    assert len(sealing) == 6

    workdir = workdirs.prepare("distill")
    process, _ = workdirs.run_signalled("rename", sealing[2], "distill", workdir)
    assert process.returncode == -9 and check_complete(workdir)
    sealed = sorted(path.parent.name for path in workdir.rglob(MANIFEST))
    assert sealed and len(sealed) < len(list((workdir / "distill" / "checkpoints").iterdir()))

    process, steps = workdirs.run_signalled("SIGTERM", 8, "distill", workdir)
    assert process.returncode == 143, process.stderr[-3000:]
    assert "cut short" in process.stderr and int(steps[0].split()[0]) > int(sealed[-1]), "expected it to resume"
    assert process.stderr.splitlines()[-1].startswith("jsurgery: distill: stopped by SIGTERM")
    assert not (workdir / "distill" / "errors.json").exists()
    assert (workdir / "distill" / "checkpoints" / "8" / MANIFEST).exists()
    # nothing is compiled after the first step
    assert len(steps) > 1 and len({line.split()[2] for line in steps}) == 1

    # killed when the errors of the velocity on the first of two batches are measured, and not yet saved
    process, saves = workdirs.run_signalled("rename", "3:held_out.json", "distill", workdir)
    assert process.returncode == -9 and len(saves) == 3 and check_complete(workdir)
    process, saves = workdirs.run_signalled("rename", "0:held_out.json", "distill", workdir)
    assert process.returncode == 0, process.stderr[-3000:]
    assert len(saves) == 2, "the errors of the attention were measured again"
    assert (workdir / "distill" / "errors.json").read_text() == (undisturbed / "distill" / "errors.json").read_text()
    assert result(workdir, "distill") == expected
    assert check_complete(workdir) and not list(workdir.rglob("*.tmp"))
