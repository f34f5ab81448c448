"""Low-rank changes (LoRA) of the linear layers of a transformer's blocks, for training: y = x W + (x A) B.

The weights W stay as they are. A begins at random and B at zero, so that the model begins unchanged.
"""

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from jsurgery.errors import InputError
from jsurgery.wan.model_config import WanConfig

if TYPE_CHECKING:
    from jsurgery.wan.transformer import WanTransformer

ADDED = ("query_maps", "key_maps", "projections")  # what surgery added, which is trained in full


class LowRankParam(nnx.Variable):
    """A or B. No nnx.Param, so that checkpoints of a model hold its own parameters alone."""


class LowRank(nnx.Module):
    """A [in, rank] and B [rank, out] of one layer, or of all blocks with an axis for these before."""

    def __init__(self, down: Any, up: Any):
        self.down, self.up = LowRankParam(down), LowRankParam(up)

    def __call__(self, x: jax.Array, dtype: Any) -> jax.Array:
        """(x A) B, computed in `dtype`."""
        down, up = (param[...].astype(dtype) for param in (self.down, self.up))
        return (x.astype(dtype) @ down) @ up


def block_layers(model: "WanTransformer") -> dict[str, Any]:
    """The linear layers of the blocks, stacked [L, ...], by their names in the model: "blocks.attn1.to_q"."""
    modules = ((".".join(map(str, path)), module) for path, module in nnx.iter_modules(model.blocks))
    return {f"blocks.{name}": module for name, module in sorted(modules) if isinstance(module, nnx.Linear)}


def add_low_rank(model: "WanTransformer", rank: int, seed: int = 0) -> None:
    """Adds changes of this rank to all linear layers of the blocks, in place; the model may be abstract.

    Raises InputError where a layer's matrix has no such rank.
    """
    check_rank(model.config, rank)
    layers = block_layers(model)
    for number, layer in enumerate(layers.values()):
        blocks, into, out = layer.kernel.shape
        shapes = (blocks, into, rank), (blocks, rank, out)
        if isinstance(layer.kernel.get_value(), jax.ShapeDtypeStruct):
            layer.low_rank = LowRank(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
            continue
        key = jax.random.fold_in(jax.random.key(seed), number)
        layer.low_rank = LowRank(jax.random.normal(key, shapes[0]) / math.sqrt(into), jnp.zeros(shapes[1]))


def check_rank(network: WanConfig, rank: int) -> None:
    """Raises InputError where a matrix of the blocks has no such rank."""
    least = min(network.dim, network.ffn_dim)
    if rank > least:
        raise InputError(
            f"config.finetune.lora_rank: expected at most {least}, the least width of a layer, found {rank}"
        )


def trained_with_low_rank(path: tuple, value: Any) -> bool:
    """A filter of NNX: what is trained beside frozen weights, which are A, B and the feature maps."""
    return isinstance(value, LowRankParam) or path[0] in ADDED


def low_rank_of(model: nnx.Module) -> dict[str, tuple[Any, Any]]:
    """{a layer's name in the model: its A and B [L, ...]}; empty for a model without."""
    found: dict[str, dict[str, Any]] = {}
    for (*layer, _, side), param in nnx.to_flat_state(nnx.state(model, LowRankParam)):
        found.setdefault(".".join(map(str, layer)), {})[str(side)] = param
    return {layer: (sides["down"], sides["up"]) for layer, sides in found.items()}
