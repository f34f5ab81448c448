"""What the processes that an export starts have in common: they end with the command, and libraries print to a log."""

import ctypes
import os
import pathlib
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent() -> None:
    """Ends this process when its parent is killed, so that it does not go on writing beside the next run's worker.

    Only Linux can do this; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def divert(file: pathlib.Path) -> None:
    """Sends what native libraries print to stderr into a file. Python's own stderr stays where it was."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with file.open("wb") as log:
        os.dup2(log.fileno(), 2)
