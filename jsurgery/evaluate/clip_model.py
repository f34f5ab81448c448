"""CLIP similarity (Radford et al., 2021, arXiv:2103.00020) of a video's frames to a prompt, and to each other."""

import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from jsurgery.errors import InputError
from jsurgery.io.files import read_object
from jsurgery.io.safetensors import open_tensors
from jsurgery.wan import hub

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
TEXT = {"num_attention_heads": 8, "num_hidden_layers": 12, "max_position_embeddings": 77}  # defaults
VISION = {"num_attention_heads": 12, "num_hidden_layers": 12, "patch_size": 32, "image_size": 224}
BOTH = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}

Weights = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ClipModel:
    """A model folder of transformers' CLIPModel: `model.safetensors`, `config.json`, `tokenizer.json`."""

    weights: Weights
    text: dict[str, Any]
    vision: dict[str, Any]
    vocabulary: dict[str, int]
    merges: dict[tuple[str, str], int]  # pair -> its rank

    def scores(self, video: np.ndarray, prompt: str) -> dict[str, float]:
        """Mean cosine similarities of a uint8 video [F, H, W, 3]: its frames to the prompt, and adjacent frames."""
        frames_FxD = np.concatenate([self.embed_image(frame) for frame in video])
        adjacent = (frames_FxD[1:] * frames_FxD[:-1]).sum(axis=1)
        return {
            "clip_text": float((frames_FxD @ self.embed_text(prompt)[0]).mean()),
            "clip_frames": float(adjacent.mean()) if len(video) > 1 else 1.0,
        }

    def embed_image(self, frame_HxWx3: np.ndarray) -> np.ndarray:
        """A frame's embedding [1, D], normalised to length 1."""
        image_HxWx3 = preprocess(frame_HxWx3, self.vision["image_size"])
        return np.asarray(_image(self.weights, image_HxWx3[None], *_static(self.vision), self.vision["patch_size"]))

    def embed_text(self, prompt: str) -> np.ndarray:
        """A prompt's embedding [1, D], normalised to length 1. Tokens beyond the model's maximum are cut off."""
        length = self.text["max_position_embeddings"]
        ids = [self.vocabulary[START], *self.tokens(prompt)[: length - 2], self.vocabulary[END]]
        ids_1xL = np.pad(ids, (0, length - len(ids)))[None]  # causal attention does not reach the padding
        return np.asarray(_text(self.weights, ids_1xL, len(ids) - 1, *_static(self.text)))

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt: byte pair encoding of its lower-case words."""
        text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", prompt)).lower()
        ids = []
        for word in WORDS.findall(text):
            parts = [_BYTES[byte] for byte in word.encode()]
            parts[-1] += "</w>"
            while len(parts) > 1:
                pairs = list(itertools.pairwise(parts))
                best = min(pairs, key=lambda pair: self.merges.get(pair, len(self.merges)))
                if best not in self.merges:
                    break
                at = pairs.index(best)
                parts[at : at + 2] = ["".join(best)]
            ids += [self.vocabulary.get(part, self.vocabulary[END]) for part in parts]
        return ids


def load_clip_model(path: str) -> ClipModel:
    """Loads a folder, or a repository of the Hub such as openai/clip-vit-base-patch32.

    Raises InputError for missing files and for files that are not those of a CLIP model.
    """
    folder = epath.Path(hub.local_path(path))
    config, tokenizer = (read_object(folder / name) for name in ("config.json", "tokenizer.json"))
    try:
        text, vision = (
            defaults | BOTH | config[f"{side}_config"] for side, defaults in (("text", TEXT), ("vision", VISION))
        )
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"]]
        vocabulary = tokenizer["model"]["vocab"]
        activations = [ACTIVATIONS[side["hidden_act"]] for side in (text, vision)]
        known = bool(activations) and {START, END} <= vocabulary.keys()
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise InputError(f"--clip={path}: expected config.json and tokenizer.json of a CLIPModel of transformers")
    tensors = open_tensors(folder)
    needed = {"text_projection.weight", "visual_projection.weight", "vision_model.embeddings.class_embedding"}
    if missing := sorted(needed - tensors.keys()):
        raise InputError(f"--clip={path}: expected the weights of a CLIPModel, found no {missing[0]}")
    arrays = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items() if "position_ids" not in name}
    weights = {name: jnp.asarray(_with_leading_axes(name, array)) for name, array in arrays.items()}
    return ClipModel(
        weights, text, vision, vocabulary, {(left, right): rank for rank, (left, right) in enumerate(merges)}
    )


def preprocess(frame_HxWx3: np.ndarray, size: int) -> np.ndarray:
    """The centre square of a uint8 frame, [size, size, 3], normalised by the mean and deviation of CLIP's images."""
    height, width = frame_HxWx3.shape[:2]
    scale = size / min(height, width)
    to = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    scaled = np.asarray(
        Image.fromarray(frame_HxWx3).resize(to, Image.Resampling.BICUBIC) if scale != 1 else frame_HxWx3
    )
    top, left = ((side - size) // 2 for side in scaled.shape[:2])
    return (scaled[top : top + size, left : left + size] / 255 - np.array(MEAN)) / np.array(STD)


def _with_leading_axes(name: str, array: np.ndarray) -> np.ndarray:
    """Gives vectors and position embeddings the axes of [B, N, D], because ranks are not promoted."""
    return array[None, None] if array.ndim == 1 else array[None] if "position_embedding" in name else array


def _static(side: dict[str, Any]) -> tuple[Any, ...]:
    return side["num_hidden_layers"], side["num_attention_heads"], side["hidden_act"], side["layer_norm_eps"]


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _image(weights: Weights, image_BxHxWx3, layers: int, heads: int, activation: str, eps: float, patch: int):
    kernel, at = weights["vision_model.embeddings.patch_embedding.weight"], "vision_model."
    patches = jax.lax.conv_general_dilated(
        jnp.asarray(image_BxHxWx3, jnp.float32),
        kernel,
        (patch, patch),
        "VALID",
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )
    patches_BxNxD = patches.reshape(len(patches), -1, patches.shape[-1])
    start = jnp.broadcast_to(weights[f"{at}embeddings.class_embedding"], (len(patches), 1, patches.shape[-1]))
    x_BxNxD = jnp.concatenate([start, patches_BxNxD], axis=1) + weights[f"{at}embeddings.position_embedding.weight"]
    x_BxNxD = _norm(weights, f"{at}pre_layrnorm", x_BxNxD, eps)
    for layer in range(layers):
        x_BxNxD = _layer(weights, f"{at}encoder.layers.{layer}.", x_BxNxD, heads, activation, eps, causal=False)
    return _unit(_norm(weights, f"{at}post_layernorm", x_BxNxD[:, :1], eps) @ weights["visual_projection.weight"].T)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _text(weights: Weights, ids_BxL, end, layers: int, heads: int, activation: str, eps: float):
    at = "text_model."
    x_BxLxD = weights[f"{at}embeddings.token_embedding.weight"][ids_BxL]
    x_BxLxD += weights[f"{at}embeddings.position_embedding.weight"]
    for layer in range(layers):
        x_BxLxD = _layer(weights, f"{at}encoder.layers.{layer}.", x_BxLxD, heads, activation, eps, causal=True)
    end_Bx1xD = jax.lax.dynamic_slice_in_dim(x_BxLxD, end, 1, axis=1)
    return _unit(_norm(weights, f"{at}final_layer_norm", end_Bx1xD, eps) @ weights["text_projection.weight"].T)


def _layer(weights: Weights, at: str, x_BxNxD: jax.Array, heads: int, activation: str, eps: float, causal: bool):
    b, n, d = x_BxNxD.shape
    y = _norm(weights, f"{at}layer_norm1", x_BxNxD, eps)
    q, k, v = (_linear(weights, f"{at}self_attn.{name}_proj", y).reshape(b, n, heads, d // heads) for name in "qkv")
    y = jax.nn.dot_product_attention(q, k, v, is_causal=causal).reshape(b, n, d)
    x_BxNxD += _linear(weights, f"{at}self_attn.out_proj", y)
    y = _linear(weights, f"{at}mlp.fc1", _norm(weights, f"{at}layer_norm2", x_BxNxD, eps))
    return x_BxNxD + _linear(weights, f"{at}mlp.fc2", ACTIVATIONS[activation](y))


def _linear(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, x: jax.Array, eps: float) -> jax.Array:
    return jax.nn.standardize(x, epsilon=eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _unit(x_Bx1xD: jax.Array) -> jax.Array:
    return (x_Bx1xD / jnp.linalg.norm(x_Bx1xD, axis=-1, keepdims=True))[:, 0]


def _byte_characters() -> dict[int, str]:
    """A visible character for every byte, as in GPT-2's vocabulary: its own, or a code from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


_BYTES = _byte_characters()
