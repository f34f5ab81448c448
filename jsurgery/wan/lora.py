"""Merges LoRAs into a transformer's weights while they are read: W + scale * (alpha / rank) * B A, in float64.

Nothing is merged before it is needed and one tensor is in memory at a time, so that a model of true size with LoRAs
takes as much memory as without.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.errors import InputError
from jsurgery.io.hashes import size_and_sha256
from jsurgery.io.safetensors import LazyTensor
from jsurgery.runtime.progress import say
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.checkpoint_layouts import lazy_transformer_tensors, transformer_names
from jsurgery.wan.lora_file import (
    UNDERSCORED,
    LoraLayer,
    LoraSource,
    find_file,
    known_layers,
    open_lora,
    pair_factor,
)
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.models import READ
from jsurgery.wan.transformer import WanTransformer

ROWS = 512  # of a weight that are computed in float64 at once
SHOWN = 3  # names in a message
QUERIES_AND_KEYS = ("blocks.attn1.to_q", "blocks.attn1.to_k", "blocks.attn1.norm_q", "blocks.attn1.norm_k")

# What is added to a tensor: a pair of matrices with a factor, or a difference with a factor.
Pair = tuple[LazyTensor, LazyTensor, float]
Difference = tuple[LazyTensor, float]


@dataclasses.dataclass
class TensorChange:
    """All that LoRAs add to one tensor."""

    pairs: list[Pair] = dataclasses.field(default_factory=list)
    differences: list[Difference] = dataclasses.field(default_factory=list)


def loras_of(config: ConfigDict) -> tuple[LoraSource, ...]:
    """The LoRAs of `config.model`."""
    scales = config.model.lora_scale or (1.0,) * len(config.model.lora)
    return tuple(LoraSource(path, scale) for path, scale in zip(config.model.lora, scales, strict=True))


def describe_loras(loras: Sequence[LoraSource]) -> list[dict[str, Any]]:
    """The LoRAs as metadata lists them: name, scale and the hash of the file."""
    files = [(find_file(lora.path)[0], lora.scale) for lora in loras]
    return [{"file": file.name, "scale": scale, "sha256": size_and_sha256(file)[1]} for file, scale in files]


def with_lora_hashes(identity: str, loras: Sequence[LoraSource]) -> str:
    """The fingerprint of a model with LoRAs; without any, that of the model."""
    if not loras:
        return identity
    return hashlib.sha256(json.dumps([identity, describe_loras(loras)]).encode()).hexdigest()[:16]


def check_loras(network: WanConfig, loras: Sequence[LoraSource]) -> None:
    """Raises InputError unless every LoRA fits the transformer; reads headers alone.

    Where surgery has changed the attention of blocks that a LoRA changes, too, it says so in a line.
    """
    for lora in loras:
        read_changes(network, lora)
    say_operated(network, *loras)


def with_loras(
    tensors: Mapping[str, LazyTensor],
    network: WanConfig,
    layout: str,
    loras: Sequence[LoraSource],
    dtype: Any = None,
) -> dict[str, LazyTensor]:
    """The same tensors, which have their names in `layout`, with the LoRAs merged into each when it is fetched.

    The sum is rounded once, to `dtype`, by default to the tensor's own. Raises InputError as `check_loras` does.
    """
    names = transformer_names(layout)
    changes: dict[str, TensorChange] = {}
    for lora in loras:
        for (path, block), change in read_changes(network, lora).items():
            of_tensor = changes.setdefault(names[path].format(i=block), TensorChange())
            of_tensor.pairs += change.pairs
            of_tensor.differences += change.differences
    return {
        name: merged(tensor, changes[name], dtype) if name in changes and name in tensors else tensor
        for name, tensor in tensors.items()
    }


def read_changes(network: WanConfig, lora: LoraSource) -> dict[tuple[str, int | None], TensorChange]:
    """{(our parameter's path, number of the block): what a LoRA adds}. Raises InputError where it does not fit."""
    layers, config = open_lora(lora.path)
    file, known = find_file(lora.path)[0], known_layers(network.num_layers)
    named = {UNDERSCORED.sub("lora_unet_", name): parts for name, parts in layers.items()}
    if unknown := sorted(name for name in named if name not in known):
        raise InputError(unknown_layers(unknown, network, file))
    shapes = transformer_shapes(network)
    changes: dict[tuple[str, int | None], TensorChange] = {}
    for name, parts in named.items():
        factor = lora.scale * pair_factor(name, parts, config, file)
        for leaf, change in changes_of(parts, lora.scale, factor).items():
            if leaf not in known[name]:
                raise InputError(f"{file}: {name}: has a change of its {leaf}, which it does not have")
            path, block = known[name][leaf]
            if (path, block) in changes:
                raise InputError(f"{file}: changes the {leaf} of {name} twice, under two names")
            check_shape(change, shapes[path], name, network, file)
            changes[path, block] = change
    return changes


def changes_of(parts: LoraLayer, scale: float, factor: float) -> dict[str, TensorChange]:
    """{"weight", "bias" or "modulation": what is added to it}, without those that a layer does not change."""
    pair = [] if parts.down is None or parts.up is None else [(parts.up, parts.down, factor)]
    difference = lambda tensor, by: [] if tensor is None else [(tensor, by)]
    changes = {
        "weight": TensorChange(pair, difference(parts.diff, scale)),
        "bias": TensorChange([], difference(parts.diff_b, scale) + difference(parts.up_bias, factor)),
        "modulation": TensorChange([], difference(parts.diff_m, scale)),
    }
    return {leaf: change for leaf, change in changes.items() if change.pairs or change.differences}


def transformer_shapes(network: WanConfig) -> dict[str, tuple[int, ...]]:
    """{our parameter's path: the shape of its tensor in a file}; of one block."""
    tensors = lazy_transformer_tensors(abstract_module(WanTransformer, dataclasses.replace(network, hybrid=None)))
    named = {path: name.format(i=0, j=0) for path, name in transformer_names().items()}
    return {path: tensors[name].shape for path, name in named.items() if name in tensors}


def check_shape(change: TensorChange, shape: tuple[int, ...], name: str, network: WanConfig, file: epath.Path) -> None:
    """Raises InputError unless a change has the shape of its tensor, which a pair's matrices may have flattened."""
    flat = (shape[0], int(np.prod(shape[1:])))
    for up, down, _ in change.pairs:
        found = (up.shape[0], int(np.prod(down.shape[1:])))
        if found != flat:
            raise InputError(other_base(f"{name}: expected a change of {flat}, found {found}", found[0], network, file))
    for tensor, _ in change.differences:
        if tuple(tensor.shape) != shape:
            found = tuple(tensor.shape)
            raise InputError(
                other_base(f"{name}: expected a change of {shape}, found {found}", found[0], network, file)
            )


def other_base(fault: str, width: int, network: WanConfig, file: epath.Path) -> str:
    """The message about a LoRA whose matrices have other sizes, with the published model that has that width."""
    plain = [model for model in READ if model.transformer is not None and not model.few_steps]
    bases = [model.name for model in plain if WanConfig(**(model.transformer or {})).dim == width]
    made_for = f", as for {' or '.join(bases)}" if bases and width != network.dim else ""
    return f"{file}: made for another base: {fault}{made_for}; the model has {network.size_text}"


def unknown_layers(unknown: Sequence[str], network: WanConfig, file: epath.Path) -> str:
    """The message about layers that the transformer does not have."""
    numbers = [int(found[1]) for name in unknown if (found := re.search(r"blocks[._](\d+)[._]", name))]
    if len(numbers) == len(unknown) and min(numbers) >= network.num_layers:
        fault = f"it changes block {max(numbers)}"
        return f"{file}: made for another base: {fault}; the model has {network.size_text}"
    return f"{file}: changes layers that a text-to-video Wan transformer does not have: {shortlist(unknown)}"


def say_operated(network: WanConfig, *loras: LoraSource) -> None:
    """Says which of the LoRAs' layers feed attention that surgery replaced, whose feature maps do not know them."""
    converted = network.hybrid.converted if network.hybrid else ()
    names = transformer_names()
    for lora in loras if converted else ():
        changed = (place for place in read_changes(network, lora) if place[1] in converted)
        found = sorted({names[path].format(i=block) for path, block in changed if path.startswith(QUERIES_AND_KEYS)})
        if found:
            say(f"{lora.path}: changes queries or keys of blocks that surgery converted without it: {shortlist(found)}")


def shortlist(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def merged(tensor: LazyTensor, change: TensorChange, dtype: Any = None) -> LazyTensor:
    """A tensor with its change, computed in float64 when it is fetched and rounded to `dtype`."""
    rounded = np.dtype(dtype or tensor.dtype)

    def fetch() -> np.ndarray:
        source = np.asarray(tensor)
        values = np.empty(source.shape, rounded)
        flat = values.reshape(len(values), -1)
        pairs = [(matrix(up, 1), matrix(down, 0), factor) for up, down, factor in change.pairs]
        differences = [(np.asarray(part).reshape(flat.shape), factor) for part, factor in change.differences]
        for start in range(0, len(flat), ROWS):
            rows = slice(start, start + ROWS)
            total = source.reshape(flat.shape)[rows].astype(np.float64)
            for up, down, factor in pairs:
                total += factor * (up[rows] @ down)
            for part, factor in differences:
                total += factor * part[rows].astype(np.float64)
            flat[rows] = total.astype(rounded)
        return values

    return LazyTensor(tensor.shape, rounded, fetch)


def matrix(tensor: LazyTensor, axis: int) -> np.ndarray:
    """A matrix of a pair in float64: `down` as [rank, in] (axis 0), `up` as [out, rank] (axis 1)."""
    values = np.asarray(tensor).astype(np.float64)
    return values.reshape(len(values), -1) if axis == 0 else values.reshape(*values.shape[:2])
