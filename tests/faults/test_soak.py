"""The soak in short: one run that is killed in the middle of a save, then terminated, and ends as if nothing had been.

`make soak` does the same by the hundred, in every stage.
"""

import pytest

from jsurgery.io.hashes import MANIFEST
from tests.faults.workdirs import Workdirs, check_whole, result


@pytest.fixture(scope="module")
def workdirs(tiny_pipeline, tmp_path_factory):
    return Workdirs(tmp_path_factory.mktemp("faults"), tiny_pipeline)


def test_a_run_that_is_killed_and_terminated_ends_as_if_it_had_not_been(workdirs):
    undisturbed = workdirs.begun("distill", "undisturbed")
    ended, renames = workdirs.disturbed("rename", 0, "distill", undisturbed)
    assert ended.returncode == 0, ended.stderr[-3000:]
    expected = result(undisturbed, "distill")
    # the third checkpoint is written, not sealed
    sealing = [number for number, line in enumerate(renames, 1) if line.endswith(f"{MANIFEST}")]
    sealing = [number for number in sealing if renames[number - 1].startswith(("rename", "replace"))]
    assert len(sealing) == 6

    workdir = workdirs.begun("distill")
    ended, _ = workdirs.disturbed("rename", sealing[2], "distill", workdir)
    assert ended.returncode == -9 and check_whole(workdir)
    sealed = sorted(path.parent.name for path in workdir.rglob(MANIFEST))
    assert sealed and len(sealed) < len(list((workdir / "distill" / "checkpoints").iterdir()))

    ended, logged = workdirs.disturbed("SIGTERM", 8, "distill", workdir)
    assert ended.returncode == 143, ended.stderr[-3000:]
    assert "cut short" in ended.stderr and int(logged[0].split()[0]) > int(sealed[-1]), "it went on"
    assert ended.stderr.splitlines()[-1].startswith("jsurgery: distill: stopped by SIGTERM")
    assert not (workdir / "distill" / "errors.json").exists()
    assert (workdir / "distill" / "checkpoints" / "8" / MANIFEST).exists()
    # nothing is compiled after the first step
    assert len(logged) > 1 and len({line.split()[2] for line in logged}) == 1

    ended = workdirs.run("distill", workdir)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert result(workdir, "distill") == expected
    assert check_whole(workdir) and not list(workdir.rglob("*.tmp"))
