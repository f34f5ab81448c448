"""Loads a config file by path or name, applies overrides and checks the result."""

import ast
import importlib.machinery
import importlib.util
import operator
import os
import pathlib
import re

from ml_collections import ConfigDict

from jsurgery.config import ITEMS, LARGEST, RATES, base, flatten, validate
from jsurgery.errors import InputError, did_you_mean

PATHS = ("model.path", "data.path", "prompts", "plan.costs")  # the fields that may begin with ~


class LoaderWithoutBytecode(importlib.machinery.SourceFileLoader):
    """Runs a file and, unlike its base class, writes no bytecode beside it: the folder is the user's."""

    def set_data(self, path, data, *, _mode=0o666) -> None:
        pass


def load_config(name: str, overrides: dict[str, str] | None = None) -> ConfigDict:
    """The config of a file path or a shipped name (`tiny`), with `a.b` -> text overrides, validated and frozen.

    `wan_1_3b@v6e:4x4` also sets the fields in the file's `TOPOLOGIES` for these chips, such as batches that suit them.
    Raises InputError naming the file or field.
    """
    name, topology = split_topology(name)
    path = config_path(name)
    name_of_module = f"jsurgery_config_{path.stem}"
    loader = LoaderWithoutBytecode(name_of_module, str(path))
    spec = importlib.util.spec_from_file_location(name_of_module, path, loader=loader)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}: expected a get_config() that runs, found {type(error).__name__}: {error}") from None
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path}: expected get_config() to return the ConfigDict of base(), found {config!r}")
    fields, known = ({name for name, _ in flatten(c)} for c in (config, base()))
    if fields != known:
        raise InputError(f"{path}: expected the fields of base(), found other or missing ones: {min(fields ^ known)}")
    placements = getattr(module, "TOPOLOGIES", {})
    if topology and topology not in placements:
        names, near = ", ".join(placements) or "none", did_you_mean(topology, placements)
        raise InputError(f"--config={name}@{topology}: expected a topology that {path} knows: {names}{near}")
    fields = {field: str(value) for field, value in placements.get(topology, {}).items()}
    for field, text in (fields | (overrides or {})).items():
        override(config, field, text)
    for field in PATHS:
        if str(path := operator.attrgetter(field)(config)).startswith("~"):
            override(config, field, os.path.expanduser(path))
    validate(config)
    return config.lock()


def split_topology(name: str) -> tuple[str, str]:
    """("wan_1_3b@v6e:4x4") -> its two parts; without a topology the second is empty."""
    found = re.fullmatch(r"(.+)@([\w:-]+)", name)
    return (found[1], found[2]) if found else (name, "")


def config_path(name: str) -> pathlib.Path:
    """A file, or a config that ships with the package."""
    path = pathlib.Path(name)
    if path.suffix == ".py":
        if path.exists():
            return path
        raise InputError(f"--config={name}: no such file")
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    known, near = ", ".join(shipped), did_you_mean(name, shipped)
    raise InputError(f"--config={name}: expected a .py file or one of {known}{near}")


def known_fields() -> list[str]:
    """The names of all fields of a config, such as "video.frames"."""
    return [name for name, _ in flatten(base())]


def unknown_field(field: str) -> InputError:
    known = (f"config.{name}" for name in known_fields())
    return InputError(f"config.{field}: unknown field{did_you_mean(f'config.{field}', known)}")


def shipped_configs() -> dict[str, pathlib.Path]:
    """{name: file} of the configs that ship with the package: beside it in a checkout, inside it in a wheel."""
    package = pathlib.Path(__file__).parent
    files = [file for folder in (package.parent / "configs", package / "configs") for file in folder.glob("*.py")]
    return {file.stem: file for file in sorted(files)}


def override(config: ConfigDict, field: str, text: str) -> None:
    """Sets `field` from `text`. Raises InputError for an unknown field or a value of another type than the default."""
    node = config
    *parents, leaf = field.split(".")
    for parent in parents:
        node = node.get(parent) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict) or leaf not in node or isinstance(node[leaf], ConfigDict):
        raise unknown_field(field)
    old = node[leaf]
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that literal_eval raises
        value = text
    if field == "plan.budget":  # "15R2", or a number
        node[leaf] = value
        return
    if isinstance(old, str):
        value = text
    elif isinstance(old, bool):
        value = {"true": True, "false": False}.get(text.lower(), value)
    elif isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= LARGEST else float("inf" if value > 0 else "-inf")
    elif isinstance(old, tuple) and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    if field in ITEMS and ITEMS[field] is str and not text.startswith(("(", "[")):
        value = (text,)
    if field in ITEMS and isinstance(value, tuple):
        value, fits = items_of_type(value, ITEMS[field])
        if not fits:
            raise InputError(f"config.{field}: expected a list of {ITEMS[field].__name__}, found {text!r}")
        with node.ignore_type():
            node[leaf] = value
        return
    fits = type(value) is type(old)
    if field in RATES and isinstance(value, tuple):  # numbers and names, whatever the default has
        fits = {type(item) for item in value} <= {int, str}
    elif isinstance(value, tuple) and isinstance(old, tuple):
        fits = {type(item) for item in value} <= {type(item) for item in old}
    if not fits:
        raise InputError(f"config.{field}: expected {type(old).__name__}, like {old!r}; found {text!r}")
    with node.ignore_type():
        node[leaf] = value


def items_of_type(items: tuple, kind: type) -> tuple[tuple, bool]:
    """The items, whole numbers as floats where `kind` is float, and whether all are of that kind."""
    whole = lambda item: kind is float and type(item) is int and abs(item) <= LARGEST
    converted = tuple(float(item) if whole(item) else item for item in items)
    return converted, all(type(item) is kind for item in converted)
