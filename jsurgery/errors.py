"""The exceptions that end a command, with their exit codes, which users may rely on."""

import difflib
import errno
import os
from collections.abc import Iterable
from typing import Any

# Errors of a file system that the user can fix: the texts, since C++ libraries pass on nothing else, and the numbers.
WORDED = {os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT)}
REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EFBIG,
}  # fmt: skip


class InputError(Exception):
    """Bad input. The message is one line with the file or field, what was expected, and what was found. Exit code 2."""


class Diverged(InputError):
    """More than `config.max_skipped` steps of a training had a loss or gradient that is not finite. Exit code 2."""


class DoesNotFit(Exception):
    """The work does not fit the requested hardware. Exit code 3."""


class Terminated(Exception):
    """Stopped by SIGTERM, after saving the work done so far. Exit code 143."""


class Interrupted(Exception):
    """Stopped by SIGINT, after saving the work done so far. Exit code 130."""


class ParityError(Exception):
    """A measured difference exceeds its documented bound. Exit code 4."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is most like a misspelt name; None if none is like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return close[0] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean KNOWN?", or "" if none of `known` is like it."""
    meant = nearest(name, known)
    return f"; did you mean {meant}?" if meant else ""


def file_system_reason(error: BaseException) -> str | None:
    """The message of a file system's error, if `error` is one or was caused by one; else None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in REFUSALS:
            return f"{cause.filename or 'a file'}: {cause.strerror}"
        if any(text in str(cause) for text in WORDED):
            return str(cause).splitlines()[0]
        cause = cause.__cause__
    return None


def shortened(value: Any, length: int = 80) -> str:
    """A value's repr for a message, cut after `length` characters."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "…"
