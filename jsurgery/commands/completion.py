"""completion: lets a shell complete commands, flags, config fields and the names of shipped configs.

While the user types, the shell calls `jsurgery` with the environment variable _ARGCOMPLETE. No other call imports
argcomplete.
"""

import os
from typing import Any

from jsurgery.commands.mistakes import leaves
from jsurgery.commands.options import Commands, Options, Overrides, Parser, takes_no_config
from jsurgery.config import CHOICES, base, flatten
from jsurgery.load_config import shipped_configs

SHELLS = ("bash", "zsh", "fish", "powershell")


def add(commands: Commands) -> None:
    text = 'Print what makes a shell complete commands, flags and config fields: eval "$(jsurgery completion bash)".'
    command = commands.add_without_config("completion", run_completion, text)
    command.add_argument("shell", choices=SHELLS, help="The shell, whose start-up file evaluates the output.")


def run_completion(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from argcomplete.shell_integration import shellcode

    print(shellcode(["jsurgery"], shell=options.shell))


def is_asked() -> bool:
    """Whether the shell asks what could come next, as it does when the user presses Tab."""
    return "_ARGCOMPLETE" in os.environ


def complete(parser: Parser, **options: Any) -> None:
    """Answers the shell and exits. `options` are those of argcomplete's `autocomplete`."""
    import argcomplete
    from argcomplete.completers import ChoicesCompleter

    for command in leaves(parser):
        known = command._option_string_actions
        if "--config" in known:
            known["--config"].completer = ChoicesCompleter(shipped_configs())  # type: ignore[attr-defined]
            for field, default in flatten(base()):
                choices = CHOICES.get(field, ("True", "False") if isinstance(default, bool) else None)
                command.add_argument(f"--config.{field}", choices=choices, help="A field of the config.")
    nest(parser)
    argcomplete.autocomplete(parser, **options)


def nest(parser: Parser) -> None:
    """Makes `evaluate vbench`, which is one name with a space to argparse, a word after `evaluate`, for the shell."""
    (action,) = (each for each in parser._actions if each.choices is parser.subcommands)
    action._choices_actions = [each for each in action._choices_actions if " " not in each.dest]  # type: ignore
    for name in [name for name in parser.subcommands if " " in name]:
        group, _, word = name.partition(" ")
        outer = parser.subcommands[group]
        if not outer.subcommands:
            Commands(outer)
        outer.subcommands[word] = parser.subcommands.pop(name)
