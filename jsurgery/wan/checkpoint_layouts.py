"""The names of a checkpoint's tensors in every layout that jsurgery reads or writes.

The transformer's parameters have paths of our own. One table gives each path its name in diffusers and in the original
repository; reading, writing, converting and recognising a file all use it. The path also says how the tensor is
transposed: NNX keeps kernels input-first, torch keeps weights output-first.

The VAE's and the text encoder's parameters have the names of diffusers and transformers already (see `torch_layout`).
For them there are rules from those names to the original repository's.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from flax import nnx

from jsurgery.attention.feature_maps import KEY_MAP, LEAF_NAMES, PROJECTION, QUERY_MAP
from jsurgery.errors import InputError
from jsurgery.io.safetensors import LazyTensor, Tensors
from jsurgery.wan.low_rank import low_rank_of
from jsurgery.wan.models import foreign_tensor
from jsurgery.wan.tensor_prefixes import without_prefix
from jsurgery.wan.torch_layout import check_fit, fill

if TYPE_CHECKING:
    from jsurgery.wan.transformer import WanTransformer

# "comfyui" is "original" with a prefix. "diffusers" is also our own layout: a hybrid adds the tensors of phi to it.
LAYOUTS = ("diffusers", "original", "comfyui")
_COMFYUI_PREFIX = "model.diffusion_model."

# The transformer: our path, diffusers' name, the original repository's name. `{i}` counts blocks, which our parameters
# stack. `{j}` counts the layers of a feature map; only some converted blocks have feature maps, or a projection.
# A row of the first table stands for a kernel and a bias, a row of the second for one array.
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
    *((f"query_maps.{ours}", f"blocks.{{i}}.attn1.{QUERY_MAP}.{stored}", None) for ours, stored in LEAF_NAMES.items()),
    *((f"key_maps.{ours}", f"blocks.{{i}}.attn1.{KEY_MAP}.{stored}", None) for ours, stored in LEAF_NAMES.items()),
    ("projections.kernel", f"blocks.{{i}}.attn1.{PROJECTION}.weight", None),
    ("projections.bias", f"blocks.{{i}}.attn1.{PROJECTION}.bias", None),
)

# The text encoder: a pattern in transformers' name -> what the original repository's name has in its place.
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

# The VAE: likewise from diffusers' name. `original_vae_name` adds the rules for the levels.
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
    (r"\.up_blocks\.", ".upsamples."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.conv_in\.", ".conv1."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
)

# How the tensors' names of other models begin.
_OTHER_MODELS = {
    "encoder.block.": "a UMT5 text encoder",
    "token_embedding.": "a UMT5 text encoder",
    "decoder.": "a VAE",
}

_BLOCK = re.compile(r"\bblocks\.(\d+)\.")
_MAP_LAYER = re.compile(rf"({QUERY_MAP}|{KEY_MAP})\.\d+\.")


def transformer_names(layout: str = "diffusers") -> dict[str, str]:
    """Our parameter path -> the tensor's name in a layout of LAYOUTS, with `{i}` and `{j}` left in."""
    column = {"diffusers": 1, "original": 2, "comfyui": 2}[layout]
    names = {row[0]: name for row in TRANSFORMER_ARRAYS if (name := row[column])}
    for row in TRANSFORMER_LAYERS:
        names |= {f"{row[0]}.kernel": f"{row[column]}.weight", f"{row[0]}.bias": f"{row[column]}.bias"}
    return {path: _COMFYUI_PREFIX + name for path, name in names.items()} if layout == "comfyui" else names


def transformer_layout(names: Iterable[str], source: epath.PathLike = "weights") -> str:
    """The layout, one of LAYOUTS, of a checkpoint whose tensors have these names.

    Raises InputError for anything but a text-to-video Wan transformer, and says what the checkpoint holds instead.
    """
    names = list(names)
    patterns = [_MAP_LAYER.sub(r"\1.{j}.", _BLOCK.sub("blocks.{i}.", name)) for name in names]
    known = {layout: set(transformer_names(layout).values()) for layout in LAYOUTS}
    score = {layout: sum(pattern in known[layout] for pattern in patterns) for layout in LAYOUTS}
    layout = max(score, key=lambda layout: score[layout])
    if not score[layout]:
        kinds = (kind for prefix, kind in _OTHER_MODELS.items() if any(name.startswith(prefix) for name in names))
        actual = next(kinds, f"tensors such as {min(names)}" if names else "no tensor")
        raise InputError(f"{source}: expected the weights of a Wan transformer, found {actual}")
    if other := foreign_tensor(names):
        raise InputError(f"{source}: expected a text-to-video model of Wan2.1, found {other}, which has another task")
    return layout


def transformer_tensors_named(tensors: Mapping[str, LazyTensor], source: epath.PathLike) -> dict[str, LazyTensor]:
    """The tensors of a transformer under diffusers' or the original repository's names; see `tensor_prefixes`."""
    known = {*transformer_names("diffusers").values(), *transformer_names("original").values()}
    pattern = lambda name: _MAP_LAYER.sub(r"\1.{j}.", _BLOCK.sub("blocks.{i}.", name))
    return without_prefix(tensors, lambda name: pattern(name) in known, source)


def transformer_sizes(tensors: Tensors, layout: str, source: epath.PathLike = "weights") -> dict[str, Any]:
    """`dim`, and the fields of WanConfig that follow from the tensors' shapes: all but heads, eps and RoPE's length.

    Raises InputError when a tensor that is needed for this is missing or has the wrong number of axes.
    """
    names = transformer_names(layout)

    def shape(path: str, axes: int) -> tuple[int, ...]:
        name = names[path].format(i=0)
        if name not in tensors:
            raise InputError(f"{source}: missing {name}, whose shape gives the model's size")
        if len(tensors[name].shape) != axes:
            raise InputError(f"{source}: {name} should have {axes} axes, is {tuple(tensors[name].shape)}")
        return tuple(tensors[name].shape)

    dim, in_channels, *patch_size = shape("patch_embedding.kernel", 5)
    blocks = (match for name in tensors if (match := _BLOCK.search(name)))
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
    """Like `transformer_tensors`, but each tensor is fetched from its device when it is used.

    An abstract model has shapes here, and no values. Low-rank changes are added to the weights, in float32.
    """

    def lazy(path: str, slot: int | None, param: nnx.Param) -> LazyTensor:
        def fetch() -> np.ndarray:
            values = np.asarray(param[...] if slot is None else param[slot])
            if path in changes:  # rounded once
                down, up = (np.asarray(side[slot]).astype(np.float64) for side in changes[path])
                values = (values.astype(np.float64) + down @ up).astype(dtype)
            return _transformer_to_torch(path, values, config)

        dtype = np.dtype(np.float32 if path in changes else param.dtype)
        stand_in = np.broadcast_to(0, param.shape if slot is None else param.shape[1:])
        return LazyTensor(_transformer_to_torch(path, stand_in, config).shape, dtype, fetch)

    config = model.config
    changes = {f"{layer}.kernel": sides for layer, sides in low_rank_of(model).items()}
    return {name: lazy(path, slot, param) for name, path, slot, param in _transformer_params(model, layout)}


def load_transformer_tensors(
    model: "WanTransformer", tensors: Tensors, layout: str = "diffusers", source: epath.PathLike = "weights"
) -> None:
    """Fills a WanTransformer in place, which may be abstract (see `abstract_module`).

    Parameters keep their sharding and dtype. Raises InputError, naming `source`, with the missing, unexpected and
    mis-shaped tensors; nothing is filled then.
    """
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
    """The same tensors, unread, under their names in the layout `new` instead of `old`; `model` may be abstract.

    Raises InputError, naming `source`, for tensors that do not fit the model.
    """
    check_fit({name: t.shape for name, t in lazy_transformer_tensors(model, old).items()}, tensors, source)
    both = zip(_transformer_params(model, old), _transformer_params(model, new), strict=True)
    return {after: tensors[before] for (before, *_), (after, *_) in both}


def original_text_encoder_name(name: str) -> str:
    """The original repository's name of a tensor of transformers' UMT5EncoderModel."""
    for pattern, replacement in TEXT_ENCODER_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def original_vae_name(name: str, shortcuts: bool = False) -> str:
    """The original repository's name of a tensor of diffusers' AutoencoderKLWan, with `shortcuts` of Wan2.2's.

    In Wan2.1's, the original's decoder is one list: each level has three residual blocks and an upsampler. In Wan2.2's,
    each level is a list, at whose end the change of size stands.
    """

    def flat(match: re.Match) -> str:
        level, kind, number = match.groups()
        return f".upsamples.{4 * int(level) + (3 if kind == 'upsamplers' else int(number))}."

    if shortcuts:
        name = re.sub(r"\.(down|up)_blocks\.(\d+)\.resnets\.", r".\1_blocks.\2.\1samples.", name)
        name = re.sub(r"\.down_blocks\.(\d+)\.downsampler\.", r".down_blocks.\1.downsamples.2.", name)
        name = re.sub(r"\.up_blocks\.(\d+)\.upsampler\.", r".up_blocks.\1.upsamples.3.", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", flat, name)
    for pattern, replacement in VAE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _transformer_params(model: "WanTransformer", layout: str) -> Iterator[tuple[str, str, int | None, nnx.Param]]:
    """(tensor name, our path, index on the stacked axis or None, parameter) for each tensor of a layout."""
    config = model.config
    if config.hybrid and layout != "diffusers":
        raise InputError(f"a hybrid transformer has no {layout} layout; use diffusers")
    names = transformer_names(layout)
    having: dict[str, Sequence[int]] = {}
    if config.hybrid is not None:
        mapped, projected = config.hybrid.mapped, config.hybrid.projected
        having = {"query_maps": mapped, "key_maps": mapped, "projections": projected}
    for keys, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parts = [str(key) for key in keys]
        path = ".".join(parts)
        pattern = names[".".join("{j}" if part.isdigit() else part for part in parts)]
        layer = next((part for part in parts if part.isdigit()), None)
        if "{i}" not in pattern:
            yield pattern, path, None, param
            continue
        blocks = having.get(parts[0], range(config.num_layers))
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
