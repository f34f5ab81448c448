"""A lock that keeps two runs out of one stage's folder."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator

from etils import epath

from jsurgery.errors import InputError
from jsurgery.runtime import processes

NAME = "lock"


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[None]:
    """Holds `folder`, which is made if it is not there; of several processes the first does, for all.

    The kernel gives the lock back when its process ends, in whatever way. Object stores (gs://) know no locks: there,
    keeping two runs apart is the user's business. Raises InputError that names who holds it.
    """
    if "://" in str(folder):
        yield
        return
    held = contextlib.ExitStack()
    processes.on_first(lambda: held.enter_context(_held(pathlib.Path(folder))))
    with held:
        yield


@contextlib.contextmanager
def _held(folder: pathlib.Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    while True:
        stream = path.open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            holder = stream.read().strip()
            stream.close()
            raise InputError(f"{folder}: in use by another run: {described(holder)}; wait for it, or end it") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                break
        stream.close()  # its last holder removed it between opening and locking
    try:
        stream.truncate(0)
        stream.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        stream.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        stream.close()


def described(holder: str) -> str:
    try:
        found = json.loads(holder)
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just begun"
