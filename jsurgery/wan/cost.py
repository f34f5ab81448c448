"""Parameters, FLOPs and bytes of Wan's transformer, with softmax or hybrid self-attention, and of its text encoder.

One multiply-add is 2 FLOP. Softmax, norms, activations and modulation are not counted. "core" is attention with phi and
without the projections. All counts are for batch 1 and one forward pass. `vae_cost` counts the VAE.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from ml_collections import ConfigDict

from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.kinds.base import AttentionSize
from jsurgery.attention.kinds.registry import kind_of
from jsurgery.attention.map_sizes import map_parameters
from jsurgery.rates import Rate
from jsurgery.wan.model_config import TextEncoderConfig, WanConfig
from jsurgery.wan.video_size import latent_grid, num_tokens

# The fields of a BlockCost, and its total.
PARTS = ("core", "projections", "cross_attention", "ffn", "total")


@dataclass(frozen=True)
class Workload:
    """A network and the video that it computes.

    Attributes:
      config: the network's sizes; its own kinds, if it has any, are ignored.
      tokens: N, the video's tokens (`num_tokens`).
      text_len: text tokens, padding included.
      feature_map: phi of hybrid blocks; None where they have no linear branch.
      frames: the latent frames that the tokens make up. Softmax, R-hybrids and linear attention do not depend on it.
    """

    config: WanConfig
    tokens: int
    text_len: int = 512
    feature_map: FeatureMapConfig | None = field(default_factory=FeatureMapConfig)
    frames: int = 1

    def of_video(self, frames: int, height: int, width: int) -> "Workload":
        """The same network on a video of this size in pixels."""
        tokens = num_tokens(frames, height, width, self.config)
        latents = latent_grid(frames, height, width, self.config.strides)
        return replace(self, tokens=tokens, frames=self.config.token_grid(latents)[0])

    @property
    def attention(self) -> AttentionSize:
        """The size of one block's attention."""
        config = self.config
        return AttentionSize(
            self.tokens, self.frames, config.num_attention_heads, config.attention_head_dim, self.feature_map
        )


@dataclass(frozen=True)
class BlockCost:
    """FLOPs or bytes of one block, by part."""

    core: int
    projections: int
    cross_attention: int
    ffn: int

    @property
    def total(self) -> int:
        return self.core + self.projections + self.cross_attention + self.ffn


@dataclass(frozen=True)
class Cost:
    """Parameters, FLOPs, and the fewest bytes that must be moved to and from memory."""

    parameters: int = 0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Self) -> "Cost":
        return Cost(self.parameters + other.parameters, self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class FeatureMapCost:
    """Parameters and FLOPs of one feature map; a hybrid block has two."""

    parameters: int
    flops: int


def workload(config: ConfigDict, model: WanConfig) -> Workload:
    """The workload of one forward pass of `model` on a video of the size in `config.video`."""
    video = config.video
    phi = FeatureMapConfig.of(config) if config.hybrid.linear_branch else None
    return Workload(model, 0, config.text_length, phi).of_video(video.frames, video.height, video.width)


def model_flops(workload: Workload, rates: Iterable[Rate]) -> int:
    """FLOPs of one forward pass: blocks with these rates, one per block, embeddings and head."""
    return embeddings_cost(workload).flops + sum(block_flops(workload, rate).total for rate in rates)


def block_flops(workload: Workload, rate: Rate) -> BlockCost:
    """FLOPs of one block, by part."""
    dim, tokens, text_len = workload.config.dim, workload.tokens, workload.text_len
    return BlockCost(
        core=core_flops(workload, rate),
        projections=8 * tokens * dim**2,
        cross_attention=4 * (tokens + text_len) * dim**2 + 4 * tokens * text_len * dim,
        ffn=4 * tokens * dim * workload.config.ffn_dim,
    )


def core_flops(workload: Workload, rate: Rate) -> int:
    """FLOPs of one block's self-attention of a kind, 1 (softmax), 2, "linear", "C3O1", without projections.

    See `Kind.flops`. At rate R softmax runs over ceil(N / R) keys, and the others are linear.
    """
    return kind_of(rate).flops(workload.attention)


def distillation_flops(workload: Workload, rates: Iterable[Rate]) -> int:
    """FLOPs of one distillation step on one example, with every block of all these kinds.

    The teacher runs once. The linear branch of each kind runs forward, and backward at twice the FLOPs. The softmax
    branch of an R-hybrid is the teacher's own; that of another kind runs forward. None has a gradient.
    """
    config = workload.config
    branches = sum(kind_of(rate).distillation_flops(workload.attention) for rate in rates)
    return model_flops(workload, (1,) * config.num_layers) + config.num_layers * branches


def model_bytes(workload: Workload, rates: Iterable[Rate], bytes_per_value: int = 2) -> int:
    """The least memory traffic of one forward pass; see `block_bytes`."""
    blocks = sum(block_bytes(workload, rate, bytes_per_value).total for rate in rates)
    return embeddings_cost(workload, bytes_per_value).bytes + blocks


def block_bytes(workload: Workload, rate: Rate, bytes_per_value: int = 2) -> BlockCost:
    """The least memory traffic of one block, by part: weights, inputs and outputs of every product move once.

    Scores, features and all elementwise work stay on the chip. The linear branch's state is written and read once.
    """
    config, tokens, text_len = workload.config, workload.tokens, workload.text_len
    dim = config.dim
    values = BlockCost(
        core=kind_of(rate).core_values(workload.attention),
        projections=4 * dim**2 + 6 * tokens * dim,
        cross_attention=4 * dim**2 + (6 * tokens + 5 * text_len) * dim,
        ffn=2 * dim * config.ffn_dim + 2 * tokens * (dim + config.ffn_dim),
    )
    return BlockCost(*(bytes_per_value * count for count in vars(values).values()))


def distillation_bytes(workload: Workload, rates: Sequence[Rate]) -> int:
    """The least memory traffic of one distillation step with the loss "value" on one example, every block at all rates.

    Beside the teacher's: the softmax branch of every R-hybrid and full softmax, in float32, are written once, and each
    kind moves its `Kind.distillation_values`. Scores and features stay on the chip.
    """
    config, size, kinds = workload.config, workload.attention, [kind_of(rate) for rate in rates]
    zones = {kind.prefix_keys(size) for kind in kinds} | {size.tokens}
    halves, singles = 0, len(zones - {0, None}) * size.tokens  # values of 16 and of 32 bits, a channel
    for kind in kinds:
        of_kind = kind.distillation_values(size)
        halves, singles = halves + of_kind[0], singles + of_kind[1]
    teacher = model_bytes(workload, (1,) * config.num_layers)
    return teacher + config.num_layers * config.dim * (2 * halves + 4 * singles)


def share(block: BlockCost) -> float:
    """The share of a block's cost that is self-attention, projections included."""
    return (block.core + block.projections) / block.total


def savings(work: Workload, rates: Sequence[Rate]) -> dict[str, float]:
    """The shares of the teacher's FLOPs that a plan saves: in attention cores, in blocks and in the whole network."""
    blocks = len(rates)
    core = sum(core_flops(work, rate) for rate in rates) / (blocks * core_flops(work, 1))
    block = sum(block_flops(work, rate).total for rate in rates) / (blocks * block_flops(work, 1).total)
    return {
        "core": 1 - core,
        "blocks": 1 - block,
        "network": 1 - model_flops(work, rates) / model_flops(work, [1] * blocks),
    }


def parameters(config: WanConfig) -> int:
    """Parameters of a network, the feature maps of its hybrid blocks included."""
    hybrid = config.hybrid
    maps = hybrid.feature_map if hybrid and hybrid.linear_branch else None
    outside = embeddings_cost(Workload(config, tokens=0, text_len=0)).parameters
    return outside + config.num_layers * block_parameters(config) + added_parameters(config, maps, config.rates)


def block_parameters(config: WanConfig) -> int:
    """Parameters of one block as published, that is, without feature maps."""
    dim = config.dim
    attention = 4 * (dim * dim + dim) + 2 * dim
    feed_forward = 2 * dim * config.ffn_dim + config.ffn_dim + dim
    modulation = 6 * dim
    cross_norm = 2 * dim if config.cross_attn_norm else 0
    return 2 * attention + feed_forward + modulation + cross_norm


def added_parameters(config: WanConfig, feature_map: FeatureMapConfig | None, rates: Iterable[Rate]) -> int:
    """Parameters that surgery adds: two maps for each converted block, each with one calibrated scale per head."""
    size = AttentionSize(1, 1, config.num_attention_heads, config.attention_head_dim, feature_map)
    return sum(kind_of(rate).parameters(size) for rate in rates)


def embeddings_cost(workload: Workload, bytes_per_value: int = 2) -> Cost:
    """The network outside its blocks: the projections of patches, timestep and text to the width, and the head."""
    config, dim, patch = workload.config, workload.config.dim, math.prod(workload.config.patch_size)
    layers = (
        (workload.tokens, patch * config.in_channels, dim),
        (workload.text_len, config.text_dim, dim),
        (workload.text_len, dim, dim),
        (1, config.freq_dim, dim),
        (1, dim, dim),
        (1, dim, 6 * dim),
        (workload.tokens, dim, patch * config.out_channels),
    )
    head_modulation = Cost(parameters=2 * dim)
    return sum((_linear(*layer, bytes_per_value) for layer in layers), head_modulation)


def feature_map_cost(degree: int, layers: int, heads: int, head_dim: int, tokens: int) -> FeatureMapCost:
    """One map phi of eq. 8 on `tokens` tokens, biases included, as in Table 7 of the paper.

    For degree 4, 2 layers and 12600 tokens Table 7 gives 70 GFLOP. Its own parameter count makes that 99.4 GFLOP, which
    is also the count here.
    """
    parameters = map_parameters(FeatureMapConfig(degree, layers), heads, head_dim)
    return FeatureMapCost(parameters, 2 * parameters * tokens)


def text_encoder_cost(config: TextEncoderConfig, tokens: int, bytes_per_value: int = 4) -> Cost:
    """The cost of one prompt of `tokens` tokens, padding included. The lookup of embeddings moves no bytes here."""
    inner, lookup = config.num_heads * config.d_kv, Cost(config.vocab_size * config.d_model)
    attention = attention_cost(1, tokens, inner, bytes_per_value) + Cost(
        config.relative_attention_num_buckets * config.num_heads
    )
    layers = [(config.d_model, inner)] * 3 + [(inner, config.d_model)]
    layers += [(config.d_model, config.d_ff)] * 2 + [(config.d_ff, config.d_model)]
    block = sum((_linear(tokens, *layer, bytes_per_value, bias=False) for layer in layers), attention)
    block += Cost(2 * config.d_model)
    return sum([block] * config.num_layers, lookup + Cost(config.d_model))


def attention_cost(batch: int, tokens: int, dim: int, bytes_per_value: int) -> Cost:
    """Softmax attention of all heads together, without projections: `dim` is the width of all heads."""
    return Cost(0, 4 * batch * tokens**2 * dim, bytes_per_value * 4 * batch * tokens * dim)


def _linear(rows: int, inputs: int, outputs: int, bytes_per_value: int, bias: bool = True) -> Cost:
    moved = bytes_per_value * (inputs * outputs + rows * (inputs + outputs))
    return Cost(inputs * outputs + bias * outputs, 2 * rows * inputs * outputs, moved)
