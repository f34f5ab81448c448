"""Loads and saves the three models of a Wan pipeline: the transformer, the VAE and the text encoder.

Every folder that is written here ends with its hashes, and every folder that has hashes is checked against them before
it is loaded (see `folder_hashes`).
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from jsurgery.attention.feature_maps import PROJECTION, QUERY_MAP
from jsurgery.errors import InputError
from jsurgery.io.files import read_object, write_json
from jsurgery.io.safetensors import SHARD_BYTES, LazyTensor, Tensors, open_tensors, write_shards, write_tensors
from jsurgery.runtime.mesh import parameter_shardings
from jsurgery.wan import checkpoint_layouts
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.folder_hashes import check_hashes, dangling_link, write_hashes
from jsurgery.wan.lora import with_loras
from jsurgery.wan.lora_file import LoraSource
from jsurgery.wan.model_config import (
    CLASS_NAME,
    HYBRID_CLASS_NAME,
    ORIGINAL_CLASS_NAME,
    ORIGINAL_SIZES,
    TextEncoderConfig,
    WanConfig,
    read_text_encoder_config,
    read_vae_config,
)
from jsurgery.wan.models import original_type, task_of
from jsurgery.wan.tensor_prefixes import without_prefix
from jsurgery.wan.text_encoder import TextEncoder
from jsurgery.wan.torch_layout import check_fit, load_mirrored, mirrored_shapes, mirrored_tensors
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.vae import WanVae

EMBEDDINGS = "encoder.embed_tokens.weight"


def read_config(path: epath.PathLike, tensors: Mapping[str, LazyTensor] | None = None) -> WanConfig:
    """The config of a transformer's folder or file, in any layout. `tensors` are its unread tensors, if they are open.

    It is read from a config.json in the folder or beside the file: diffusers', ours or the original repository's.
    Without a config.json it follows from the tensors' shapes, except for the number of heads. Heads are then taken to
    have 128 channels, as in the published models. Raises InputError for another architecture, or when the config does
    not follow from the tensors.
    """
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected a transformer")
    file = (path if path.is_dir() else path.parent) / "config.json"
    if fault := dangling_link(file):
        raise InputError(f"{file}: {fault}")
    fields = read_object(file) if file.exists() else {}
    class_name = fields.get("_class_name")
    if class_name in (CLASS_NAME, HYBRID_CLASS_NAME):
        return WanConfig.from_json(fields, source=str(file))

    tensors = _open_transformer(path, tensors)
    layout = checkpoint_layouts.transformer_layout(tensors, path)
    if path.is_dir() and class_name not in (None, ORIGINAL_CLASS_NAME):
        expected = f"{CLASS_NAME}, {HYBRID_CLASS_NAME} or {ORIGINAL_CLASS_NAME}"
        raise InputError(f"{file}: expected _class_name {expected}, found {class_name!r}{task_of(class_name)}")
    if any(f".{added}." in name for name in tensors for added in (QUERY_MAP, PROJECTION)):
        raise InputError(f"{path}: a hybrid transformer without its config.json; expected {file}")
    sizes = checkpoint_layouts.transformer_sizes(tensors, layout, path)
    if class_name != ORIGINAL_CLASS_NAME and not path.is_dir():
        fields = {}  # the config.json beside the file is another model's
    heads = _check_original(fields, sizes, file)
    sizes["eps"] = fields.get("eps", WanConfig.eps)
    dim = sizes.pop("dim")
    if heads is None and dim % 128:
        raise InputError(f"{path}: a width of {dim} is not heads of 128 channels; expected the heads in {file}")
    heads = heads or dim // 128
    return WanConfig(num_attention_heads=heads, attention_head_dim=dim // heads, **sizes)


def load_transformer(
    path: epath.PathLike,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    *,
    inference: bool = False,
    loras: Sequence[LoraSource] = (),
) -> WanTransformer:
    """A transformer from a folder or .safetensors file: diffusers', the original repository's, ComfyUI's or ours.

    `dtype` is that of matmuls. Parameters are float32, as training needs them; for `inference` the weights of matmuls
    are stored in `dtype`, with the same results. Tensors are memory-mapped and moved one by one to their devices of the
    mesh; `loras` are merged into each. Raises InputError naming the file that is missing, damaged or does not fit.
    """
    check_hashes(path)
    tensors = _open_transformer(path)
    config = read_config(path, tensors)
    model = abstract_module(WanTransformer, config, dtype=jnp.dtype(dtype))
    if inference:
        model.store_in_compute_dtype()
    if mesh is not None:
        state = nnx.state(model)
        placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        nnx.update(model, jax.tree.map(placed, state, parameter_shardings(mesh, state)))
    layout = checkpoint_layouts.transformer_layout(tensors, path)
    if loras:
        tensors = with_loras(tensors, config, layout, loras, np.float32)
    checkpoint_layouts.load_transformer_tensors(model, tensors, layout, source=path)
    return model


def open_transformer(
    path: epath.PathLike,
    layout: str = "diffusers",
    tensors: Mapping[str, LazyTensor] | None = None,
    loras: Sequence[LoraSource] = (),
) -> tuple[WanConfig, Tensors]:
    """The config and the unread tensors of a transformer, which get the names of `layout`, whatever theirs are.

    `tensors` are those of a file that is open already. `loras` are merged into each when it is read.
    Raises InputError as `load_transformer` does, and for a hybrid in a layout other than "diffusers".
    """
    check_hashes(path)
    tensors = _open_transformer(path, tensors)
    config = read_config(path, tensors)
    model = abstract_module(WanTransformer, config)
    stored = checkpoint_layouts.transformer_layout(tensors, path)
    if loras:
        tensors = with_loras(tensors, config, stored, loras)
    return config, checkpoint_layouts.renamed_transformer(model, tensors, stored, layout, path)


def save_transformer(
    transformer: WanTransformer,
    path: epath.PathLike,
    layout: str = "diffusers",
    shard_bytes: int = SHARD_BYTES,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes a transformer for `load_transformer`, in shards above `shard_bytes`; `more` holds further config fields.

    The layout "diffusers" is a folder, which diffusers reads too unless the transformer is a hybrid. "original" is a
    folder like the original repository's, "comfyui" a single file. Raises InputError for a hybrid in a layout other
    than "diffusers".
    """
    tensors = checkpoint_layouts.lazy_transformer_tensors(transformer, layout)
    write_transformer(tensors, transformer.config, path, layout, shard_bytes, more)


def write_transformer(
    tensors: Tensors,
    config: WanConfig,
    path: epath.PathLike,
    layout: str,
    shard_bytes: int = SHARD_BYTES,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes a transformer's tensors, which have their names in `layout`; otherwise like `save_transformer`.

    Whatever class config.json names, diffusers loads a file of its usual name and drops the tensors that it does not
    know. A hybrid's file therefore has a name that diffusers does not look for.
    """
    path = epath.Path(path)
    if layout == "comfyui":
        if config.attention_head_dim != 128:
            raise InputError(f"{path}: ComfyUI's layout takes heads of 128 channels, found {config.attention_head_dim}")
        listed = {"loras": json.dumps(more["loras"])} if more and "loras" in more else {}
        write_tensors(path, tensors, listed)
        return
    stem = "hybrid_wan" if config.hybrid else "diffusion_pytorch_model"
    hashes = write_shards(path, stem, tensors, shard_bytes)
    fields = config.to_json()
    if layout == "original":
        fields = {"_class_name": ORIGINAL_CLASS_NAME, "model_type": original_type(config.in_channels)}
        fields |= {"text_len": 512, "eps": config.eps}
        fields |= {original: getattr(config, name) for name, original in ORIGINAL_SIZES.items()}
        fields["num_heads"] = config.num_attention_heads
    write_json(path / "config.json", {**(more or {}), **fields})
    write_hashes(path, hashes, "config.json")


def load_vae(path: epath.PathLike, dtype: jnp.dtype = jnp.float32) -> WanVae:
    """The VAE in a diffusers `vae/` folder, config.json and safetensors.

    `dtype` is that of parameters and computation. Raises InputError naming the file that is missing, damaged or of
    another architecture.
    """
    check_hashes(path)
    config = read_vae_config(path)
    vae = abstract_module(WanVae, config)
    tensors = without_prefix(open_tensors(path), mirrored_shapes(vae).__contains__, path)
    load_mirrored(vae, tensors, dtype=dtype, source=path)
    return vae


def save_vae(vae: WanVae, path: epath.PathLike) -> None:
    """Writes the folder that `load_vae` and diffusers' AutoencoderKLWan.from_pretrained read."""
    path = epath.Path(path)
    hashes = write_shards(path, "diffusion_pytorch_model", mirrored_tensors(vae))
    write_json(path / "config.json", vae.config.to_json())
    write_hashes(path, hashes, "config.json")


def load_text_encoder(path: epath.PathLike, dtype: jnp.dtype = jnp.float32) -> TextEncoder:
    """The encoder in a `text_encoder/` folder: config.json, and safetensors in one file or in shards with an index.

    `dtype` is that of parameters and computation. Raises InputError naming the file that is missing, damaged or of
    another architecture. `PromptEmbedder` computes embeddings without loading all of it.
    """
    check_hashes(path)
    config, tensors = open_text_encoder(path)
    encoder = abstract_module(TextEncoder, config)
    load_mirrored(encoder, tensors, dtype=dtype, source=path)
    return encoder


def open_text_encoder(path: epath.PathLike) -> tuple[TextEncoderConfig, dict[str, LazyTensor]]:
    """The config and the unread tensors of a `text_encoder/` folder. Raises InputError as `load_text_encoder` does."""
    folder = epath.Path(path)
    config, tensors = read_text_encoder_config(folder), open_tensors(folder)
    expected = _mirrored(TextEncoder, config)
    tensors = text_encoder_tensors_named(tensors, {*expected, EMBEDDINGS}.__contains__, folder)
    check_fit(expected, tensors, folder)
    return config, tensors


def text_encoder_tensors_named(
    tensors: Mapping[str, LazyTensor], known: Callable[[str], bool], source: epath.PathLike
) -> dict[str, LazyTensor]:
    """The tensors of a UMT5 encoder under the names of transformers, with `shared.weight` alone for the embeddings.

    ComfyUI's file also holds the tokenizer, as numbers, which is left out.
    """
    named = without_prefix({name: t for name, t in tensors.items() if name != "spiece_model"}, known, source)
    embeddings = named.pop(EMBEDDINGS, None)  # a second name of shared.weight, or the only one
    if embeddings is not None:
        named.setdefault("shared.weight", embeddings)
    return named


def save_text_encoder(encoder: TextEncoder, path: epath.PathLike) -> None:
    """Writes the folder that `load_text_encoder` and transformers' UMT5EncoderModel.from_pretrained read."""
    folder = epath.Path(path)
    hashes = write_shards(folder, "model", mirrored_tensors(encoder))
    write_json(folder / "config.json", encoder.config.to_json())
    write_hashes(folder, hashes, "config.json")


def check_fits(transformer: epath.PathLike, base: epath.PathLike) -> None:
    """Raises InputError where loading a transformer, or the VAE and the text encoder of `base`, would: for tensors that
    are missing, unexpected or of another shape. Reads only headers."""
    tensors = _open_transformer(transformer)
    layout = checkpoint_layouts.transformer_layout(tensors, transformer)
    check_fit(_transformer_shapes(read_config(transformer, tensors), layout), tensors, transformer)
    vae, text_encoder = epath.Path(base) / "vae", epath.Path(base) / "text_encoder"
    expected = _mirrored(WanVae, read_vae_config(vae))
    check_fit(expected, without_prefix(open_tensors(vae), expected.__contains__, vae), vae)
    open_text_encoder(text_encoder)


@functools.lru_cache(16)
def _transformer_shapes(config: WanConfig, layout: str) -> dict[str, tuple[int, ...]]:
    model = abstract_module(WanTransformer, config)
    return {name: t.shape for name, t in checkpoint_layouts.lazy_transformer_tensors(model, layout).items()}


@functools.lru_cache(16)
def _mirrored(kind: type[nnx.Module], config: Any) -> dict[str, tuple[int, ...]]:
    return mirrored_shapes(abstract_module(kind, config))


def _open_transformer(path: epath.PathLike, tensors: Mapping[str, LazyTensor] | None = None) -> dict[str, LazyTensor]:
    return checkpoint_layouts.transformer_tensors_named(open_tensors(path) if tensors is None else tensors, path)


def _check_original(fields: dict[str, Any], sizes: dict[str, Any], file: epath.Path) -> int | None:
    """The number of heads in the original repository's config.json, or None where it is not given.

    Raises InputError where the file contradicts `sizes`, those of the tensors.
    """
    expected_fields = {original: sizes[name] for name, original in ORIGINAL_SIZES.items()}
    expected_fields["model_type"] = original_type(sizes["in_channels"])
    for name, expected in expected_fields.items():
        if (actual := fields.get(name, expected)) != expected:
            task = task_of(actual) if name == "model_type" else ""
            raise InputError(f"{file}: {name}: expected {expected!r}, as its tensors are, found {actual!r}{task}")
    heads = fields.get("num_heads")
    if heads is not None and (not isinstance(heads, int) or heads < 1 or sizes["dim"] % heads):
        raise InputError(f"{file}: num_heads: expected a divisor of {sizes['dim']}, found {heads!r}")
    return heads
