"""The process that makes a format: what it prints, and that it does not outlive the command."""

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


def test_ends_with_a_parent_that_was_killed():
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "began\n"
        parent.kill()
        assert parent.stdout.read() == ""  # the pipe ends when the last of both is gone


def test_what_libraries_print_goes_to_a_file(tmp_path):
    code = f"""if True:
        import os, pathlib, sys
        from jsurgery.export.worker import divert
        divert(pathlib.Path({str(tmp_path / "x.log")!r}))
        os.write(2, b"a library's\\n")
        print("ours", file=sys.stderr)
    """
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stderr == "ours\n" and (tmp_path / "x.log").read_text() == "a library's\n"
