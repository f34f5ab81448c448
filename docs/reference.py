"""The reference of commands and of config fields as Markdown, from the program's parser and from `config.base()`.

`conf.py` puts it where a page says `<!-- reference: NAME -->`, so that no reference is stored that could go stale.
"""

import argparse
import ast
import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from jsurgery import config
from jsurgery.cli import make_parser
from jsurgery.load_config import config_path

ROOT = pathlib.Path(__file__).parents[1]
MARKER = re.compile(r"^<!-- reference: (\w+) -->$", re.MULTILINE)
FIELD = re.compile(r"c\.([\w.]+) = .*?(?:\s\s# (.*))?$")
FIELD_OF_SECTION = re.compile(r"c\.(\w+) = ConfigDict\(\)(?:\s+# (.*))?$")


def cell(words: Any) -> str:
    """Text for a cell of a table."""
    return str(words).replace("|", r"\|").replace("<", r"\<").replace("*", r"\*")


def table(*rows: tuple[str, ...]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body))


def parsers(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """(command, its parser, its help) of every command, such as "bench attention"; a group is no command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                if any(isinstance(part, argparse._SubParsersAction) for part in inner._actions):
                    yield from parsers(inner, f"{prefix}{name} ")
                else:
                    yield prefix + name, inner, helps.get(name, "")


def commands() -> str:
    """A section for every command, with a table of its flags."""
    sections = []
    for name, parser, text in parsers(make_parser()):
        formatter = parser._get_formatter()
        rows = [
            (flag(action), cell(" ".join([formatter._expand_help(action) if action.help else "", *choices(action)])))
            for action in parser._actions
            if not isinstance(action, argparse._HelpAction)
        ]
        about = cell(parser.description or text)
        sections.append(f"## {name}\n\n{about}\n\n{table(('flag', 'meaning'), *rows)}")
    return "\n\n".join(sections)


def flag(action: argparse.Action) -> str:
    """How a flag is typed: `--steps=VALUE`; words in a row where it takes several; bold if it must be given."""
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    several = action.nargs in ("+", "*")
    if not action.option_strings:
        typed = f"{value} {value} …" if several else value
    else:
        typed = action.option_strings[-1] + (f" {value} {value} …" if several else f"={value}" if value else "")
    typed = f"`{typed}`"
    return f"**{typed}**" if action.required else typed


def choices(action: argparse.Action) -> list[str]:
    return [f"One of {', '.join(map(str, action.choices))}."] if action.choices and action.nargs != 0 else []


def meanings() -> dict[str, str]:
    """{field or section: the comment beside it in `config.base`}."""
    found = {}
    for line in inspect.getsource(config.base).splitlines():
        if match := FIELD_OF_SECTION.search(line) or FIELD.search(line):
            found[match[1]] = match[2] or ""
    return found


def allowed(field: str, value: Any) -> str:
    """The values that `config.validate` lets a field have."""
    if field in config.CHOICES:
        return ", ".join(f"`{choice}`" for choice in config.CHOICES[field])
    if isinstance(value, bool):
        return "`True`, `False`"
    if field == "plan.budget":
        return "a name like `15R2`, or a positive number"
    if field in config.SHARES:
        return "0 to 1"
    if isinstance(value, int | float):
        kind = "whole number" if isinstance(value, int) else "number"
        return f"{kind} from 0" if field in config.MAY_BE_ZERO else f"positive {kind}"
    if field.endswith("rates"):
        return "rates of which each divides the next, or `linear`"
    if isinstance(value, tuple):
        return {int: "whole numbers", float: "numbers", str: "files"}[config.ITEMS.get(field, int)]
    return "text"


def fields() -> str:
    """A section for every section of a config, with a table of its fields."""
    said, tables = meanings(), dict[str, list[tuple[str, ...]]]()
    defaults = dict(config.flatten(config.base()))
    for field in sorted(defaults, key=list(said).index):  # as in the source
        section, value = field.rpartition(".")[0], defaults[field]
        default = '`""`' if value == "" else f"`{value}`"
        tables.setdefault(section, []).append((f"`{field}`", default, allowed(field, value), cell(said[field])))
    sections = []
    for section, rows in tables.items():
        about = f"\n\n{cell(said[section])}." if said.get(section) else ""
        head = ("field", "default", "allowed", "meaning")
        sections.append(f"## {section or 'Outside any section'}{about}\n\n{table(head, *rows)}")
    return "\n\n".join(sections)


def configs() -> str:
    """A table of the shipped configs: what they are for, and the machines whose batches they know."""
    rows = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        tree = ast.parse(config_path(path.stem).read_text())
        about = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
        keys = [
            key.value
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TOPOLOGIES"
            for key in getattr(node.value, "keys", [])
        ]
        rows.append((f"`{path.stem}`", cell(about), " ".join(f"`@{key}`" for key in keys)))
    return table(("config", "what it is", "machines"), *rows)


REFERENCES = {"commands": commands, "fields": fields, "configs": configs}


def expand(text: str) -> str:
    """A page's text with its references written out."""
    return MARKER.sub(lambda match: REFERENCES[match[1]](), text)


if __name__ == "__main__":
    print(expand("\n".join(f"<!-- reference: {name} -->" for name in REFERENCES)))
