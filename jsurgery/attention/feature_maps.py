"""What surgery learns: the feature maps phi of the linear branch, and the projections of sparse + linear attention."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from pallas_kernels.feature_map import HedgehogMap, PolynomialMap, init_hedgehog_map, init_polynomial_map

HEDGEHOG = HedgehogMap.activation

LearnedMap = PolynomialMap | HedgehogMap
FeatureMapPair = tuple[LearnedMap, LearnedMap]  # of queries and of keys


class Projection(NamedTuple):
    """Proj(x) = x @ kernel + bias of sparse + linear attention: kernel [..., D, D] and bias [..., D], for all heads."""

    kernel: Any
    bias: Any


class LearnedMaps(NamedTuple):
    """What surgery learns for several blocks: feature maps for most kinds, projections for sparse + linear attention.

    In a model leaves are [blocks, ...], of the blocks that have such a map. In distillation they are [blocks, kinds,
    ...], of the distilled blocks and the kinds that have such a map. None: no block, or no kind, has one.
    """

    query: LearnedMap | None
    key: LearnedMap | None
    projection: Projection | None = None

    @property
    def pair(self) -> FeatureMapPair | None:
        return None if self.query is None or self.key is None else (self.query, self.key)


# How files name the map of a block's queries, the map of its keys, and its projection.
QUERY_MAP, KEY_MAP, PROJECTION = "phi_q", "phi_k", "proj_l"

# A leaf's path in FeatureMapParams, which is also its name in the files of distillation -> its name in a model's
# checkpoint. `{j}` counts the layers of the map.
LEAF_NAMES = {"kernels.{j}": "{j}.kernel", "biases.{j}": "{j}.bias", "log_scale": "log_scale"}


@dataclasses.dataclass(frozen=True)
class FeatureMapConfig:
    """phi of eq. 8: `layers` per-head layers, powers 1 to `degree` of a non-negative `activation`.

    With the activation `HEDGEHOG`, phi is the map of HedgeHog (arXiv 2402.04347) instead: softmax([Wx, -Wx]), one layer
    without biases. `degree` and `layers` are then 1.
    """

    degree: int = 2
    layers: int = 2
    activation: str = "relu"

    @classmethod
    def of(cls, config: ConfigDict) -> Self:
        """The feature map of `config.hybrid`."""
        return cls(config.hybrid.degree, config.hybrid.layers, config.hybrid.activation)


class FeatureMapParams(nnx.Module):
    """The parameters of one learned map phi, or of S maps, with every leaf stacked [S, ...].

    `maps` is the pytree that the kernels take.
    """

    def __init__(self, maps: LearnedMap):
        self.kernels = nnx.List([nnx.Param(kernel) for kernel in maps.kernels])
        self.biases = nnx.List([nnx.Param(bias) for bias in maps.biases])
        self.log_scale = nnx.Param(maps.log_scale)
        self.degree, self.activation = maps.degree, maps.activation

    @property
    def maps(self) -> LearnedMap:
        config = FeatureMapConfig(self.degree, len(self.kernels), self.activation)
        leaves = named_leaves(self)
        return build_feature_map(config, lambda name: leaves[name][...])


class ProjectionParams(nnx.Module):
    """The projections of S blocks, with every leaf stacked [S, ...]."""

    def __init__(self, projection: Projection):
        self.kernel, self.bias = nnx.Param(projection.kernel), nnx.Param(projection.bias)

    @property
    def maps(self) -> Projection:
        return Projection(self.kernel[...], self.bias[...])


def named_leaves(maps: LearnedMap | FeatureMapParams | Projection) -> dict[str, Any]:
    """The leaves of a map as "kernels.0", "biases.0", ..., "log_scale"; of a FeatureMapParams, its parameters."""
    if isinstance(maps, Projection):
        return maps._asdict()
    layers = {f"kernels.{j}": kernel for j, kernel in enumerate(maps.kernels)}
    layers |= {f"biases.{j}": bias for j, bias in enumerate(maps.biases)}
    return layers | {"log_scale": maps.log_scale}


def build_feature_map(config: FeatureMapConfig, leaf: Callable[[str], jax.Array]) -> LearnedMap:
    """The map whose leaves `leaf` gives by their `named_leaves` names."""
    if config.activation == HEDGEHOG:
        return HedgehogMap(leaf("kernels.0"), leaf("log_scale"))
    return PolynomialMap(
        kernels=tuple(leaf(f"kernels.{j}") for j in range(config.layers)),
        biases=tuple(leaf(f"biases.{j}") for j in range(config.layers)),
        log_scale=leaf("log_scale"),
        degree=config.degree,
        activation=config.activation,
    )


def init_feature_maps(key: jax.Array, count: int, heads: int, head_dim: int, config: FeatureMapConfig) -> LearnedMap:
    """`count` freshly initialised maps, stacked on the first axis of every leaf."""

    def make(key: jax.Array) -> LearnedMap:
        if config.activation == HEDGEHOG:
            return init_hedgehog_map(heads, head_dim)
        return init_polynomial_map(key, heads, head_dim, config.degree, config.layers, config.activation)

    return jax.vmap(make)(jax.random.split(key, count))


def init_projections(*sizes: int) -> Projection:
    """Projections with leaves [*sizes[:-1], ...] of heads of sizes[-1] channels; zero, as SLA starts with them."""
    return Projection(jnp.zeros((*sizes, sizes[-1])), jnp.zeros(sizes))
