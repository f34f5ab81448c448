"""The command line.

Exit codes: 0 success, 1 a bug, 2 bad input or diverged training, 3 does not fit in memory, 4 a measured difference
exceeds its bound, 130 and 143 stopped by SIGINT and SIGTERM, 141 nobody reads the output any more (`| head`).
"""

import argparse
import io
import logging
import os
import select
import sys
import warnings
from collections.abc import Sequence

from jsurgery.commands import (
    ablate,
    bench,
    completion,
    data,
    estimate,
    evaluate,
    export,
    model,
    report,
    sample,
    surgery,
)
from jsurgery.commands.dry_run import scope
from jsurgery.commands.mistakes import unknown_flag
from jsurgery.commands.next_steps import tell_next
from jsurgery.commands.options import Commands, Parser
from jsurgery.commands.overview import TopParser, show_overview
from jsurgery.errors import (
    Diverged,
    DoesNotFit,
    InputError,
    Interrupted,
    ParityError,
    Terminated,
    file_system_reason,
)
from jsurgery.io.files import resolve_arguments
from jsurgery.load_config import known_fields, unknown_field
from jsurgery.runtime.accelerators import leave_absent_accelerators_alone
from jsurgery.runtime.memory_pools import limit_memory_pools

FAMILIES = (surgery, report, estimate, ablate, sample, evaluate, data, model, bench, export, completion)
EXIT_CODES = {InputError: 2, Diverged: 2, DoesNotFit: 3, ParityError: 4, Interrupted: 130, Terminated: 143}
READER_GONE = 141  # as a shell says of a program that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. A user's mistake becomes one line on stderr."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every save
    warnings.filterwarnings(
        "ignore", "Protobuf gencode version"
    )  # from grain: the export needs another version of protobuf
    limit_memory_pools()
    leave_absent_accelerators_alone()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files that its encoding lacks
        sys.stdout.reconfigure(errors="surrogateescape" if "utf" in sys.stdout.encoding else "backslashreplace")
    try:
        options, overrides = parse(sys.argv[1:] if arguments is None else arguments)
        with scope(options):
            options.command(options, overrides)
        tell_next(options, overrides)
        sys.stdout.flush()
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        return READER_GONE
    except tuple(EXIT_CODES) as error:
        return complain(error, EXIT_CODES[type(error)])
    except KeyboardInterrupt:
        return complain("interrupted", EXIT_CODES[Interrupted])
    except Exception as error:
        if (reason := file_system_reason(error)) is None:
            raise
        return complain(reason, EXIT_CODES[InputError])
    return 0


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Splits the arguments into the options of a command and the overrides `--config.a.b=value`.

    Raises InputError for an unknown command, flag or config field, with the nearest that there is.
    """
    overrides, rest = {}, []
    parser = make_parser()
    if completion.is_asked():
        completion.complete(parser)
    for argument in resolve_arguments(arguments):
        name, equals, value = argument.partition("=")
        if not name.startswith("--config."):
            rest.append(argument)
            continue
        field = name.removeprefix("--config.")
        if field not in known_fields():
            raise unknown_field(field)
        if not equals:
            raise InputError(f"{name}: expected {name}=VALUE")
        overrides[field] = value
    if not arguments:
        return show_overview(parser), {}
    words = evaluate.join_words(rest)
    try:
        return parser.parse_args(words), overrides
    except InputError:
        if message := unknown_flag(parser, words):
            raise InputError(message) from None
        raise


def make_parser() -> Parser:
    """The parser of all commands, from which docs/reference.py also writes their reference."""
    parser = TopParser(prog="jsurgery", description="Attention surgery for video diffusion transformers.")
    commands = Commands(parser)
    for family in FAMILIES:
        family.add(commands)
    return parser


def complain(message: object, code: int) -> int:
    """Prints a message as one line on stderr, with control characters escaped. Returns the exit code `code`."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(message).split()))
    print(f"jsurgery: {line}", file=sys.stderr)
    return code


def reader_is_gone() -> bool:
    """Whether the program that standard output goes to has ended. What is left to write then goes nowhere."""
    polled = select.poll()
    polled.register(sys.stdout.fileno(), 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in polled.poll(0)):
        return False
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return True


if __name__ == "__main__":
    sys.exit(main())
