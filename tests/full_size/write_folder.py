"""Writes a pipeline folder with the shapes and layout of a published model, Wan2.1 1.3B by default, and random weights.

    python -m tests.full_size.write_folder FOLDER [--kind=wan2.2-5b] [--blocks=N] [--text_encoder_of=OTHER_FOLDER]

Tensors are made one at a time while they are written. With `--blocks` the transformer has fewer blocks of true width.
All models have the same text encoder: that of another folder is linked to.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import shutil
import zlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from etils import epath

from jsurgery.data import sprites
from jsurgery.io.files import write_json
from jsurgery.io.safetensors import LazyTensor, write_shards
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.checkpoint import write_transformer
from jsurgery.wan.checkpoint_layouts import lazy_transformer_tensors
from jsurgery.wan.folder_hashes import write_hashes
from jsurgery.wan.model_config import TextEncoderConfig, VaeConfig
from jsurgery.wan.model_sizes import network_of
from jsurgery.wan.models import BY_KIND, Model, takes_image
from jsurgery.wan.pipeline_parts import write_pipeline_index
from jsurgery.wan.text_encoder import TextEncoder
from jsurgery.wan.tokenizer import train_tokenizer
from jsurgery.wan.torch_layout import mirrored_shapes
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.vae import WanVae

# Drawing 7 B normal numbers takes minutes; tensors are cut from these, each from another place on.
NORMALS = np.random.default_rng(0).standard_normal((1 << 22) + 1).astype(np.float32)


def random_tensor(name: str, shape: tuple[int, ...]) -> LazyTensor:
    """A tensor in bfloat16, of a scale at which a network of such tensors keeps the scale of its input."""

    def fetch() -> np.ndarray:
        offset, scale = scale_of(name, shape)
        numbers = (offset + scale * NORMALS).astype(ml_dtypes.bfloat16)
        start = zlib.crc32(name.encode()) % len(numbers)
        return np.resize(np.roll(numbers, start), shape)

    return LazyTensor(shape, np.dtype(ml_dtypes.bfloat16), fetch)


def scale_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """The mean and the standard deviation of a tensor's values."""
    if "norm" in name or "gamma" in name:
        return (0.0 if name.endswith("bias") else 1.0), 0.1
    if name.endswith(("bias", "scale_shift_table")):
        return 0.0, 0.1
    if "relative_attention_bias" in name or name == "shared.weight":
        return 0.0, 1.0
    scale = 1 / math.sqrt(math.prod(shape[1:]))
    return 0.0, scale / 8 if ".SelfAttention.q." in name else scale  # UMT5 does not divide logits by sqrt(64)


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    return {name: random_tensor(name, shape) for name, shape in shapes.items()}


def write_folder(folder: epath.Path, model: Model, blocks: int | None, text_encoder_of: pathlib.Path | None) -> None:
    """Writes all parts. An interrupted call is repeated from the start of the part that was not finished."""
    network = network_of(model)
    network = dataclasses.replace(network, num_layers=blocks or network.num_layers)
    with_image = takes_image(network.in_channels)
    if text_encoder_of is not None and not (folder / "text_encoder").exists():
        shutil.copytree(text_encoder_of / "text_encoder", folder / "text_encoder", copy_function=os.link)
    if not (folder / "transformer" / "hashes.json").exists():
        transformer = abstract_module(WanTransformer, network)
        shapes = {name: tensor.shape for name, tensor in lazy_transformer_tensors(transformer).items()}
        write_transformer(random_tensors(shapes), network, folder / "transformer", "diffusers")
    for part, stem, config, kind in (
        ("vae", "diffusion_pytorch_model", VaeConfig(**model.vae), WanVae),
        ("text_encoder", "model", TextEncoderConfig(), TextEncoder),
    ):
        if not (folder / part / "hashes.json").exists():
            hashes = write_shards(folder / part, stem, random_tensors(mirrored_shapes(abstract_module(kind, config))))
            write_json(folder / part / "config.json", config.to_json())
            write_hashes(folder / part, hashes, "config.json")
    if not (folder / "model_index.json").exists():
        train_tokenizer(sprites.all_captions(), folder / "tokenizer")
        write_pipeline_index(folder, shift=5.0 if with_image else 3.0, takes_image=with_image)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--kind", choices=sorted(BY_KIND), default="wan2.1-1.3b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--text_encoder_of", type=pathlib.Path)
    arguments = parser.parse_args()
    model = BY_KIND[arguments.kind]
    write_folder(epath.Path(arguments.folder), model, arguments.blocks, arguments.text_encoder_of)
