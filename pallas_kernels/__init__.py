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
from pallas_kernels.sharded import EXCHANGES, sharded_cross_attention, sharded_self_attention

__all__ = [
    "ACTIVATIONS",
    "EPSILON",
    "EXCHANGES",
    "EluMap",
    "FeatureMap",
    "HedgehogMap",
    "PolynomialMap",
    "hybrid_attention",
    "init_elu_map",
    "init_hedgehog_map",
    "init_polynomial_map",
    "sharded_cross_attention",
    "sharded_self_attention",
    "softmax_share",
]
