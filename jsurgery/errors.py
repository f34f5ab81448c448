"""What a command can end with besides success; the exit codes are part of the interface."""

import errno
import os

# What a file system may refuse, and the user can mend; libraries in C++ hand on its words alone.
WORDED = {os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT)}
REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EFBIG,
}  # fmt: skip


class InputError(Exception):
    """Bad input. The message is one line: the file or field, what was expected, what was found. Exit code 2."""


class Diverged(InputError):
    """More steps than `config.max_skipped` had numbers that are not finite."""


class DoesNotFit(Exception):
    """The work does not fit the hardware asked for. Exit code 3."""


class Terminated(Exception):
    """Stopped by SIGTERM, with what was done saved. Exit code 143."""


class Interrupted(Exception):
    """Stopped by SIGINT, with what was done saved. Exit code 130."""


class ParityError(Exception):
    """A measured difference exceeds its documented bound. Exit code 4."""


def file_system_reason(error: BaseException) -> str | None:
    """What the file system said in `error`, or in what caused it; None: it is no such error."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in REFUSALS:
            return f"{found.filename or 'a file'}: {found.strerror}"
        if any(words in str(found) for words in WORDED):
            return str(found).splitlines()[0]
        found = found.__cause__
    return None
