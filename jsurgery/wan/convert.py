"""Converts checkpoints from one layout to another, tensor by tensor, without a change to values or types.

The original repository publishes its VAE and text encoder as pickles. torch reads them, restricted to tensors.
"""

import functools
import pickle
import re
import zipfile

import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx

from jsurgery.errors import InputError
from jsurgery.io.files import damaged, read_object, write_json
from jsurgery.io.safetensors import LazyTensor, Tensors, open_tensors, write_shards
from jsurgery.wan import checkpoint_layouts, hub, torch_layout
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.checkpoint import open_transformer, write_transformer
from jsurgery.wan.checkpoint_layouts import original_text_encoder_name, original_vae_name
from jsurgery.wan.folder_hashes import check_hashes, write_hashes
from jsurgery.wan.model_config import TextEncoderConfig, VaeConfig
from jsurgery.wan.pipeline_parts import check_index
from jsurgery.wan.text_encoder import TextEncoder
from jsurgery.wan.vae import WanVae


def convert(model: str, output: epath.PathLike, layout: str = "diffusers") -> epath.Path:
    """Writes the transformer at `model` in another layout ("diffusers", "original", "comfyui") and returns `output`.

    `model` is a transformer's folder or file, a pipeline folder, or a repository id. It may also be the file of the
    original repository's VAE or text encoder (.pth, or .safetensors with the same tensor names), which becomes a
    diffusers folder. Raises InputError for a model that cannot be converted, and for an output that exists already.
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

    check_hashes(source)
    tensors = _open_pickle(source) if source.suffix == ".pth" else open_tensors(source)
    for prefix, to_diffusers in (("token_embedding.", _text_encoder), ("decoder.conv1.", _vae)):
        if any(name.startswith(prefix) for name in tensors):
            if layout != "diffusers":
                raise InputError(f"{source}: not a transformer, which is all that --layout={layout} is for")
            to_diffusers(tensors, source, output)
            return output
    _transformer(tensors, source, output, layout)
    return output


def _transformer(tensors: Tensors, source: epath.Path, output: epath.Path, layout: str) -> None:
    checkpoint_layouts.transformer_layout(tensors, source)  # raises, with what a pickle holds, if it is no transformer
    config, renamed = open_transformer(source, layout)
    # A hybrid's config also says where its VAE and text encoder are.
    more = read_object(source / "config.json") if config.hybrid else {}
    write_transformer(renamed, config, output, layout, more=more)


def _text_encoder(tensors: Tensors, source: epath.Path, output: epath.Path) -> None:
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
    encoder = abstract_module(TextEncoder, config)
    hashes = write_shards(output, "model", _renamed(encoder, original_text_encoder_name, tensors, source))
    write_json(output / "config.json", config.to_json())
    write_hashes(output, hashes, "config.json")


def _vae(tensors: Tensors, source: epath.Path, output: epath.Path) -> None:
    # The file has no mean and std of the latents, so they are Wan2.1's, and only a VAE with as many channels fits.
    config = VaeConfig(base_dim=_shape(tensors, "encoder.conv1.weight", source, axes=5)[0])
    vae = abstract_module(WanVae, config)
    hashes = write_shards(output, "diffusion_pytorch_model", _renamed(vae, original_vae_name, tensors, source))
    write_json(output / "config.json", config.to_json())
    write_hashes(output, hashes, "config.json")


def _shape(tensors: Tensors, name: str, source: epath.Path, axes: int = 2) -> tuple[int, ...]:
    if name not in tensors or len(tensors[name].shape) != axes:
        raise InputError(f"{source}: missing {name} of {axes} axes, whose shape gives the model's size")
    return tuple(tensors[name].shape)


def _renamed(module: nnx.Module, original_name, tensors: Tensors, source: epath.Path) -> Tensors:
    """The original repository's tensors under the names that an abstract module mirrors. Raises InputError."""
    shapes = torch_layout.mirrored_shapes(module)
    torch_layout.check_fit({original_name(name): shape for name, shape in shapes.items()}, tensors, source)
    return {name: tensors[original_name(name)] for name in shapes}


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
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(f"{file}: refused: it names {match[1]}, which a file of tensors does not") from None
        raise InputError(f"{file}: not a file of torch.save: its {size} bytes are truncated or damaged") from None
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise InputError(f"{file}: expected a dictionary of tensors, found {type(loaded).__name__}")

    def lazy(tensor: torch.Tensor) -> LazyTensor:
        if tensor.dtype == torch.bfloat16:  # torch cannot convert it to NumPy
            fetch = lambda: tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return LazyTensor(tuple(tensor.shape), np.dtype(ml_dtypes.bfloat16), fetch)
        dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        return LazyTensor(tuple(tensor.shape), dtype, lambda: tensor.detach().contiguous().numpy())

    return {name: lazy(tensor) for name, tensor in loaded.items()}
