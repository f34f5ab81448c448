"""Hybrid softmax-linear attention for JAX."""

from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import (
    ACTIVATIONS,
    EluMap,
    FeatureMap,
    HedgehogMap,
    PolynomialMap,
    init_elu_map,
    init_hedgehog_map,
    init_polynomial_map,
)
from pallas_kernels.reference import EPSILON, softmax_share

__all__ = [
    "ACTIVATIONS",
    "EPSILON",
    "EluMap",
    "FeatureMap",
    "HedgehogMap",
    "PolynomialMap",
    "hybrid_attention",
    "init_elu_map",
    "init_hedgehog_map",
    "init_polynomial_map",
    "softmax_share",
]
