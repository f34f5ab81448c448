"""Checks the fields of a config: their types, and whether a network of these sizes can be built."""

import dataclasses
import math
import typing
from collections.abc import Iterable
from typing import Any

from jsurgery.errors import InputError, shortened

# The largest values of the numbers of layers, which are built one by one, and of all other sizes.
LARGEST = {"num_layers": 1024, "num_res_blocks": 64}
LARGEST_SIZE = 1 << 24


def check_fields(config: Any, source: str) -> None:
    """Raises InputError naming the first field of a config dataclass with a wrong type or an impossible size.

    `source` is what the message calls the config.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        expected = _expected(field.type, value, LARGEST.get(field.name, LARGEST_SIZE))
        if expected:
            raise InputError(f"{source}: {field.name}: expected {expected}, found {shortened(value)}")


def check_known(fields: dict[str, Any], known: Iterable[str], harmless: Iterable[str], source: str) -> list[str]:
    """The fields of a config that are not `known` and may be ignored, each as a text with its value.

    Newer versions of a library add fields to its configs. One that is null, false or empty says that something is not
    used; `harmless` ones change no result, and names that begin with "_" are notes: neither is listed. Raises
    InputError, naming `source`, for any other field.
    """
    others = {name: fields[name] for name in sorted(fields.keys() - {*known, *harmless}) if not name.startswith("_")}
    for name, value in others.items():
        if name == "quantization_config" and value:
            raise InputError(f"{source}: {name}: quantised weights are not read; take the model in bfloat16")
        if value:
            actual = f"{shortened(value)}: not a field that jsurgery knows, and it may change results"
            raise InputError(f"{source}: {name}: {actual}")
    return [f"{name} = {shortened(value)}" for name, value in others.items()]


def describe_changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The keys whose values differ, with both values: the first 4, and how many more."""
    changed = [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key)]
    return ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")


def _expected(kind: Any, value: Any, largest: int) -> str | None:
    """What a value of type `kind` should have been, or None if it is fine."""
    if type(None) in typing.get_args(kind):
        (kind,) = set(typing.get_args(kind)) - {type(None)}
        if value is None:
            return None
    if typing.get_origin(kind) is tuple:
        item, *rest = typing.get_args(kind)
        several = rest == [Ellipsis]
        if type(value) is not tuple or not (several or len(value) == 1 + len(rest)):
            return f"{'numbers' if several else f'{1 + len(rest)} numbers'} in a list"
        faults = (_expected(item, element, largest) for element in value)
        return next((f"only {expected} in the list" for expected in faults if expected), None)
    if kind is bool:
        return None if type(value) is bool else "true or false"
    if kind is int:
        return None if type(value) is int and 1 <= value <= largest else f"a whole number from 1 to {largest}"
    if kind is float:
        number = type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)
        return None if number else "a finite number"
    return None


def as_recorded(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass as a result records them: like dataclasses.asdict, without later fields "as before".

    A field that was added after a release has metadata {"before": value}. It is left out where it has that value, so
    that what older versions recorded stays valid.
    """
    fields = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if "before" not in field.metadata or value != field.metadata["before"]:
            fields[field.name] = as_recorded(value) if dataclasses.is_dataclass(value) else value
    return fields
