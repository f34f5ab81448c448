"""Parameters, FLOPs and bytes of a Wan network with softmax or hybrid self-attention.

One multiply-add is 2 FLOP; softmax, norms, activations and modulation are not counted. "core" is attention with phi and
without the projections. Batch 1, one forward pass.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from jsurgery.attention.hybrid import FeatureMapConfig, Rate
from jsurgery.errors import InputError
from jsurgery.wan.transformer import WanConfig


@dataclass(frozen=True)
class Workload:
    """A network at work on one video.

    Attributes:
      config: the network's sizes; its own plan, if it has one, is ignored.
      tokens: N, video tokens (`num_tokens`).
      text_len: text tokens, padding included.
      feature_map: phi of hybrid blocks; None: they have no linear branch.
    """

    config: WanConfig
    tokens: int
    text_len: int = 512
    feature_map: FeatureMapConfig | None = field(default_factory=FeatureMapConfig)


@dataclass(frozen=True)
class BlockCost:
    """FLOPs or bytes of the parts of one block."""

    core: int
    projections: int
    cross_attention: int
    ffn: int

    @property
    def total(self) -> int:
        return self.core + self.projections + self.cross_attention + self.ffn


@dataclass(frozen=True)
class FeatureMapCost:
    """Parameters and FLOPs of one feature map; a hybrid block has two."""

    parameters: int
    flops: int


def num_tokens(
    frames: int,
    height: int,
    width: int,
    patch_size: tuple[int, int, int] = (1, 2, 2),
    vae_strides: tuple[int, int, int] = (4, 8, 8),
) -> int:
    """Tokens of a video of `frames` x `height` x `width` pixels; the first frame is a latent frame of its own.

    Raises:
      InputError: a size that the strides do not divide.
    """
    tokens = 1
    for name, size, first, patch, stride in zip(
        ("frames", "height", "width"), (frames, height, width), (1, 0, 0), patch_size, vae_strides, strict=True
    ):
        latent, rest = divmod(size - first, stride)
        latent += first
        if size < 1 or rest or latent % patch:
            form = f"{stride}k + 1" if first else f"a multiple of {stride * patch}"
            raise InputError(f"{name}: expected {form}, found {size}")
        tokens *= latent // patch
    return tokens


def feature_map_cost(degree: int, layers: int, heads: int, head_dim: int, tokens: int) -> FeatureMapCost:
    """One map phi of eq. 8 on `tokens` tokens, biases included: Table 7 of the paper.

    Table 7 gives 70 GFLOP for degree 4, 2 layers and 12600 tokens; its own parameter count, and this, make it 99.4.
    """
    biases = heads * layers * degree * head_dim
    parameters = _feature_map_weights(FeatureMapConfig(degree, layers), heads, head_dim) + biases
    return FeatureMapCost(parameters, 2 * parameters * tokens)


def core_flops(workload: Workload, rate: Rate) -> int:
    """Self-attention of one block at rate 1 (softmax), 2, 4, ... or "linear" (eq. 5), without projections.

    Softmax runs over ceil(N / rate) keys. phi_q runs on all N tokens, phi_k on the linear tokens alone, both counted
    without biases; the linear tokens make the state sum phi_k^T v and the normaliser sum phi_k, all tokens read both.
    """
    tokens, config = workload.tokens, workload.config
    linear = tokens - _softmax_tokens(tokens, rate)
    flops = 4 * tokens * (tokens - linear) * config.dim
    if linear and workload.feature_map:
        features = config.dim * workload.feature_map.degree
        phi = 2 * _feature_map_weights(workload.feature_map, config.num_attention_heads, config.attention_head_dim)
        state = 2 * features * config.attention_head_dim
        flops += tokens * (phi + state + 2 * features) + linear * (phi + state + features)
    return flops


def block_flops(workload: Workload, rate: Rate) -> BlockCost:
    """FLOPs of one block, by part."""
    dim, tokens, text_len = workload.config.dim, workload.tokens, workload.text_len
    return BlockCost(
        core=core_flops(workload, rate),
        projections=8 * tokens * dim**2,
        cross_attention=4 * (tokens + text_len) * dim**2 + 4 * tokens * text_len * dim,
        ffn=4 * tokens * dim * workload.config.ffn_dim,
    )


def model_flops(workload: Workload, rates: Iterable[Rate]) -> int:
    """FLOPs of one forward pass with these rates, one per block: blocks, embeddings and head."""
    config, dim = workload.config, workload.config.dim
    patch = math.prod(config.patch_size)
    embeddings = (
        workload.tokens * patch * config.in_channels * dim
        + workload.text_len * (config.text_dim * dim + dim**2)
        + config.freq_dim * dim
        + 7 * dim**2
    )
    head = workload.tokens * dim * patch * config.out_channels
    return 2 * (embeddings + head) + sum(block_flops(workload, rate).total for rate in rates)


def block_bytes(workload: Workload, rate: Rate, bytes_per_value: int = 2) -> BlockCost:
    """Least memory traffic of one block, by part: weights, inputs and outputs of every product move once.

    Scores, features and all elementwise work stay on the chip; the linear branch's state is written once and read once.
    """
    config, tokens, text_len = workload.config, workload.tokens, workload.text_len
    dim, head_dim = config.dim, config.attention_head_dim
    core = 4 * tokens * dim
    if _softmax_tokens(tokens, rate) < tokens and workload.feature_map:
        maps = 2 * _feature_map_weights(workload.feature_map, config.num_attention_heads, head_dim)
        core += maps + 2 * dim * workload.feature_map.degree * (head_dim + 1)
    values = BlockCost(
        core=core,
        projections=4 * dim**2 + 6 * tokens * dim,
        cross_attention=4 * dim**2 + (6 * tokens + 5 * text_len) * dim,
        ffn=2 * dim * config.ffn_dim + 2 * tokens * (dim + config.ffn_dim),
    )
    return BlockCost(*(bytes_per_value * count for count in vars(values).values()))


def parameters(config: WanConfig) -> int:
    """Parameters of a network, the feature maps of its hybrid blocks included."""
    dim, patch, hybrid = config.dim, math.prod(config.patch_size), config.hybrid

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    attention = 4 * linear(dim, dim) + 2 * dim
    feed_forward = linear(dim, config.ffn_dim) + linear(config.ffn_dim, dim)
    modulation = 6 * dim
    cross_norm = 2 * dim if config.cross_attn_norm else 0
    time = linear(config.freq_dim, dim) + linear(dim, dim) + linear(dim, 6 * dim)
    text = linear(config.text_dim, dim) + linear(dim, dim)
    patches = linear(patch * config.in_channels, dim)
    head = linear(dim, patch * config.out_channels) + 2 * dim

    maps = 0
    if hybrid and hybrid.linear_branch:
        heads, phi = config.num_attention_heads, hybrid.feature_map
        one = feature_map_cost(phi.degree, phi.layers, heads, config.attention_head_dim, tokens=0).parameters
        maps = 2 * len(hybrid.converted) * (one + heads)  # one calibrated scale per head on top of Table 7's count
    blocks = config.num_layers * (2 * attention + feed_forward + modulation + cross_norm)
    return blocks + time + text + patches + head + maps


def _softmax_tokens(tokens: int, rate: Rate) -> int:
    if rate == "linear":
        return 0
    if isinstance(rate, str) or rate < 1:
        raise InputError(f"rate: expected an integer of at least 1 or 'linear', found {rate!r}")
    return -(-tokens // rate)


def _feature_map_weights(feature_map: FeatureMapConfig, heads: int, head_dim: int) -> int:
    width = feature_map.degree * head_dim
    return heads * (head_dim * width + (feature_map.layers - 1) * width**2)
