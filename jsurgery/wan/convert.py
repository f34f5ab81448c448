"""Converts checkpoints from one layout to another, tensor by tensor, without a change to values or types.

The original repository publishes its VAE and text encoder as pickles. torch reads them, restricted to tensors.
"""

import dataclasses
import functools
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx

from jsurgery.errors import InputError
from jsurgery.io.files import check_writable, damaged, matching, read_object, write_json
from jsurgery.io.foreign_tensors import foreign_format
from jsurgery.io.safetensors import LazyTensor, Tensors, open_tensors, write_shards
from jsurgery.wan import hub, torch_layout
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.checkpoint import open_transformer, read_config, text_encoder_tensors_named, write_transformer
from jsurgery.wan.checkpoint_layouts import original_text_encoder_name, original_vae_name
from jsurgery.wan.folder_hashes import check_hashes, write_hashes
from jsurgery.wan.lora import describe_loras, say_operated
from jsurgery.wan.lora_file import LoraSource
from jsurgery.wan.model_config import TextEncoderConfig, VaeConfig
from jsurgery.wan.models import VAE_5B, takes_image
from jsurgery.wan.pipeline_parts import check_index, write_pipeline_index
from jsurgery.wan.tell_model import kind_that_fits, sampler_of
from jsurgery.wan.tensor_prefixes import shortest_prefix
from jsurgery.wan.text_encoder import TextEncoder
from jsurgery.wan.tokenizer import Tokenizer
from jsurgery.wan.vae import WanVae

PICKLES = (".pth", ".pt", ".bin", ".ckpt")


def convert(
    model: str, output: epath.PathLike, layout: str = "diffusers", loras: Sequence[LoraSource] = (), kind: str = ""
) -> epath.Path:
    """Writes the transformer at `model` in another layout ("diffusers", "original", "comfyui") and returns `output`.

    `model` is a transformer's folder or file, a pipeline folder, or a repository id. It may also be a file of the VAE
    or text encoder, named as in the original repository, diffusers or transformers (ComfyUI has these names too), which
    becomes a folder; or the folder of the original repository, which becomes a pipeline folder. Files may be
    safetensors or pickles of tensors. `loras` are merged into a transformer's weights, and its config.json lists them.
    `kind` says which row of `wan/models.py` comes out: its own sampler, if it has one, goes into config.json.
    Raises InputError for a model that cannot be converted, and for an output that exists already.
    """
    source, output = epath.Path(hub.local_path(model)), epath.Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"--output={output}: is there already; name a new {'folder' if output.is_dir() else 'file'}")
    if (layout == "comfyui") != (output.suffix == ".safetensors"):
        expected = "a name that ends in .safetensors" if layout == "comfyui" else "the name of a folder"
        raise InputError(f"--output={output}: --layout={layout} takes {expected}")
    if (source / "transformer").exists():
        check_index(source)
        source = source / "transformer"

    if kind and layout != "diffusers":
        raise InputError(f"--kind={kind}: expected --layout=diffusers, whose config.json says how to sample")
    parts = original_parts(source) if layout == "diffusers" else None
    changes = Changes(tuple(loras), kind)
    write = _open_pipeline(source, *parts, changes) if parts else _open_part(source, layout, changes)
    if not output.is_dir():
        check_writable(output, "--output")
    write(output)
    return output


def original_parts(source: epath.Path) -> tuple[epath.Path, epath.Path, epath.Path] | None:
    """The files of the VAE, the text encoder and the tokenizer of an original repository's folder; None without all."""
    patterns = "*VAE*.pth", "models_t5*.pth", "google/*/spiece.model"
    found = [matching(source, pattern) if source.is_dir() else [] for pattern in patterns]
    vae, text_encoder, tokenizer = (files[0] if files else None for files in found)
    return (vae, text_encoder, tokenizer) if vae and text_encoder and tokenizer else None


@dataclasses.dataclass(frozen=True)
class Changes:
    """What becomes of a transformer besides its layout: LoRAs to merge, and the kind of model that comes out."""

    loras: tuple[LoraSource, ...] = ()
    kind: str = ""

    def check_none(self, source: epath.Path) -> None:
        """Raises InputError if there are any, since `source` is no transformer."""
        if self.loras or self.kind:
            flag = "--lora changes" if self.loras else "--kind is about"
            raise InputError(f"{source}: not a transformer, which is all that {flag}")


# The functions below read what tells whether a model can be converted, and return a function that writes it to a path.
Write = Callable[[epath.Path], None]


def _open_pipeline(
    source: epath.Path,
    vae: epath.Path,
    text_encoder: epath.Path,
    tokenizer: epath.Path,
    changes: Changes,
) -> Write:
    parts = {"transformer": _open_part(source, "diffusers", changes)}
    parts |= {name: _open_part(file, "diffusers") for name, file in (("vae", vae), ("text_encoder", text_encoder))}
    Tokenizer(tokenizer.parent)

    def write(output: epath.Path) -> None:
        for name, write_part in parts.items():
            write_part(output / name)
        (output / "tokenizer").mkdir(parents=True, exist_ok=True)
        tokenizer.copy(output / "tokenizer" / tokenizer.name)
        write_hashes(output / "tokenizer", {}, tokenizer.name)
        with_image = takes_image(read_config(output / "transformer").in_channels)
        write_pipeline_index(output, shift=5.0 if with_image else 3.0, takes_image=with_image)

    return write


def _open_part(source: epath.Path, layout: str, changes: Changes = Changes()) -> Write:
    check_hashes(source)
    tensors = _open_pickle(source) if source.suffix in PICKLES else open_tensors(source)
    if not source.is_dir():
        for names, to_diffusers in PARTS:
            known = re.compile(names).match
            plain = {name: tensor for name, tensor in tensors.items() if name != "spiece_model"}
            if shortest_prefix(list(plain), lambda name, known=known: known(name) is not None) is not None:
                if layout != "diffusers":
                    raise InputError(f"{source}: not a transformer, which is all that --layout={layout} is for")
                named = text_encoder_tensors_named(plain, lambda name, known=known: known(name) is not None, source)
                changes.check_none(source)
                return to_diffusers(named, source)
    return _transformer(tensors, source, layout, changes)


def _transformer(tensors: Mapping[str, LazyTensor], source: epath.Path, layout: str, changes: Changes) -> Write:
    config, renamed = open_transformer(source, layout, tensors, changes.loras)
    # A hybrid's config also says where its VAE and text encoder are.
    more = read_object(source / "config.json") if config.hybrid else {}
    if changes.loras:
        say_operated(config, *changes.loras)
        more |= {"loras": more.get("loras", []) + describe_loras(changes.loras)}
    if changes.kind:
        more |= sampler_of(kind_that_fits(changes.kind, config, str(source)))
    return lambda output: write_transformer(renamed, config, output, layout, more=more)


def _text_encoder(tensors: Tensors, source: epath.Path) -> Write:
    shape = lambda name: _shape(tensors, name, source)
    (vocab_size, d_model), (d_ff, _) = shape("token_embedding.weight"), shape("blocks.0.ffn.fc1.weight")
    num_buckets, num_heads = shape("blocks.0.pos_embedding.embedding.weight")
    config = TextEncoderConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=shape("blocks.0.attn.q.weight")[0] // num_heads,
        d_ff=d_ff,
        num_heads=num_heads,
        num_layers=1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))),
        relative_attention_num_buckets=num_buckets,
    )
    renamed = _renamed(abstract_module(TextEncoder, config), original_text_encoder_name, tensors, source)
    return functools.partial(_write_part, "model", renamed, config)


def _vae(tensors: Tensors, source: epath.Path) -> Write:
    # The file has no mean and std of the latents, so they are the published ones, and only as many channels fit.
    shortcuts = any(re.match(r"encoder\.downsamples\.\d+\.downsamples\.", name) for name in tensors)
    fields: dict[str, Any] = {"base_dim": _shape(tensors, "encoder.conv1.weight", source, axes=5)[0]}
    if shortcuts:
        decoder_width = _shape(tensors, "decoder.conv1.weight", source, axes=5)[0] // VaeConfig.dim_mult[-1]
        fields = VAE_5B | fields | {"decoder_base_dim": decoder_width}
    config = VaeConfig(**fields)
    original_name = functools.partial(original_vae_name, shortcuts=shortcuts)
    renamed = _renamed(abstract_module(WanVae, config), original_name, tensors, source)
    return functools.partial(_write_part, "diffusion_pytorch_model", renamed, config)


def _write_part(stem: str, tensors: Tensors, config: TextEncoderConfig | VaeConfig, output: epath.Path) -> None:
    hashes = write_shards(output, stem, tensors)
    write_json(output / "config.json", config.to_json())
    write_hashes(output, hashes, "config.json")


def _text_encoder_of_transformers(tensors: Tensors, source: epath.Path) -> Write:
    return _text_encoder({original_text_encoder_name(name): tensor for name, tensor in tensors.items()}, source)


def _vae_of_diffusers(tensors: Tensors, source: epath.Path) -> Write:
    shortcuts = any(".downsampler." in name for name in tensors)
    return _vae({original_vae_name(name, shortcuts): tensor for name, tensor in tensors.items()}, source)


# How the names of a part's tensors begin: the original repository's, and those of transformers and diffusers.
PARTS = (
    (r"token_embedding\.|norm\.weight|blocks\.\d+\.(attn|ffn|norm1|norm2|pos_embedding)\.", _text_encoder),
    (r"(en|de)coder\.(conv1|middle|downsamples|upsamples|head)\.|conv[12]\.", _vae),
    (r"shared\.|encoder\.(block|final_layer_norm|embed_tokens)\.", _text_encoder_of_transformers),
    (
        r"(en|de)coder\.(conv_in|conv_out|norm_out|mid_block|down_blocks|up_blocks)\.|(post_)?quant_conv\.",
        _vae_of_diffusers,
    ),
)


def _shape(tensors: Tensors, name: str, source: epath.Path, axes: int = 2) -> tuple[int, ...]:
    if name not in tensors or len(tensors[name].shape) != axes:
        raise InputError(f"{source}: missing {name} of {axes} axes, whose shape gives the model's size")
    return tuple(tensors[name].shape)


def _renamed(module: nnx.Module, original_name, tensors: Tensors, source: epath.Path) -> Tensors:
    """The original repository's tensors under the names that an abstract module mirrors. Raises InputError."""
    shapes = torch_layout.mirrored_shapes(module)
    torch_layout.check_fit({original_name(name): shape for name, shape in shapes.items()}, tensors, source)
    return {name: tensors[original_name(name)] for name in shapes}


def _state_dict(loaded: object) -> object:
    """The only dictionary of tensors in a checkpoint that also holds a step, settings and the like; else `loaded`."""
    import torch

    if not isinstance(loaded, dict):
        return loaded
    tensors = lambda values: bool(values) and all(isinstance(value, torch.Tensor) for value in values)
    found = [value for value in loaded.values() if isinstance(value, dict) and tensors(value.values())]
    return found[0] if len(found) == 1 and not any(isinstance(t, torch.Tensor) for t in loaded.values()) else loaded


def _open_pickle(file: epath.Path) -> dict[str, LazyTensor]:
    """The tensors in a file of torch.save, memory-mapped if its format allows. No code in the file is executed."""
    if not file.exists():
        raise InputError(f"{file}: no such file")
    with file.open("rb") as stream:
        start = stream.read(200)
    size, zipped = file.stat().length, zipfile.is_zipfile(file)
    broken = functools.partial(damaged, file, start.removeprefix(b"PK"), size, expected="a file of torch.save")
    if not zipped and not start.startswith(b"\x80"):
        raise broken("neither a zip archive nor a pickle")
    try:
        import torch
    except ImportError:
        raise InputError(f"{file}: reading a pickle takes torch; `pip install torch`") from None
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of any class: the unpickler takes what a damaged file says for instructions
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(f"{file}: refused: it names {match[1]}, which a file of tensors does not") from None
        raise InputError(f"{file}: not a file of torch.save: its {size} bytes are truncated or damaged") from None
    loaded = _state_dict(loaded)
    named = lambda name, tensor: isinstance(name, str) and isinstance(tensor, torch.Tensor)
    if not isinstance(loaded, dict) or not all(named(*item) for item in loaded.items()):
        names = f" of {', '.join(map(str, loaded))}" if isinstance(loaded, dict) else ""
        raise InputError(f"{file}: expected a dictionary of tensors, found {type(loaded).__name__}{names[:200]}")

    if kind := foreign_format(loaded):
        raise InputError(f"{file}: holds {kind}")
    plain = {torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool}  # fmt: skip
    for name, tensor in loaded.items():
        if tensor.dtype not in plain or tensor.layout is not torch.strided:
            found = f"{tensor.dtype} ({tensor.layout})".replace("torch.", "")
            raise InputError(f"{file}: {name}: holds numbers of type {found}; take the file in bfloat16 or float16")

    def lazy(tensor: torch.Tensor) -> LazyTensor:
        if tensor.dtype == torch.bfloat16:  # torch cannot convert it to NumPy
            fetch = lambda: tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return LazyTensor(tuple(tensor.shape), np.dtype(ml_dtypes.bfloat16), fetch)
        dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        return LazyTensor(tuple(tensor.shape), dtype, lambda: tensor.detach().contiguous().numpy())

    return {name: lazy(tensor) for name, tensor in loaded.items()}
