"""Prefixes that other programs put before the names of a model's tensors, and wrappers that they leave within them."""

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from etils import epath

from jsurgery.errors import InputError

Tensor = TypeVar("Tensor")
KNOWN = 0.99  # of the names, after the prefix
LONGEST = 6  # parts of a prefix
# What torch.compile, activation checkpointing and FSDP put into a name, once for each module that they wrap.
_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\.")


def without_prefix(
    tensors: Mapping[str, Tensor], known: Callable[[str], bool], source: epath.PathLike
) -> dict[str, Tensor]:
    """The tensors under their names without wrappers and without the shortest prefix after which 99 % are `known`.

    Names that do not begin with the prefix are kept. Without such a prefix all names are. Raises InputError, naming
    `source`, where two tensors get the same name.
    """
    unwrapped = {name: _WRAPPER.sub("", name) for name in tensors}
    prefix = shortest_prefix(list(unwrapped.values()), known)
    if prefix is None:
        return dict(tensors)
    renamed: dict[str, Tensor] = {}
    for name, plain in unwrapped.items():
        plain = plain.removeprefix(prefix)
        if plain in renamed:
            raise InputError(f"{source}: holds {plain} twice, as {name} and under another prefix")
        renamed[plain] = tensors[name]
    return renamed


def shortest_prefix(names: list[str], known: Callable[[str], bool]) -> str | None:
    """The shortest prefix, perhaps empty, after which at least 99 % of the names are `known`; None if there is none."""
    if not names:
        return None
    # Names with a common prefix are neighbours in alphabetical order, so a prefix of 99 % is one of the middle name.
    parts = sorted(names)[len(names) // 2].split(".")
    for length in range(min(LONGEST, len(parts) - 1) + 1):
        prefix = "".join(f"{part}." for part in parts[:length])
        found = sum(name.startswith(prefix) and known(name.removeprefix(prefix)) for name in names)
        if found >= KNOWN * len(names):
            return prefix
    return None
