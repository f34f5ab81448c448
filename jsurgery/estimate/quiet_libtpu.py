"""Keeps the log of libtpu, which compiles for TPUs that are not there, off the user's terminal."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import TextIO

from jsurgery.errors import DoesNotFit, InputError


@contextlib.contextmanager
def quiet_libtpu() -> Iterator[None]:
    """Within, only Python prints to stderr: C++ code and new processes write to a file instead.

    libtpu complains about missing chips and, on SIGTERM, prints a stack trace; no setting stops it. If the block fails
    in an unexpected way, what was held back follows on stderr, since it may tell why.
    """
    sys.stderr.flush()
    python, descriptor = sys.stderr, os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        if writes_to_descriptor(python):
            sys.stderr = os.fdopen(descriptor, "w", 1, encoding=python.encoding, errors="replace", closefd=False)
        expected = True
        try:
            yield
        except (InputError, DoesNotFit, KeyboardInterrupt):
            raise
        except BaseException:
            expected = False
            raise
        finally:
            sys.stderr.flush()
            sys.stderr = python
            os.dup2(descriptor, 2)
            os.close(descriptor)
            if not expected:
                log.seek(0)
                sys.stderr.write(log.read().decode(errors="replace"))


def writes_to_descriptor(stream: TextIO) -> bool:
    """Whether a stream writes to the file descriptor 2; not if a test or a notebook has replaced it."""
    try:
        return stream.fileno() == 2
    except (OSError, ValueError, AttributeError):
        return False
