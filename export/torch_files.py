"""Reads a model folder's JSON and tensors for torch. Needs only torch and safetensors."""

import json
import pathlib
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from jsurgery.errors import InputError


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError where there is no such file or it holds no JSON."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected a transformer folder in the diffusers layout")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: expected JSON ({error})") from None


def read_tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors: the shards that an index names, or every file without one.

    Raises InputError where a file is missing or damaged, or where two files hold the same tensor.
    """
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        files = sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
    if not files:
        raise InputError(f"{folder}: no .safetensors file in this folder")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            shard = load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: missing, or not a safetensors file ({error})") from None
        if twice := tensors.keys() & shard.keys():
            raise InputError(f"{file}: holds {min(twice)}, which another file of the folder holds too")
        tensors |= shard
    return tensors
