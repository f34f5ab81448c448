"""Several processes working on one run.

Process 0 writes every file that exists once. If one process fails, all of them stop with its error.
"""

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
PATIENCE = 300  # seconds to wait for the other processes to start
FOREVER = 7 * 24 * 3600 * 1000  # milliseconds that process 0 may work while the others wait
MESSAGE_BYTES = 1024  # messages are padded to multiples of this, so that few shapes are compiled
_points = itertools.count()


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several; to be called before JAX is used. Without arguments it stays alone.

    `coordinator` is the HOST:PORT on which process 0 listens, or "auto" on TPU pods and under Slurm or Open MPI, which
    number the processes themselves. Raises InputError for arguments that contradict each other, and if nobody listens.
    """
    arguments = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    flags = [f"--{name}" for name, value in arguments.items() if value is not None]
    if not flags:
        return
    if coordinator == "auto":
        if len(flags) > 1:
            raise InputError(f"{flags[1]}: leave it out, as --coordinator=auto finds its value")
    elif coordinator is None or num_processes is None or process_id is None:
        raise InputError(
            f"{', '.join(flags)}: expected --coordinator=HOST:PORT, --num_processes and --process_id together, "
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
    except (RuntimeError, ValueError) as error:  # the port is in use, or this is no pod
        raise InputError(f"--coordinator={coordinator}: {str(error).splitlines()[0]}") from None


def parse_address(coordinator: str) -> tuple[str, int]:
    """("10.0.0.1:1234") -> ("10.0.0.1", 1234)."""
    match = re.fullmatch(r"(.+):(\d{1,5})", coordinator)
    if match is None:
        raise InputError(f"--coordinator: expected HOST:PORT or auto, found {coordinator!r}")
    return match[1].strip("[]"), int(match[2])


def wait_for_coordinator(coordinator: str) -> None:
    """Waits until process 0 listens. JAX's own attempt to join would abort this process instead of raising an error."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(parse_address(coordinator), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if isinstance(error, socket.gaierror | OverflowError) or time.monotonic() > deadline:
                raise InputError(f"--coordinator={coordinator}: no process 0 there: {error}") from None
        time.sleep(0.2)


def several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes the files that exist once. A single process is the first, without starting JAX."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def wait() -> None:
    """Waits until all processes have called it. Uses no devices, since process 0 may work alone for hours."""
    if several():
        import orbax.checkpoint as ocp  # takes seconds, and most commands do not need it

        barrier = ocp.multihost.get_barrier_sync_fn()
        barrier(key=f"jsurgery {next(_points)}", timeout_ms=FOREVER)


def gather_messages(message: Any) -> list[Any]:
    """The messages of all processes, by process number. A message is a JSON value."""
    if not several():
        return [message]
    wait()
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size, np.int32))
    width = -(-int(sizes.max()) // MESSAGE_BYTES) * MESSAGE_BYTES
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - text.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_first(work: Callable[[], T]) -> T:
    """Process 0 calls `work`, and all processes return its result, a JSON value. If it raises an error, all do."""
    if not several():
        return work()
    result, error = attempt(work) if is_first() else (None, None)
    message = gather_messages({"result": result, "failure": failure(error)})[0]
    raise_first(error, [message["failure"]])
    return message["result"]


def on_all(work: Callable[[], T]) -> T:
    """Every process calls `work`, which must not wait for other processes. If one fails, all do."""
    if not several():
        return work()
    result, error = attempt(work)
    raise_first(error, gather_messages(failure(error)))
    return result  # type: ignore[return-value]


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """(result, None), or (None, error)."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def failure(error: Exception | None) -> list[str] | None:
    """An error as a JSON value."""
    return None if error is None else [type(error).__name__, str(error)]


def raise_first(mine: Exception | None, failures: list[list[str] | None]) -> None:
    """Raises this process's error, or else the first error of another process; `failures` are by process number.

    Another process's error keeps its class if that is one of `jsurgery.errors`; otherwise it is a RuntimeError.
    """
    if mine is not None:
        raise mine
    for number, theirs in enumerate(failures):
        if theirs is not None:
            kind, message = theirs
            raise getattr(errors, kind, RuntimeError)(f"process {number}: {message}")
