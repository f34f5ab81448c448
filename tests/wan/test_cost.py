import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from flax import nnx
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.attention.map_sizes import map_parameters
from jsurgery.attention.rope import rope_tables
from jsurgery.errors import InputError
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.cost import (
    Workload,
    block_bytes,
    block_flops,
    core_flops,
    feature_map_cost,
    model_flops,
    parameters,
    text_encoder_cost,
)
from jsurgery.wan.model_config import TextEncoderConfig, VaeConfig, WanConfig
from jsurgery.wan.models import VAE_5B
from jsurgery.wan.transformer import Block, WanTransformer
from jsurgery.wan.vae import WanVae, decode_chunk, encode_chunk
from jsurgery.wan.vae_cost import kept_bytes, vae_cost
from jsurgery.wan.video_size import num_tokens
from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import init_hedgehog_map, init_polynomial_map

WAN_1_3B = WanConfig()
WAN_14B = WanConfig(num_attention_heads=40, num_layers=40, ffn_dim=13824)
HEDGEHOG = FeatureMapConfig(degree=1, layers=1, activation="hedgehog")
LARGE = Workload(WAN_1_3B, num_tokens(81, 480, 832))
SMALL = Workload(WAN_1_3B, num_tokens(81, 320, 480))
ODD = WanConfig(
    patch_size=(1, 2, 4), num_attention_heads=3, attention_head_dim=20, in_channels=5, out_channels=7, text_dim=11,
    freq_dim=14, ffn_dim=33, num_layers=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "frames, small, large", [(81, 12600, 32760), (101, 15600, 40560), (121, 18600, 48360), (141, 21600, 56160)]
)
def test_number_of_tokens(frames, small, large):
    assert num_tokens(frames, 320, 480) == small
    assert num_tokens(frames, 480, 832) == large


@pytest.mark.parametrize(
    "size, message",
    [
        ((80, 320, 480), r"frames: expected 4k \+ 1, found 80"),
        ((81, 328, 480), "height: expected a multiple of 16, found 328"),
        ((81, 320, 0), "width: expected a multiple of 16, found 0"),
        ((-3, 320, 480), r"frames: expected 4k \+ 1, found -3"),
    ],
)
def test_sizes_that_the_strides_do_not_divide_are_refused(size, message):
    with pytest.raises(InputError, match=message):
        num_tokens(*size)


# The paper's Table 7, except that its third row has 70 GFLOP, which contradicts its 3.9 M parameters.
@pytest.mark.parametrize(
    "degree, layers, millions, gigaflops",
    [(2, 2, 1.2, 29.9), (3, 2, 2.4, 59.7), (4, 2, 3.9, 99.4), (6, 3, 15.4, 387.1)],
)
def test_feature_map_costs_are_those_of_table_7(degree, layers, millions, gigaflops):
    cost = feature_map_cost(degree, layers, heads=12, head_dim=128, tokens=12600)
    assert round(cost.parameters / 1e6, 1) == millions
    assert round(cost.flops / 1e9, 1) == gigaflops


def test_block_flops_at_480x832():
    cost = block_flops(LARGE, 1)
    parts = [cost.core, cost.projections, cost.cross_attention, cost.ffn, cost.total]
    assert [round(part / 1e12, 3) for part in parts] == [6.594, 0.618, 0.417, 1.803, 9.433]
    assert round(100 * (cost.core + cost.projections) / cost.total, 2) == 76.46


CORE_TERAFLOPS = {
    1: (0.975, 1.495, 2.126, 2.867),
    8: (0.196, 0.279, 0.376, 0.486),
    4: (0.313, 0.460, 0.634, 0.836),
    2: (0.547, 0.821, 1.151, 1.535),
    "linear": (0.079, 0.098, 0.117, 0.136),
}


@pytest.mark.parametrize("rate", CORE_TERAFLOPS)
def test_core_flops_at_320x480(rate):
    workloads = [dataclasses.replace(SMALL, tokens=num_tokens(frames, 320, 480)) for frames in (81, 101, 121, 141)]
    assert tuple(round(core_flops(workload, rate) / 1e12, 3) for workload in workloads) == CORE_TERAFLOPS[rate]


def saving(cost_of, converted, rate):
    """The percentage that is saved if `converted` of 30 blocks have this rate."""
    return round(100 * converted / 30 * (1 - cost_of(rate) / cost_of(1)), 1)


def test_savings_of_plans():
    assert saving(lambda rate: core_flops(SMALL, rate), 15, 8) == 39.9
    assert saving(lambda rate: core_flops(LARGE, rate), 25, 2) == 39.7
    assert saving(lambda rate: core_flops(LARGE, rate), 15, 2) == 23.8
    assert saving(lambda rate: block_flops(LARGE, rate).total, 15, 2) == 16.7
    softmax, hybrid = model_flops(LARGE, [1] * 30), model_flops(LARGE, [8] * 20 + [1] * 10)
    assert round(100 * (1 - hybrid / softmax), 1) == 39.4


def test_speed_up_bounds():
    softmax = core_flops(LARGE, 1)
    assert [round(softmax / core_flops(LARGE, rate), 2) for rate in (2, 4, 8)] == [1.91, 3.61, 6.48]
    workload = dataclasses.replace(SMALL, tokens=num_tokens(121, 320, 480))
    before, after = block_flops(workload, 1), block_flops(workload, 8)
    assert before.core / after.core == pytest.approx(5.65, abs=0.01)  # 5.65 is the ratio of the rounded 2.126 and 0.376
    assert round((before.core + before.projections) / (after.core + after.projections), 1) == 3.4
    assert round(before.total / after.total, 2) == 1.88


def test_core_flops_counted_by_hand():
    """10 tokens at rate 4: tokens 0, 4, 8 keep softmax, 7 are linear. One head of width 2, phi 2 -> 6 -> 6."""
    config = WanConfig(num_attention_heads=1, attention_head_dim=2)
    workload = Workload(config, tokens=10, feature_map=FeatureMapConfig(degree=3, layers=2))
    softmax = 10 * 3 * (2 * 2 + 2 * 2)
    phi = (10 + 7) * (2 * 2 * 6 + 2 * 6 * 6)
    state = 7 * (2 * 6 * 2 + 6)
    read = 10 * (2 * 6 * 2 + 2 * 6)
    assert core_flops(workload, 4) == softmax + phi + state + read
    assert core_flops(dataclasses.replace(workload, feature_map=None), 4) == softmax
    for rate in (0, -2, "full"):
        with pytest.raises(InputError, match="rate: expected integers from 1 or 'linear'"):
            core_flops(workload, rate)


def test_bytes_counted_by_hand():
    """10 tokens, 6 text tokens, width 2, feed-forward 5. Every array is read or written once, 2 bytes a number."""
    config = WanConfig(num_attention_heads=1, attention_head_dim=2, ffn_dim=5)
    workload = Workload(config, tokens=10, text_len=6, feature_map=FeatureMapConfig(degree=3, layers=2))
    tokens, text, square = 10 * 2, 6 * 2, 2 * 2
    cost = block_bytes(workload, 1)
    assert cost.core == 2 * 4 * tokens
    assert cost.projections == 2 * (4 * square + (tokens + 3 * tokens) + (tokens + tokens))
    assert cost.cross_attention == 2 * (
        4 * square + (tokens + tokens) + (text + 2 * text) + (tokens + 2 * text + tokens) + (tokens + tokens)
    )
    assert cost.ffn == 2 * (2 * 2 * 5 + (tokens + 10 * 5) + (10 * 5 + tokens))
    maps, state = 2 * (2 * 6 + 6 * 6), 6 * (2 + 1)
    assert block_bytes(workload, 4).core == cost.core + 2 * (maps + 2 * state)
    assert block_bytes(workload, 1, bytes_per_value=4).total == 2 * cost.total


def test_published_parameter_counts():
    assert parameters(WAN_1_3B) == 1_418_996_800
    assert round(parameters(WAN_14B) / 1e9, 3) == 14.288


@pytest.mark.parametrize("config", [WAN_1_3B, ODD, dataclasses.replace(ODD, cross_attn_norm=False)])
def test_parameters_are_those_of_diffusers(config):
    fields = {key: value for key, value in vars(config).items() if key != "hybrid"}
    with torch.device("meta"):
        reference = WanTransformer3DModel(**fields)
    assert parameters(config) == sum(parameter.numel() for parameter in reference.parameters())


@pytest.mark.parametrize(
    "phi, linear_branch",
    [
        (FeatureMapConfig(degree=3, layers=3), True),
        (FeatureMapConfig(degree=3, layers=3), False),
        (HEDGEHOG, True),
    ],
)
def test_parameters_are_those_of_the_hybrid_module(phi, linear_branch):
    hybrid = HybridConfig(rates=(1, 4), feature_map=phi, linear_branch=linear_branch)
    config = dataclasses.replace(ODD, hybrid=hybrid)
    module = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    assert parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
    assert (parameters(config) > parameters(ODD)) == linear_branch


def xla_flops_of_block(config, rate, tokens, text, implementation, init_map=init_polynomial_map):
    """The FLOPs that XLA counts in one block, attention included. Without `init_map` it has no linear branch."""
    block = nnx.eval_shape(lambda: Block(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(block)
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    maps = jax.eval_shape(lambda key: init_map(key, heads, head_dim), jax.random.key(0)) if init_map else None
    kept = tokens if rate == 1 else 0 if rate == "linear" else -(-tokens // rate)

    def run(state, maps, x, text, modulation, cosine, sine):
        def attention(q, k, v):
            if maps is None:
                k, v = k[:, :kept], v[:, :kept]
            return hybrid_attention(q, k, v, maps, maps, num_softmax=kept, implementation=implementation)

        return nnx.merge(graph, state)(x, text, modulation, (cosine, sine), attention)

    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    rope = jax.eval_shape(lambda: rope_tables((1, 1, tokens), head_dim, 1024))
    inputs = shape(1, tokens, config.dim), shape(1, text, config.dim), shape(1, 6, config.dim)
    return jax.jit(run).lower(state, maps, *inputs, *rope).compile().cost_analysis()["flops"]


ONE_HEAD = WanConfig(num_attention_heads=1, attention_head_dim=256, ffn_dim=1100)
TWO_HEADS = WanConfig(num_attention_heads=2, attention_head_dim=128, ffn_dim=1100)


@pytest.mark.parametrize("rate", [1, 2, 8, "linear"])
def test_flops_of_a_block_agree_with_xla(rate):
    """They differ by norms, softmax and activations, which only XLA counts.

    The block has one head, since XLA counts the body of a loop once, and the implementation loops over heads.
    """
    tokens, text = 250, 50
    counted = block_flops(Workload(ONE_HEAD, tokens, text_len=text), rate).total
    assert 1 < xla_flops_of_block(ONE_HEAD, rate, tokens, text, "xla") / counted < 1.02


@pytest.mark.parametrize(
    "rate, phi, init_map",
    [
        (8, HEDGEHOG, lambda _, heads, width: init_hedgehog_map(heads, width)),
        ("linear", HEDGEHOG, lambda _, heads, width: init_hedgehog_map(heads, width)),
        (8, None, None),
    ],
)
def test_flops_with_hedgehog_or_without_linear_branch_agree_with_xla(rate, phi, init_map):
    tokens, text = 250, 50
    counted = block_flops(Workload(ONE_HEAD, tokens, text_len=text, feature_map=phi), rate).total
    assert 1 < xla_flops_of_block(ONE_HEAD, rate, tokens, text, "xla", init_map) / counted < 1.02


@pytest.mark.parametrize("rate", [1, 4, "linear"])
def test_flops_of_the_reference_implementation_agree_with_xla(rate):
    """It computes phi_q phi_k^T for all N x L pairs instead of a state. The count is corrected for that here."""
    tokens, text, config = 250, 50, TWO_HEADS
    counted = block_flops(Workload(config, tokens, text_len=text), rate).total
    linear = 0 if rate == 1 else tokens if rate == "linear" else tokens - -(-tokens // rate)
    if linear:
        features = 2 * config.dim
        counted += 2 * tokens * linear * (features + config.dim)
        counted -= (2 * features * 128) * (tokens + linear) + features * (2 * tokens + linear)
    assert 1 < xla_flops_of_block(config, rate, tokens, text, "reference") / counted < 1.02


def torch_flops(module, *inputs):
    """The FLOPs that torch counts, on the meta device, which computes nothing."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


SMALL_VAE = VaeConfig(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
SMALL_VAES = {
    "2.1": SMALL_VAE,
    "2.2": dataclasses.replace(SMALL_VAE, is_residual=True, patch_size=2, decoder_base_dim=12),
}


@pytest.mark.parametrize(("kind", "frames"), [("2.1", 1), ("2.1", 9), ("2.2", 5)])
def test_flops_of_the_vae_are_those_of_diffusers(kind, frames):
    config = SMALL_VAES[kind]
    stride = config.strides[1]
    with torch.device("meta"):
        reference = AutoencoderKLWan.from_config(config.to_json())
        encode, decode = vae_cost(config, frames, 4 * stride, 6 * stride)
        assert encode.flops == torch_flops(reference.encode, torch.zeros(1, 3, frames, 4 * stride, 6 * stride))
        latents = torch.zeros(1, 4, (frames - 1) // 4 + 1, 4, 6)
        assert decode.flops == torch_flops(reference.decode, latents)
    assert encode.parameters + decode.parameters == sum(leaf.numel() for leaf in reference.parameters())


@pytest.mark.parametrize("kind", SMALL_VAES)
def test_frames_kept_between_chunks_are_those_of_the_programs(kind):
    config = SMALL_VAES[kind]
    stride = config.strides[1]
    graph, state = nnx.split(abstract_module(WanVae, config))
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
    firsts = shape(1, 1, 2 * stride, 3 * stride, 3), shape(1, 1, 2, 3, 4)
    for run_chunk, first, expected in zip(
        (encode_chunk, decode_chunk), firsts, kept_bytes(config, 2 * stride, 3 * stride), strict=True
    ):
        kept = jax.eval_shape(functools.partial(run_chunk, graph), state, first)[1]
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)) == expected


def test_parameters_of_the_published_vaes_and_text_encoder():
    for config, millions in ((VaeConfig(), 127), (VaeConfig(**VAE_5B), 705)):
        encode, decode = vae_cost(config, 81, 480, 832)
        with torch.device("meta"):
            reference = AutoencoderKLWan.from_config(config.to_json())
        assert encode.parameters + decode.parameters == sum(leaf.numel() for leaf in reference.parameters())
        assert round((encode.parameters + decode.parameters) / 1e6) == millions
    assert round(text_encoder_cost(TextEncoderConfig(), 512).parameters / 1e9, 2) == 5.68


def test_flops_of_the_text_encoder_are_those_of_transformers():
    config = TextEncoderConfig(vocab_size=50, d_model=24, d_kv=6, d_ff=40, num_heads=3, num_layers=2)
    found = text_encoder_cost(config, 17)
    with torch.device("meta"):
        reference = UMT5EncoderModel(UMT5Config(**config.to_json()))
        ids = torch.zeros(1, 17, dtype=torch.long)
        assert found.flops == torch_flops(reference, ids)
    assert found.parameters == sum(leaf.numel() for leaf in reference.parameters())
    # Counted by hand: every matrix, its input and its output move once; attention reads q, k, v and writes y.
    projections, feed_forward = 4 * (24 * 18 + 17 * (24 + 18)), 3 * (24 * 40 + 17 * (24 + 40))
    assert text_encoder_cost(config, 17, bytes_per_value=1).bytes == 2 * (projections + feed_forward + 4 * 17 * 18)


def test_hedgehog_costs_counted_by_hand():
    """10 tokens at rate 4, one head of width 2: one layer 2 -> 2, and 4 features, exp(x) and exp(-x)."""
    config = WanConfig(num_attention_heads=1, attention_head_dim=2)
    workload = Workload(config, tokens=10, feature_map=HEDGEHOG)
    phi, state, read = (10 + 7) * 2 * 2 * 2, 7 * (2 * 4 * 2 + 4), 10 * (2 * 4 * 2 + 2 * 4)
    assert core_flops(workload, 4) == 10 * 3 * 8 + phi + state + read
    assert map_parameters(HEDGEHOG, heads=1, head_dim=2) == 2 * 2
    plain = block_bytes(workload, 1).core
    assert block_bytes(workload, 4).core == plain + 2 * (2 * 2 * 2 + 2 * 4 * (2 + 1))
    assert core_flops(dataclasses.replace(LARGE, feature_map=HEDGEHOG), 8) < core_flops(LARGE, 8)
