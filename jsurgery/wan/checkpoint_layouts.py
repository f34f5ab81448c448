"""Tensor names and shapes of checkpoints, and NNX modules filled from them and written out under them.

A module *mirrors* a reference checkpoint when its attribute path is the tensor's name ("encoder.down_blocks.0.conv1").
Only leaves differ: NNX keeps kernels input-first and channels last, torch keeps weights output-first. The transformer's
names differ more: one table serves both ways and all layouts.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from flax import nnx

from jsurgery.errors import InputError
from jsurgery.io.safetensors import LazyTensor, Tensors
from jsurgery.wan.torch_layout import check_fit, fill

if TYPE_CHECKING:
    from jsurgery.wan.transformer import WanTransformer


# The transformer. Ours, diffusers' name, the original repository's name; `{i}` counts blocks, which ours keeps stacked,
# `{j}` the layers of a feature map, of which each converted block has its own. A layer is a kernel and a bias.
TRANSFORMER_LAYERS = (
    ("patch_embedding", "patch_embedding", "patch_embedding"),
    ("condition.text_in", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition.text_out", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition.time_in", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition.time_out", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition.time_proj", "condition_embedder.time_proj", "time_projection.1"),
    ("blocks.attn1.to_q", "blocks.{i}.attn1.to_q", "blocks.{i}.self_attn.q"),
    ("blocks.attn1.to_k", "blocks.{i}.attn1.to_k", "blocks.{i}.self_attn.k"),
    ("blocks.attn1.to_v", "blocks.{i}.attn1.to_v", "blocks.{i}.self_attn.v"),
    ("blocks.attn1.to_out", "blocks.{i}.attn1.to_out.0", "blocks.{i}.self_attn.o"),
    ("blocks.attn2.to_q", "blocks.{i}.attn2.to_q", "blocks.{i}.cross_attn.q"),
    ("blocks.attn2.to_k", "blocks.{i}.attn2.to_k", "blocks.{i}.cross_attn.k"),
    ("blocks.attn2.to_v", "blocks.{i}.attn2.to_v", "blocks.{i}.cross_attn.v"),
    ("blocks.attn2.to_out", "blocks.{i}.attn2.to_out.0", "blocks.{i}.cross_attn.o"),
    ("blocks.ffn_in", "blocks.{i}.ffn.net.0.proj", "blocks.{i}.ffn.0"),
    ("blocks.ffn_out", "blocks.{i}.ffn.net.2", "blocks.{i}.ffn.2"),
    ("proj_out", "proj_out", "head.head"),
)
TRANSFORMER_ARRAYS = (
    ("blocks.attn1.norm_q", "blocks.{i}.attn1.norm_q.weight", "blocks.{i}.self_attn.norm_q.weight"),
    ("blocks.attn1.norm_k", "blocks.{i}.attn1.norm_k.weight", "blocks.{i}.self_attn.norm_k.weight"),
    ("blocks.attn2.norm_q", "blocks.{i}.attn2.norm_q.weight", "blocks.{i}.cross_attn.norm_q.weight"),
    ("blocks.attn2.norm_k", "blocks.{i}.attn2.norm_k.weight", "blocks.{i}.cross_attn.norm_k.weight"),
    ("blocks.norm2_scale", "blocks.{i}.norm2.weight", "blocks.{i}.norm3.weight"),
    ("blocks.norm2_bias", "blocks.{i}.norm2.bias", "blocks.{i}.norm3.bias"),
    ("blocks.scale_shift_table", "blocks.{i}.scale_shift_table", "blocks.{i}.modulation"),
    ("scale_shift_table", "scale_shift_table", "head.modulation"),
    ("query_maps.kernels.{j}", "blocks.{i}.attn1.phi_q.{j}.kernel", None),
    ("query_maps.biases.{j}", "blocks.{i}.attn1.phi_q.{j}.bias", None),
    ("query_maps.log_scale", "blocks.{i}.attn1.phi_q.log_scale", None),
    ("key_maps.kernels.{j}", "blocks.{i}.attn1.phi_k.{j}.kernel", None),
    ("key_maps.biases.{j}", "blocks.{i}.attn1.phi_k.{j}.bias", None),
    ("key_maps.log_scale", "blocks.{i}.attn1.phi_k.log_scale", None),
)


# ComfyUI's files are the original repository's with a prefix; ours are diffusers', with the tensors of phi in a hybrid.
LAYOUTS = ("diffusers", "original", "comfyui")
_COMFYUI_PREFIX = "model.diffusion_model."

# What a file without the transformer's tensors is, by how a tensor's name begins; and the models that Wan also made.
_FOREIGN = {
    "encoder.block.": "a UMT5 text encoder",
    "token_embedding.": "a UMT5 text encoder",
    "decoder.": "a VAE",
}
_OTHER_TASKS = re.compile(r"img_emb|image_embedder|k_img|add_k_proj|vace|control_adapter|ref_conv")


def transformer_names(layout: str = "diffusers") -> dict[str, str]:
    """Our parameter path -> the tensor name of one of LAYOUTS, with `{i}` and `{j}` left in."""
    column = {"diffusers": 1, "original": 2, "comfyui": 2}[layout]
    names = {row[0]: name for row in TRANSFORMER_ARRAYS if (name := row[column])}
    for row in TRANSFORMER_LAYERS:
        names |= {f"{row[0]}.kernel": f"{row[column]}.weight", f"{row[0]}.bias": f"{row[column]}.bias"}
    return {path: _COMFYUI_PREFIX + name for path, name in names.items()} if layout == "comfyui" else names


def transformer_layout(names: Iterable[str], source: epath.PathLike = "weights") -> str:
    """Which of LAYOUTS a checkpoint has, by its tensors' names.

    Raises InputError, saying what it is instead, for a checkpoint that is not a text-to-video Wan transformer.
    """
    names = list(names)
    patterns = [re.sub(r"(phi_[qk])\.\d+\.", r"\1.{j}.", re.sub(r"\bblocks\.\d+\.", "blocks.{i}.", n)) for n in names]
    known = {layout: set(transformer_names(layout).values()) for layout in LAYOUTS}
    score = {layout: sum(pattern in known[layout] for pattern in patterns) for layout in LAYOUTS}
    layout = max(score, key=lambda layout: score[layout])
    if not score[layout]:
        found = next((kind for begin, kind in _FOREIGN.items() for n in names if n.startswith(begin)), None)
        found = found or (f"tensors such as {min(names)}" if names else "no tensor")
        raise InputError(f"{source}: expected the weights of a Wan transformer, found {found}")
    if other := next((name for name in names if _OTHER_TASKS.search(name)), None):
        raise InputError(f"{source}: holds {other}: not a text-to-video model of Wan2.1, which is all that is read")
    return layout


def transformer_sizes(tensors: Tensors, layout: str, source: epath.PathLike = "weights") -> dict[str, Any]:
    """The fields of WanConfig that the tensors' shapes tell, and `dim`: all but heads, eps and RoPE's length.

    Raises InputError where one that tells is missing or has not the axes that it should.
    """
    names = transformer_names(layout)

    def shape(path: str, axes: int) -> tuple[int, ...]:
        name = names[path].format(i=0)
        if name not in tensors:
            raise InputError(f"{source}: missing {name}, which would tell the model's size")
        if len(tensors[name].shape) != axes:
            raise InputError(f"{source}: {name} should have {axes} axes, is {tuple(tensors[name].shape)}")
        return tuple(tensors[name].shape)

    dim, in_channels, *patch_size = shape("patch_embedding.kernel", 5)
    blocks = (match for name in tensors if (match := re.search(r"\bblocks\.(\d+)\.", name)))
    return {
        "dim": dim,
        "patch_size": tuple(patch_size),
        "in_channels": in_channels,
        "out_channels": shape("proj_out.kernel", 2)[0] // math.prod(patch_size),
        "text_dim": shape("condition.text_in.kernel", 2)[1],
        "freq_dim": shape("condition.time_in.kernel", 2)[1],
        "ffn_dim": shape("blocks.ffn_in.kernel", 2)[0],
        "num_layers": 1 + max(int(match[1]) for match in blocks),
        "cross_attn_norm": names["blocks.norm2_scale"].format(i=0) in tensors,
    }


def transformer_tensors(model: "WanTransformer", layout: str = "diffusers") -> dict[str, np.ndarray]:
    """The parameters of a WanTransformer under a layout's names and shapes."""
    return {name: np.asarray(tensor) for name, tensor in lazy_transformer_tensors(model, layout).items()}


def lazy_transformer_tensors(model: "WanTransformer", layout: str = "diffusers") -> dict[str, LazyTensor]:
    """Like `transformer_tensors`, each fetched from its device when it is used; shapes also of an abstract model."""

    def lazy(path: str, slot: int | None, param: nnx.Param) -> LazyTensor:
        fetch = lambda: _transformer_to_torch(path, np.asarray(param[...] if slot is None else param[slot]), config)
        stand_in = np.broadcast_to(0, param.shape if slot is None else param.shape[1:])
        return LazyTensor(_transformer_to_torch(path, stand_in, config).shape, np.dtype(param.dtype), fetch)

    config = model.config
    return {name: lazy(path, slot, param) for name, path, slot, param in _transformer_params(model, layout)}


def load_transformer_tensors(
    model: "WanTransformer", tensors: Tensors, layout: str = "diffusers", source: epath.PathLike = "weights"
) -> None:
    """Fills a WanTransformer, which may be abstract (from nnx.eval_shape); otherwise like `load_mirrored`."""
    expected = {name: tensor.shape for name, tensor in lazy_transformer_tensors(model, layout).items()}
    check_fit(expected, tensors, source)
    grouped: dict[str, tuple[nnx.Param, bool, list[np.ndarray | LazyTensor]]] = {}
    for name, path, slot, param in _transformer_params(model, layout):
        grouped.setdefault(path, (param, slot is not None, []))[2].append(tensors[name])
    for path, (param, stacked, sources) in grouped.items():
        from_torch = functools.partial(_transformer_from_torch, path, config=model.config)
        fill(param, sources, from_torch, stacked=stacked)


def renamed_transformer(
    model: "WanTransformer", tensors: Tensors, old: str, new: str, source: epath.PathLike = "weights"
) -> Tensors:
    """The same tensors, untouched, under the names of another layout; `model` may be abstract."""
    check_fit({name: t.shape for name, t in lazy_transformer_tensors(model, old).items()}, tensors, source)
    both = zip(_transformer_params(model, old), _transformer_params(model, new), strict=True)
    return {after: tensors[before] for (before, *_), (after, *_) in both}


def _transformer_params(model: "WanTransformer", layout: str) -> Iterator[tuple[str, str, int | None, nnx.Param]]:
    """(tensor name, our path, index on the stacked axis or None, parameter) for each tensor of the layout."""
    config = model.config
    if config.hybrid and layout != "diffusers":
        raise InputError(f"a hybrid transformer has no {layout} layout; use diffusers")
    names = transformer_names(layout)
    converted = config.hybrid.converted if config.hybrid else ()
    for keys, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parts = [str(key) for key in keys]
        path = ".".join(parts)
        pattern = names[".".join("{j}" if part.isdigit() else part for part in parts)]
        layer = next((part for part in parts if part.isdigit()), None)
        if "{i}" not in pattern:
            yield pattern, path, None, param
            continue
        blocks = range(config.num_layers) if parts[0] == "blocks" else converted
        for slot, block in enumerate(blocks):
            yield pattern.format(i=block, j=layer), path, slot, param


def _transformer_to_torch(path: str, array: np.ndarray, config: Any) -> np.ndarray:
    if path == "patch_embedding.kernel":
        return array.reshape(*config.patch_size, config.in_channels, config.dim).transpose(4, 3, 0, 1, 2)
    if path.endswith("scale_shift_table"):
        return array[None]
    return array.T if path.endswith(".kernel") else array


def _transformer_from_torch(path: str, array: np.ndarray, config: Any) -> np.ndarray:
    if path == "patch_embedding.kernel":
        return array.transpose(2, 3, 4, 1, 0).reshape(-1, config.dim)
    if path.endswith("scale_shift_table"):
        return array[0]
    return array.T if path.endswith(".kernel") else array


# transformers' name -> the original repository's.
TEXT_ENCODER_NAMES = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.(\d+)\.", r"blocks.\1."),
    (r"layer\.0\.SelfAttention\.relative_attention_bias\.", "pos_embedding.embedding."),
    (r"layer\.0\.SelfAttention\.", "attn."),
    (r"layer\.0\.layer_norm\.", "norm1."),
    (r"layer\.1\.layer_norm\.", "norm2."),
    (r"layer\.1\.DenseReluDense\.wi_0\.", "ffn.gate.0."),
    (r"layer\.1\.DenseReluDense\.wi_1\.", "ffn.fc1."),
    (r"layer\.1\.DenseReluDense\.wo\.", "ffn.fc2."),
)


# diffusers' name -> the original repository's; `original_vae_name` adds the rule for the decoder's levels.
VAE_NAMES = (
    (r"(\.\d+)\.norm1\.", r"\1.residual.0."),
    (r"(\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"(\.\d+)\.norm2\.", r"\1.residual.3."),
    (r"(\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.conv_in\.", ".conv1."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
)


def original_text_encoder_name(name: str) -> str:
    """The original repository's name of a tensor of transformers' UMT5EncoderModel."""
    for pattern, replacement in TEXT_ENCODER_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def original_vae_name(name: str) -> str:
    """The original repository's name of a tensor of diffusers' AutoencoderKLWan."""

    def flat(match: re.Match) -> str:
        """The original's decoder is one list: three residual blocks and an upsampler a level."""
        level, kind, number = match.groups()
        return f".upsamples.{4 * int(level) + (3 if kind == 'upsamplers' else int(number))}."

    name = re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", flat, name)
    for pattern, replacement in VAE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
