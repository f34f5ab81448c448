"""Reads a model folder's JSON and tensors for torch. Needs only torch and safetensors."""

import dataclasses
import json
import pathlib
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from jsurgery.errors import InputError


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError where there is no such file or it holds no JSON."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected a transformer folder in the diffusers layout")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: expected JSON ({error})") from None


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, which `read` reads."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as stored:
            return stored.get_tensor(self.name)


def open_tensors(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """All tensors of the folder's safetensors, unread: of the shards that an index names, or of every file without one.

    Raises InputError where a file is missing or damaged, or where two files hold the same tensor.
    """
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        files = sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
    if not files:
        raise InputError(f"{folder}: no .safetensors file in this folder")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: missing, or not a safetensors file ({error})") from None
        if twice := tensors.keys() & shapes.keys():
            raise InputError(f"{file}: holds {min(twice)}, which another file of the folder holds too")
        tensors |= {name: StoredTensor(file, name, shape) for name, shape in shapes.items()}
    return tensors


def read_tensors(folder: pathlib.Path, *prefixes: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with one of `prefixes`, or all; otherwise like `open_tensors`."""
    stored = open_tensors(folder)
    return {name: tensor.read() for name, tensor in stored.items() if name.startswith(prefixes or "")}
