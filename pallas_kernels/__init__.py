"""Hybrid softmax-linear attention for JAX. `pallas_kernels.api` describes it; nothing here depends on jsurgery."""

from pallas_kernels.api import attend_with_state, hybrid_attention, hybrid_error, linear_state, softmax_zones
from pallas_kernels.chunked import chunk_step, chunked_attention
from pallas_kernels.feature_map import (
    ACTIVATIONS,
    FeatureMap,
    HedgehogMap,
    PolynomialMap,
    SoftmaxMap,
    init_hedgehog_map,
    init_polynomial_map,
)
from pallas_kernels.query_blocks import QueryBlock, attention_by_query_blocks
from pallas_kernels.reference import EPSILON, softmax_share
from pallas_kernels.sharded import EXCHANGES, sharded_cross_attention, sharded_self_attention
from pallas_kernels.sparse import sparse_linear_attention

__all__ = [
    "ACTIVATIONS",
    "EPSILON",
    "EXCHANGES",
    "FeatureMap",
    "HedgehogMap",
    "PolynomialMap",
    "QueryBlock",
    "SoftmaxMap",
    "attend_with_state",
    "attention_by_query_blocks",
    "chunk_step",
    "chunked_attention",
    "hybrid_attention",
    "hybrid_error",
    "init_hedgehog_map",
    "init_polynomial_map",
    "linear_state",
    "sharded_cross_attention",
    "sharded_self_attention",
    "softmax_share",
    "softmax_zones",
    "sparse_linear_attention",
]
