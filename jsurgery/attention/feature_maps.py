"""The learned feature maps phi of the linear branch: their config, parameters and initial values."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from pallas_kernels.feature_map import HedgehogMap, PolynomialMap, init_hedgehog_map, init_polynomial_map

HEDGEHOG = HedgehogMap.activation

LearnedMap = PolynomialMap | HedgehogMap


@dataclasses.dataclass(frozen=True)
class FeatureMapConfig:
    """phi of eq. 8: `layers` per-head layers, powers 1 to `degree` of a non-negative `activation`.

    The activation `HEDGEHOG` is that map instead, of one layer and no powers.
    """

    degree: int = 2
    layers: int = 2
    activation: str = "relu"


class FeatureMapParams(nnx.Module):
    """One learned map phi; `maps` is the pytree that kernels take. Leaves may be stacked: [S, ...] over blocks."""

    def __init__(self, maps: LearnedMap):
        self.kernels = nnx.List([nnx.Param(kernel) for kernel in maps.kernels])
        self.biases = nnx.List([nnx.Param(bias) for bias in maps.biases])
        self.log_scale = nnx.Param(maps.log_scale)
        self.degree, self.activation = maps.degree, maps.activation

    @property
    def maps(self) -> LearnedMap:
        config = FeatureMapConfig(self.degree, len(self.kernels), self.activation)
        leaves = {f"kernels.{j}": kernel for j, kernel in enumerate(self.kernels)}
        leaves |= {f"biases.{j}": bias for j, bias in enumerate(self.biases)} | {"log_scale": self.log_scale}
        return build_feature_map(config, lambda name: leaves[name][...])


def build_feature_map(config: FeatureMapConfig, leaf: Callable[[str], jax.Array]) -> LearnedMap:
    """The map of the leaves "kernels.0", "biases.0", ..., "log_scale"."""
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
