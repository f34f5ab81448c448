"""Many processes at one run: they meet, what there is one of is written by process 0, and a failure of one is all's."""

import itertools
import json
import re
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jsurgery import errors
from jsurgery.errors import InputError

T = TypeVar("T")
PATIENCE = 300  # seconds until a process that nobody answers gives up
FOREVER = 7 * 24 * 3600 * 1000  # milliseconds that others may work while this process waits
MESSAGE_BYTES = 1024  # messages are padded to multiples of it: few shapes to compile
_points = itertools.count()


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several, before JAX is used; with no argument it stays alone.

    `coordinator` is where process 0 listens, HOST:PORT, or "auto" on TPU pods and under Slurm or Open MPI, which say
    who is who. Raises InputError for arguments that do not go together, and where nobody listens.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    there = [f"--{name}" for name, value in given.items() if value is not None]
    if not there:
        return
    if coordinator == "auto":
        if len(there) > 1:
            raise InputError(f"{there[1]}: --coordinator=auto finds it out; leave it away")
    elif coordinator is None or num_processes is None or process_id is None:
        raise InputError(
            f"{', '.join(there)}: expected --coordinator=HOST:PORT, --num_processes and --process_id together, "
            "or --coordinator=auto alone"
        )
    elif num_processes < 1:
        raise InputError(f"--num_processes: expected at least 1, found {num_processes}")
    elif not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id: expected 0 to {num_processes - 1}, as --num_processes is {num_processes}; "
            f"found {process_id}"
        )
    elif process_id > 0:
        wait_for_coordinator(coordinator)
    else:
        parse_address(coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # a port that is taken, or no pod
        raise InputError(f"--coordinator={coordinator}: {str(error).splitlines()[0]}") from None


def parse_address(coordinator: str) -> tuple[str, int]:
    """("10.0.0.1:1234") -> ("10.0.0.1", 1234)."""
    found = re.fullmatch(r"(.+):(\d{1,5})", coordinator)
    if found is None:
        raise InputError(f"--coordinator: expected HOST:PORT or auto, found {coordinator!r}")
    return found[1].strip("[]"), int(found[2])


def wait_for_coordinator(coordinator: str) -> None:
    """Waits until somebody listens there: JAX, asked to join, would take the whole process down."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(parse_address(coordinator), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if isinstance(error, socket.gaierror | OverflowError) or time.monotonic() > until:
                raise InputError(f"--coordinator={coordinator}: no process 0 there: {error}") from None
        time.sleep(0.2)


def several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes what there is one of. A process that is alone is the first, and JAX is not asked."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def wait() -> None:
    """Until all processes are here. Devices stay free: process 0 may work on its own for hours."""
    if several():
        import orbax.checkpoint as ocp  # takes seconds, and most commands need none

        barrier = ocp.multihost.get_barrier_sync_fn()
        barrier(key=f"jsurgery {next(_points)}", timeout_ms=FOREVER)


def gather_messages(message: Any) -> list[Any]:
    """What every process says, a JSON value each, in their order."""
    if not several():
        return [message]
    wait()
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size, np.int32))
    width = -(-int(sizes.max()) // MESSAGE_BYTES) * MESSAGE_BYTES
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - text.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_first(work: Callable[[], T]) -> T:
    """Process 0 does `work`, the others wait for what it returns, a JSON value. What it raises, all raise."""
    if not several():
        return work()
    result, error = attempt(work) if is_first() else (None, None)
    said = gather_messages({"result": result, "failure": failure(error)})[0]
    raise_first(error, [said["failure"]])
    return said["result"]


def on_all(work: Callable[[], T]) -> T:
    """Every process does `work`, which needs no others; where one fails, all do."""
    if not several():
        return work()
    result, error = attempt(work)
    raise_first(error, gather_messages(failure(error)))
    return result  # type: ignore[return-value]


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def failure(error: Exception | None) -> list[str] | None:
    return None if error is None else [type(error).__name__, str(error)]


def raise_first(mine: Exception | None, failures: list[list[str] | None]) -> None:
    """Raises this process's own error, or else the first of another one, as the same kind if it is one of ours."""
    if mine is not None:
        raise mine
    for number, found in enumerate(failures):
        if found is not None:
            kind, message = found
            raise getattr(errors, kind, RuntimeError)(f"process {number}: {message}")
