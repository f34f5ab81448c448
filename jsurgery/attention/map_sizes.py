"""The sizes of feature maps: features, parameters and weights."""

from jsurgery.attention.feature_maps import HEDGEHOG, FeatureMapConfig


def map_parameters(feature_map: FeatureMapConfig, heads: int, head_dim: int) -> int:
    """Parameters of one map's kernels and biases, without the calibrated scale of each head."""
    width, layers = _shape(feature_map, head_dim)
    biases = 0 if feature_map.activation == HEDGEHOG else heads * layers * width
    return map_weights(feature_map, heads, head_dim) + biases


def map_weights(feature_map: FeatureMapConfig, heads: int, head_dim: int) -> int:
    """Parameters of one map's kernels."""
    width, layers = _shape(feature_map, head_dim)
    return heads * (head_dim * width + (layers - 1) * width**2)


def num_features(feature_map: FeatureMapConfig, head_dim: int) -> int:
    """Features per head of a map's output."""
    return head_dim * (2 if feature_map.activation == HEDGEHOG else feature_map.degree)


def _shape(feature_map: FeatureMapConfig, head_dim: int) -> tuple[int, int]:
    """Width and number of a map's layers, per head."""
    if feature_map.activation == HEDGEHOG:
        return head_dim, 1
    return num_features(feature_map, head_dim), feature_map.layers
