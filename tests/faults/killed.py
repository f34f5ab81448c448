"""Runs `jsurgery` in this process and sends the process a signal at a chosen moment.

    python killed.py rename N LOG -- ARGUMENT ...    SIGKILL just before rename N, or removal N of a manifest; 0: never
    python killed.py rename N:NAME LOG -- ...        the same, of renames to NAME alone
    python killed.py SIGNAL STEP LOG -- ARGUMENT ... SIGTERM or SIGINT when step STEP is logged; 0: never

LOG gets a line for each rename, or for each logged step: its number, resident bytes, number of compiled programs.
"""

import logging
import os
import pathlib
import signal
import sys

PATCHED = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "remove")}


def main() -> int:
    kind, number, log, dash, *arguments = sys.argv[1:]
    assert dash == "--"
    if kind == "rename":
        count, _, name = number.partition(":")
        kill_at(int(count), log, name)
    else:
        signal_at(getattr(signal, kind), int(number), log)
    from jsurgery.cli import main as command

    return command(arguments)


class Compilations(logging.Handler):
    """Counts the programs that JAX logs as compiled."""

    count = 0

    def emit(self, record):
        self.count += record.getMessage().startswith("Compiling ")


def signal_at(number: int, step: int, log: str) -> None:
    import jax

    from jsurgery.runtime.metrics import Metrics

    write, compilations = Metrics.log, Compilations()
    jax.config.update("jax_log_compiles", True)
    logging.getLogger("jax").addHandler(compilations)
    logging.getLogger("jax").propagate = False

    def signalled(self, at, **values):
        write(self, at, **values)
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with open(log, "a") as lines:
            lines.write(f"{at} {resident} {compilations.count}\n")
        if at == step:
            os.kill(os.getpid(), number)

    Metrics.log = signalled


def kill_at(number: int, log: str, target: str) -> None:
    reached = 0

    def killing(name):
        def call(source, *rest, **more):
            nonlocal reached
            moves = name in ("rename", "replace")
            moved_to = os.fspath(rest[0]) if moves else ""
            if moved_to.endswith(target) if moves else os.fspath(source).endswith("manifest.json") and not target:
                reached += 1
                with open(log, "a") as lines:
                    lines.write(f"{name} {source} {moved_to}\n")
                if reached == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return PATCHED[name](source, *rest, **more)

        return call

    for name in PATCHED:
        setattr(os, name, killing(name))
    assert pathlib.os.replace is os.replace  # etils and pathlib also call them through the module


if __name__ == "__main__":
    sys.exit(main())
