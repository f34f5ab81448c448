"""The worker process that makes a format: it ends with its parent, and libraries' output goes to a log."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
CHILD = """if True:
    import time
    from jsurgery.export.child_process import end_with_parent
    end_with_parent()
    print("began", flush=True)
    time.sleep(60)
    print("outlives the command", flush=True)
"""
PARENT = """if True:
    import subprocess, sys
    subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE).wait()
"""


def test_the_worker_ends_when_its_parent_is_killed():
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "began\n"
        parent.kill()
        assert parent.stdout.read() == ""  # ends when both processes have ended


def test_output_of_libraries_goes_to_a_file(tmp_path):
    code = f"""if True:
        import os, pathlib, sys
        from jsurgery.export.worker import divert
        divert(pathlib.Path({str(tmp_path / "x.log")!r}))
        os.write(2, b"a library's\\n")
        print("ours", file=sys.stderr)
    """
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stderr == "ours\n" and (tmp_path / "x.log").read_text() == "a library's\n"
