"""How glibc divides the memory of a process."""

import contextlib
import ctypes
import os

ARENA_MAX = -8  # the parameter M_ARENA_MAX of mallopt


def limit_memory_pools() -> None:
    """Limits glibc to two memory pools.

    By default it makes a pool for each thread. Every save of a checkpoint starts new threads, and the memory that they
    freed would stay in their pools.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
            ctypes.CDLL(None).mallopt(ARENA_MAX, 2)
