"""What to say about a flag that a command does not have."""

import re
from collections.abc import Iterator, Sequence

from jsurgery.commands.options import Parser
from jsurgery.errors import did_you_mean, nearest
from jsurgery.load_config import known_fields


def unknown_flag(parser: Parser, arguments: Sequence[str]) -> str | None:
    """A message about the first flag that the command in `arguments` does not have; None if it has all of them."""
    command, rest = parser, list(arguments)
    while rest and rest[0] in command.subcommands:
        command = command.subcommands[rest.pop(0)]
    if command.subcommands:
        return flag_before_command(command, rest[0]) if rest and is_flag(rest[0]) else None
    known = flags(command)
    for argument in rest:
        name = argument.partition("=")[0]
        if is_flag(name) and not any(flag.startswith(name) for flag in known):
            fields = [f"--config.{field}" for field in known_fields()] if "--config" in known else []
            return f"{name}: unknown flag of `{command.prog}`{did_you_mean(name, [*known, *fields])}"
    return None


def flag_before_command(parser: Parser, flag: str) -> str:
    """The message about a flag where a command is expected, with the nearest flag of the first command that has it."""
    owner: dict[str, str] = {}
    for command in leaves(parser):
        for name in flags(command):
            owner.setdefault(name, command.prog)
    name = flag.partition("=")[0]
    meant = nearest(name, owner)
    return f"{name}: expected a command first" + (f"; did you mean `{owner[meant]} {meant}`?" if meant else "")


def is_flag(argument: str) -> bool:
    return re.match(r"--?[A-Za-z]\S*$", argument.partition("=")[0]) is not None


def flags(command: Parser) -> list[str]:
    """All flags of a command."""
    return [name for action in command._actions for name in action.option_strings]


def leaves(parser: Parser) -> Iterator[Parser]:
    """The parsers of all commands, in order; of `bench`, those of its subjects."""
    for command in parser.subcommands.values():
        if command.subcommands:
            yield from leaves(command)
        else:
            yield command
