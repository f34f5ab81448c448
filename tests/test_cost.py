import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

from jsurgery.attention.hybrid import FeatureMapConfig, HybridConfig
from jsurgery.cost import (
    Workload,
    block_bytes,
    block_flops,
    core_flops,
    feature_map_cost,
    model_flops,
    num_tokens,
    parameters,
)
from jsurgery.errors import InputError
from jsurgery.wan.transformer import WanConfig, WanTransformer

WAN_1_3B = WanConfig()
WAN_14B = WanConfig(num_attention_heads=40, num_layers=40, ffn_dim=13824)
LARGE = Workload(WAN_1_3B, num_tokens(81, 480, 832))
SMALL = Workload(WAN_1_3B, num_tokens(81, 320, 480))
ODD = WanConfig(
    patch_size=(1, 2, 4), num_attention_heads=3, attention_head_dim=20, in_channels=5, out_channels=7, text_dim=11,
    freq_dim=14, ffn_dim=33, num_layers=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "frames, small, large", [(81, 12600, 32760), (101, 15600, 40560), (121, 18600, 48360), (141, 21600, 56160)]
)
def test_tokens(frames, small, large):
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
def test_sizes_that_the_strides_do_not_divide(size, message):
    with pytest.raises(InputError, match=message):
        num_tokens(*size)


# The paper's Table 7; it prints 70 GFLOP in the third row, which contradicts the 3.9 M beside it.
@pytest.mark.parametrize(
    "degree, layers, millions, gigaflops",
    [(2, 2, 1.2, 29.9), (3, 2, 2.4, 59.7), (4, 2, 3.9, 99.4), (6, 3, 15.4, 387.1)],
)
def test_feature_map_costs_what_table_7_says(degree, layers, millions, gigaflops):
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
    """Percent saved by `converted` of 30 blocks."""
    return round(100 * converted / 30 * (1 - cost_of(rate) / cost_of(1)), 1)


def test_savings():
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


def test_core_at_a_length_that_the_rate_does_not_divide():
    """By hand: 10 tokens, rate 4: tokens 0, 4, 8 keep softmax, 7 are linear; one head of width 2, phi 2 -> 6 -> 6."""
    config = WanConfig(num_attention_heads=1, attention_head_dim=2)
    workload = Workload(config, tokens=10, feature_map=FeatureMapConfig(degree=3, layers=2))
    softmax = 10 * 3 * (2 * 2 + 2 * 2)
    phi = (10 + 7) * (2 * 2 * 6 + 2 * 6 * 6)
    state = 7 * (2 * 6 * 2 + 6)
    read = 10 * (2 * 6 * 2 + 2 * 6)
    assert core_flops(workload, 4) == softmax + phi + state + read
    assert core_flops(dataclasses.replace(workload, feature_map=None), 4) == softmax
    for rate in (0, -2, "full"):
        with pytest.raises(InputError, match="rate: expected an integer"):
            core_flops(workload, rate)


def test_bytes():
    """By hand: 10 tokens, 6 text tokens, width 2, feed-forward 5; every matrix moves once, 2 bytes a number."""
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


@pytest.mark.parametrize("linear_branch", [True, False])
def test_parameters_are_those_of_the_hybrid_module(linear_branch):
    phi = FeatureMapConfig(degree=3, layers=3)
    hybrid = HybridConfig(rates=(1, 4), feature_map=phi, linear_branch=linear_branch)
    config = dataclasses.replace(ODD, hybrid=hybrid)
    module = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    assert parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
    assert (parameters(config) > parameters(ODD)) == linear_branch


def compiled_flops(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def softmax_attention(q_NxHxD, k_MxHxD, v_MxHxD):
    return jnp.einsum("hnm,mhd->nhd", jax.nn.softmax(jnp.einsum("nhd,mhd->hnm", q_NxHxD, k_MxHxD)), v_MxHxD)


TINY = WanConfig(num_attention_heads=2, attention_head_dim=64, ffn_dim=320)


def test_softmax_block_agrees_with_xla():
    tokens, text, dim = 250, 50, TINY.dim
    cost = block_flops(Workload(TINY, tokens, text_len=text), 1)
    heads = (tokens, 2, 64)
    assert compiled_flops(softmax_attention, heads, heads, heads) == pytest.approx(cost.core, rel=0.03)

    def projections(x_NxD, *weights):
        return [x_NxD @ weight for weight in weights]

    assert compiled_flops(projections, (tokens, dim), *[(dim, dim)] * 4) == pytest.approx(cost.projections, rel=0.03)

    def cross_attention(x_NxD, text_MxD, w_q, w_k, w_v, w_o):
        q, k, v = ((x @ w).reshape(-1, 2, 64) for x, w in ((x_NxD, w_q), (text_MxD, w_k), (text_MxD, w_v)))
        return softmax_attention(q, k, v).reshape(-1, dim) @ w_o

    shapes = (tokens, dim), (text, dim), *[(dim, dim)] * 4
    assert compiled_flops(cross_attention, *shapes) == pytest.approx(cost.cross_attention, rel=0.03)

    def feed_forward(x_NxD, w_in, w_out):
        return jax.nn.relu(x_NxD @ w_in) @ w_out

    assert compiled_flops(feed_forward, (tokens, dim), (dim, 320), (320, dim)) == pytest.approx(cost.ffn, rel=0.03)


@pytest.mark.parametrize("rate", [4, 8, "linear"])
def test_hybrid_core_agrees_with_xla(rate):
    tokens, width = 250, 128
    kept = 0 if rate == "linear" else int(np.ceil(tokens / rate))

    def phi(x_NxHxD, w_in, w_out):
        hidden_NxHxF = jax.nn.relu(jnp.einsum("nhd,hdf->nhf", x_NxHxD, w_in))
        first, second = jnp.split(jax.nn.relu(jnp.einsum("nhf,hfg->nhg", hidden_NxHxF, w_out)), 2, axis=-1)
        return jnp.concatenate([first, second**2], axis=-1)

    def hybrid(q, k, v, q_in, q_out, k_in, k_out):
        keys_MxHxF = phi(k[kept:], k_in, k_out)
        queries_NxHxF = phi(q, q_in, q_out)
        numerator = jnp.einsum("nhf,hfd->nhd", queries_NxHxF, jnp.einsum("mhf,mhd->hfd", keys_MxHxF, v[kept:]))
        denominator = jnp.einsum("nhf,hf->nh", queries_NxHxF, keys_MxHxF.sum(0))
        if kept:
            scores = jnp.exp(jnp.einsum("nhd,mhd->hnm", q, k[:kept]))
            numerator += jnp.einsum("hnm,mhd->nhd", scores, v[:kept])
            denominator += scores.sum(-1).T
        return numerator / denominator[..., None]

    flops = compiled_flops(hybrid, *[(tokens, 2, 64)] * 3, *[(2, 64, width), (2, width, width)] * 2)
    assert flops == pytest.approx(core_flops(Workload(TINY, tokens), rate), rel=0.03)
