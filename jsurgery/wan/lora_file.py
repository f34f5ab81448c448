"""Reads and writes LoRA files: the layers of a Wan transformer that they change, under whatever names programs give.

A layer has a pair of matrices (lora_A and lora_B, or lora_down and lora_up) with an `alpha`, or a difference of its
weight, bias or modulation as it is (`diff`, `diff_b`, `diff_m`), or both.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import nnx

from jsurgery.errors import InputError
from jsurgery.io.files import read_object
from jsurgery.io.safetensors import LazyTensor, open_lora_tensors, write_tensors
from jsurgery.wan.checkpoint_layouts import transformer_names
from jsurgery.wan.low_rank import low_rank_of

# Before the name of a layer: of diffusers, of ComfyUI and the original repository, of peft.
PREFIX = re.compile(r"^(base_model\.model\.)?((model\.)?diffusion_model\.|transformer\.|pipe\.dit\.)?")
UNDERSCORED = re.compile(r"^lora_(unet|transformer)_")  # of kohya and musubi: blocks_0_self_attn_q
# After it. Between them peft puts the name of an adapter: lora_A.default.weight.
PAIR = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up)(\.(?!weight|bias)\w+)?(\.(weight|bias))?$")
DIFFERENCE = re.compile(r"(^|\.)(diff|diff_b|diff_m|alpha)$")
SIDES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
# A pattern in a tensor's name -> the kind of file that is not read.
OTHER_KINDS = (
    (r"dora_scale|magnitude_vector", "DoRA, which also scales the norms of the weights"),
    (r"\.lokr_", "LoKr, whose weights are Kronecker products"),
    (r"\.hada_", "LoHa, whose weights are Hadamard products"),
    (r"\.(oft|boft)_", "OFT, which rotates the weights"),
    (r"\.lora_mid", "LoCon with a matrix between the two"),
)
METADATA = "lora_adapter_metadata"  # of the safetensors header that diffusers writes: peft's LoraConfig as JSON
LORA_FILE = "pytorch_lora_weights.safetensors"  # where diffusers looks for one in a folder
CONFIG_FILE = "adapter_config.json"  # the same beside the file, as peft writes it


@dataclasses.dataclass(frozen=True)
class LoraSource:
    """A LoRA that is to be merged: its file or folder, and the factor of its change."""

    path: str
    scale: float = 1.0


@dataclasses.dataclass
class LoraLayer:
    """What a file has for one layer. Matrices are unread; `down` is [rank, in, ...] and `up` [out, rank, ...]."""

    down: LazyTensor | None = None
    up: LazyTensor | None = None
    up_bias: LazyTensor | None = None  # added to the layer's bias, with the pair's factor
    alpha: float | None = None
    diff: LazyTensor | None = None
    diff_b: LazyTensor | None = None
    diff_m: LazyTensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]


def open_lora(path: str) -> tuple[dict[str, LoraLayer], dict[str, Any]]:
    """{a layer's name as in the file, without prefix: its parts}, and peft's config of it, empty if there is none.

    Values of `alpha` are read, matrices are not. Raises InputError, naming the file, where it is missing, is no LoRA or
    one of another kind, or lacks a part of a pair.
    """
    file, config = find_file(path)
    tensors, metadata = open_lora_tensors(file)
    config = config or parse_metadata(metadata, file)
    if config.get("use_dora"):
        raise InputError(f"{file}: expected a LoRA, found a {OTHER_KINDS[0][1]}")
    layers: dict[str, LoraLayer] = {}
    for name, tensor in tensors.items():
        for pattern, kind in OTHER_KINDS:
            if re.search(pattern, name):
                raise InputError(f"{file}: expected a LoRA, found a {kind}: {name}")
        layer, part = layer_and_part(name, file)
        parts = layers.setdefault(layer, LoraLayer())
        if getattr(parts, part) is not None:
            raise InputError(f"{file}: holds {part} of {layer} twice, such as {name}; keep one adapter")
        setattr(parts, part, read_alpha(name, tensor, file) if part == "alpha" else tensor)
    for layer, parts in layers.items():
        check_pair(layer, parts, file)
    if not layers:
        raise InputError(f"{file}: expected a LoRA, found no tensors")
    return layers, config


def find_file(path: str) -> tuple[epath.Path, dict[str, Any]]:
    """The file of a LoRA and, in a folder of peft's, its adapter_config.json."""
    file = epath.Path(path)
    if not file.exists():
        raise InputError(f"--lora={path}: no such file; expected a LoRA's .safetensors")
    if not file.is_dir():
        return file, {}
    found = sorted(file.glob("*.safetensors"))
    if len(found) != 1:
        raise InputError(f"--lora={path}: expected one .safetensors in this folder, found {len(found)}")
    config = file / CONFIG_FILE
    return found[0], read_object(config) if config.exists() else {}


def parse_metadata(metadata: Mapping[str, str], file: epath.Path) -> dict[str, Any]:
    """peft's config in a file's header, where each field has the part's name before it: "transformer.lora_alpha"."""
    try:
        fields = json.loads(metadata.get(METADATA, "{}"))
        return {name.removeprefix("transformer."): value for name, value in fields.items()}
    except (ValueError, AttributeError):
        raise InputError(f"{file}: {METADATA}: expected a config of peft as JSON") from None


def layer_and_part(name: str, file: epath.Path) -> tuple[str, str]:
    """("blocks.0.attn1.to_q", "down") for a tensor's name. Raises InputError for one that is no part of a LoRA."""
    if found := PAIR.search(name):
        side = SIDES[found[1]]
        part = "up_bias" if found[4] == "bias" and side == "up" else side
        return PREFIX.sub("", name[: found.start()]), part
    if found := DIFFERENCE.search(name):
        return PREFIX.sub("", name[: found.start()]), found[2]
    raise InputError(f"{file}: expected a LoRA (lora_A and lora_B, lora_down and lora_up, diff), found {name}")


def check_pair(layer: str, parts: LoraLayer, file: epath.Path) -> None:
    down, up = parts.down, parts.up
    if (down is None) != (up is None):
        there, missing = ("lora_A", "lora_B") if up is None else ("lora_B", "lora_A")
        raise InputError(f"{file}: {layer}: has {there} without {missing}")
    if down is None or up is None:
        return
    if len(down.shape) < 2 or len(up.shape) < 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise InputError(
            f"{file}: {layer}: expected lora_A [rank, in] and lora_B [out, rank] of one rank, found {shapes}"
        )


def pair_factor(layer: str, parts: LoraLayer, config: Mapping[str, Any], file: epath.Path) -> float:
    """alpha / rank: of the file's own `alpha`, otherwise of peft's config; 1 where neither tells."""
    if parts.down is None:
        return 1.0
    if parts.alpha is not None or "lora_alpha" not in config:
        return 1.0 if parts.alpha is None else parts.alpha / parts.rank
    patterns = config.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}
    own = (value for name, value in patterns.items() if f".{layer}".endswith(f".{name}"))
    alpha = next(own, config["lora_alpha"])
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"{file}: lora_alpha of {layer}: expected a number, found {alpha!r}")
    return float(alpha) / (parts.rank**0.5 if config.get("use_rslora") else parts.rank)


def read_alpha(name: str, tensor: LazyTensor, file: epath.Path) -> float:
    values = np.asarray(tensor).reshape(-1)
    if len(values) != 1 or not math.isfinite(values[0]):
        raise InputError(f"{file}: {name}: expected one finite number, found shape {tuple(tensor.shape)}")
    return float(values[0])


def known_layers(blocks: int) -> dict[str, dict[str, tuple[str, int | None]]]:
    """{a layer's name in any layout: {"weight", "bias" or "modulation": (our parameter's path, number of the block)}}.

    Also under names with underscores for dots.
    """
    layers: dict[str, dict[str, tuple[str, int | None]]] = {}
    for layout in ("diffusers", "original"):
        for path, pattern in transformer_names(layout).items():
            if "{j}" in pattern:
                continue
            for block in range(blocks) if "{i}" in pattern else (None,):
                layer, _, leaf = pattern.format(i=block).rpartition(".")
                leaf = leaf if leaf in ("weight", "bias") else "modulation"
                if layer:
                    layers.setdefault(layer, {})[leaf] = path, block
    return layers | {"lora_unet_" + name.replace(".", "_"): parts for name, parts in layers.items()}


def save_low_rank(model: nnx.Module, folder: epath.Path) -> epath.Path:
    """Writes A and B of a model as a LoRA that diffusers' `load_lora_weights` reads from the folder; returns the file.

    The feature maps of an operated model, which are trained beside them, are no part of it.
    """
    names, tensors, rank = transformer_names(), dict[str, np.ndarray](), 0
    for layer, (down_LxIxR, up_LxRxO) in low_rank_of(model).items():
        down, up = np.asarray(down_LxIxR[...]), np.asarray(up_LxRxO[...])
        rank = down.shape[-1]
        for block in range(len(down)):
            name = names[f"{layer}.kernel"].format(i=block).removesuffix(".weight")
            tensors[f"transformer.{name}.lora_A.weight"] = np.ascontiguousarray(down[block].T)
            tensors[f"transformer.{name}.lora_B.weight"] = np.ascontiguousarray(up[block].T)
    targets = sorted({name.removeprefix("transformer.").rpartition(".lora_")[0] for name in tensors})
    config = {"r": rank, "lora_alpha": rank, "target_modules": targets, "lora_bias": False, "use_dora": False}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in config.items()})}
    write_tensors(folder / LORA_FILE, tensors, metadata)
    return folder / LORA_FILE
