"""A lock that keeps two runs out of one stage's folder."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator

from etils import epath

from jsurgery.errors import InputError
from jsurgery.runtime import processes
from jsurgery.runtime.progress import say

NAME = "lock"
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what a lock that another process holds gives


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[None]:
    """Locks `folder` and creates it if needed. With several processes, process 0 holds the lock for all of them.

    The kernel releases the lock when its process ends, even if it is killed. Object stores (gs://) have no locks, and
    some network file systems (NFS, Lustre) do not either, which one line says: there the user must keep two runs apart.
    Raises InputError that names the process that holds the lock.
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
        except OSError as error:
            if error.errno not in TAKEN:
                say(f"{folder}: its file system has no locks ({error.strerror}): do not start a second run here")
                break
            stream.seek(0)
            holder = stream.read().strip()
            stream.close()
            raise InputError(
                f"{folder}: in use by another run: {describe_holder(holder)}; wait for it, or end it"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                break
        stream.close()  # the last holder removed the file between our opening and locking it
    try:
        stream.truncate(0)
        stream.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        stream.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        stream.close()


def describe_holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just begun"
