"""Text embeddings of prompts, computed with one layer of the text encoder in memory at a time.

UMT5-XXL has four times the parameters of the 1.3B transformer that reads its embeddings. Each layer is read from the
file, run on all prompts and dropped, so that the encoder takes only the memory of a layer, on the device and the host.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jsurgery.errors import InputError
from jsurgery.runtime.finite import all_finite
from jsurgery.runtime.progress import Progress, say
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.checkpoint import open_text_encoder
from jsurgery.wan.folder_hashes import check_hashes
from jsurgery.wan.model_config import TextEncoderConfig
from jsurgery.wan.text_encoder import Block, RMSNorm, mask_bias
from jsurgery.wan.tokenizer import Tokenizer, describe_cut
from jsurgery.wan.torch_layout import set_mirrored

BATCH = 8  # prompts that a layer is run on at once
SHORTEST = 64  # tokens; shorter prompts are padded to it
PASS = 2048  # prompts that share one pass over the layers; their activations are on the device
KEPT = 4096  # prompts whose embeddings stay on the host
LARGE = 1 << 22  # parameters of a layer's matrix from which a pass shows its progress


class PromptEmbedder:
    """embeddings = embedder(prompts, length): float [B, length, d_model], zero after the end of each prompt.

    A layer that the file stores in another type is converted to `dtype`, in which it also computes. Embeddings of the
    last prompts are kept, so that asking for them again costs nothing: give all prompts in one call where possible.
    """

    def __init__(self, base: epath.PathLike, dtype: Any = jnp.float32):
        """`base` is a pipeline folder. Raises InputError for missing or foreign files; reads only their headers."""
        self.tokenizer = Tokenizer(epath.Path(base) / "tokenizer")
        self.folder, self.dtype = epath.Path(base) / "text_encoder", jnp.dtype(dtype)
        self.config, self.tensors = open_text_encoder(self.folder)
        self._kept: dict[tuple[str, int], np.ndarray] = {}
        self._cut_said = False

    def __call__(self, prompts: Sequence[str], length: int) -> np.ndarray:
        padded = np.zeros((len(prompts), length, self.config.d_model), self.dtype)
        for row, embedding in zip(padded, self.unpadded(prompts, length), strict=True):
            row[: len(embedding)] = embedding
        return padded

    def unpadded(self, prompts: Sequence[str], length: int) -> list[np.ndarray]:
        """The embeddings [L, d_model] of each prompt, L being its tokens: at most `length`, the rest is cut off."""
        new = [prompt for prompt in dict.fromkeys(prompts) if (prompt, length) not in self._kept]
        self.say_cut(new, length)
        made: dict[str, np.ndarray] = {}
        for start in range(0, len(new), PASS):
            some = new[start : start + PASS]
            ids_BxL, mask_BxL = self.tokenizer(some, length)
            tokens = [ids[:count] for ids, count in zip(ids_BxL, mask_BxL.sum(1), strict=True)]
            made |= zip(some, self._encode(tokens, length), strict=True)
        embeddings = [made[prompt] if prompt in made else self._kept[prompt, length] for prompt in prompts]
        self._kept |= {(prompt, length): embedding for prompt, embedding in made.items()}
        for key in list(self._kept)[: max(0, len(self._kept) - KEPT)]:
            del self._kept[key]
        return embeddings

    def say_cut(self, prompts: Sequence[str], length: int) -> None:
        """Says in one line how many of the prompts do not fit `length` tokens, the first time that there are any.

        A caller who embeds many prompts in turn calls it before, with all of them.
        """
        if prompts and not self._cut_said and (cut := describe_cut(self.tokenizer, prompts, length)):
            say(f"text: {cut}")
            self._cut_said = True

    def forget(self) -> None:
        """Drops all embeddings. The next ones depend on the prompts of their own call alone, to the last bit.

        Otherwise the embeddings that are kept change which prompts are computed as one batch, and so how they round.
        """
        self._kept.clear()

    def _encode(self, tokens: list[np.ndarray], longest: int) -> list[np.ndarray]:
        """The embeddings of prompts that are given as their token ids [L], L being at most `longest`."""
        check_hashes(self.folder)
        batches = list(batched_by_length([len(ids) for ids in tokens], longest))
        table = np.asarray(self.tensors["shared.weight"])  # memory-mapped, or from an object store read once
        states, biases = [], []
        for numbers, size in batches:
            ids_BxL = np.stack([np.pad(tokens[number], (0, size - len(tokens[number]))) for number in numbers])
            mask_BxL = np.arange(size) < np.array([len(tokens[number]) for number in numbers])[:, None]
            states.append(jnp.asarray(table[ids_BxL], self.dtype))
            biases.append(mask_bias(jnp.asarray(mask_BxL)))
        del table
        finite = [all_finite(states)]  # scalars that stay on the device until the end
        for layer in self._layers():
            jax.block_until_ready(states)  # else all layers would be read, and wait in memory for the device
            run = functools.partial(run_layer, self.config, self.dtype, layer)
            states = [run(x_BxLxE, bias) for x_BxLxE, bias in zip(states, biases, strict=True)]
            finite.append(all_finite(states))
        norm = self._read("encoder.final_layer_norm.")
        embeddings: dict[int, np.ndarray] = {}
        for (numbers, _), x_BxLxE in zip(batches, states, strict=True):
            rows = np.asarray(_final_norm(self.config, self.dtype, norm, x_BxLxE))
            finite.append(all_finite(rows))
            embeddings |= {number: row[: len(tokens[number])] for number, row in zip(numbers, rows, strict=True)}
        self._check_finite(finite)
        return [embeddings[number] for number in range(len(tokens))]

    def _check_finite(self, finite: Sequence[jax.Array]) -> None:
        """Raises InputError unless all are true: one of the token embeddings, one of each layer, and of the result."""
        layers = self.config.num_layers
        first = next((number for number, each in enumerate(finite) if not each), None)
        if first is None:
            return
        prefix = (
            "shared."
            if not first
            else f"encoder.block.{first - 1}."
            if first <= layers
            else "encoder.final_layer_norm."
        )
        tensors = {name: np.asarray(tensor) for name, tensor in self.tensors.items() if name.startswith(prefix)}
        names = [name for name, tensor in tensors.items() if not np.isfinite(tensor.astype(np.float32)).all()]
        cause = f"{', '.join(names)} is not finite" if names else f"its weights are finite, so {self.dtype} overflows"
        raise InputError(f"{self.folder}: embeddings are not finite from {prefix.rstrip('.')} on: {cause}")

    def _layers(self) -> Iterator[dict[str, jax.Array]]:
        """The tensors of each layer. A layer is read from the file while the one before it is computed."""
        numbers: Iterable[int] = range(self.config.num_layers)
        if self.config.d_model * self.config.d_ff > LARGE:
            numbers = Progress("text encoder", self.config.num_layers).over(numbers)
        for number in numbers:
            yield self._read(f"encoder.block.{number}.")

    def _read(self, prefix: str) -> dict[str, jax.Array]:
        """The tensors whose names begin with `prefix`, without it."""
        found = {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): jnp.asarray(np.asarray(tensor)) for name, tensor in found.items()}


# Modules are made under jit, since flax keeps arrays that a module was made of in reference cycles: layers would stay
# in memory until Python looks for garbage.
@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def run_layer(
    config: TextEncoderConfig, dtype: np.dtype, tensors: dict[str, jax.Array], x_BxLxE: jax.Array, bias: jax.Array
) -> jax.Array:
    block = abstract_module(Block, config)
    set_mirrored(block, tensors, dtype)
    return block(x_BxLxE, bias)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _final_norm(
    config: TextEncoderConfig, dtype: np.dtype, tensors: dict[str, jax.Array], x_BxLxE: jax.Array
) -> jax.Array:
    norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
    set_mirrored(norm, tensors, dtype)
    return norm(x_BxLxE)


def batched_by_length(lengths: Sequence[int], longest: int) -> Iterator[tuple[list[int], int]]:
    """Batches of prompts of similar length: the numbers of the prompts, and the length to which they are padded.

    There are few shapes, since each is compiled: batches of 1, 2, 4 or BATCH prompts, and lengths that are SHORTEST
    times a power of 2, or `longest`.
    """
    sizes = [min(longest, SHORTEST << max(0, math.ceil(math.log2(max(n, 1) / SHORTEST)))) for n in lengths]
    for size in sorted(set(sizes)):
        numbers = [number for number, other in enumerate(sizes) if other == size]
        while numbers:
            count = min(BATCH, 1 << (len(numbers).bit_length() - 1))
            yield numbers[:count], size
            numbers = numbers[count:]
