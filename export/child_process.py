"""Processes that end with the command that started them."""

import ctypes
import os
import pathlib
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent() -> None:
    """A worker whose command is killed would go on writing beside the next one's; only Linux can prevent it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def divert(file: pathlib.Path) -> None:
    """What native libraries print goes to a file; Python's own lines stay where they were."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with file.open("wb") as log:
        os.dup2(log.fileno(), 2)
