"""The mobile form of the transformer, compared with our JAX model; the operations of its graph; float16."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import InputError
from jsurgery.export import mobile_model
from jsurgery.export.mobile_layout import PrefixSlices, TokenLayout
from jsurgery.export.mobile_model import mobile_block, mobile_transformer
from jsurgery.export.torch_model import load
from jsurgery.wan.checkpoint import save_transformer
from jsurgery.wan.model_config import WanConfig

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 4, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 40,
}  # fmt: skip
MIXED = (4, 1, "linear", 2, 8)
GRID = (3, 3, 7)  # 63 tokens
HYBRIDS = {
    "full": None,
    "max": HybridConfig(MIXED, stabilizer="max"),
    "lse": HybridConfig(MIXED),
    "staggered": HybridConfig(MIXED, lattice="staggered_rows"),
    "cubic": HybridConfig((9, 1, 3), (1, 3, 9), "staggered", "max", feature_map=FeatureMapConfig(3, 1, "softplus")),
    "no linear branch": HybridConfig((8, 1, 2), linear_branch=False),
}


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def saved(random_transformer, tmp_path_factory):
    """A function that returns (model, folder) of a case of HYBRIDS, every tensor random."""
    cache = {}

    def saved(case):
        if case not in cache:
            hybrid = HYBRIDS[case]
            config = WanConfig(**SIZES, num_layers=len(hybrid.rates) if hybrid else 2, hybrid=hybrid)
            cache[case] = random_transformer(config), tmp_path_factory.mktemp("model")
            save_transformer(*cache[case])
        return cache[case]

    return saved


def inputs():
    rng = np.random.default_rng(1)
    frames, height, width = GRID
    latents = rng.normal(size=(frames, 2 * height, 2 * width, SIZES["in_channels"])).astype(np.float32)
    return latents, np.array([987.0], np.float32), rng.normal(size=(1, 5, SIZES["text_dim"])).astype(np.float32)


def run(module, *arguments):
    with torch.no_grad():
        return module(*(torch.tensor(x) for x in arguments))


@pytest.mark.parametrize("case", HYBRIDS)
def test_equals_the_jax_model_and_the_torch_module(saved, case):
    model, folder = saved(case)
    latents, timestep, text = inputs()
    source = load(folder)
    velocity = run(mobile_transformer(source, latents.shape[:3]), latents, timestep, text)
    torch_velocity = run(source, latents.transpose(3, 0, 1, 2)[None], timestep, text).sample[0].permute(1, 2, 3, 0)
    assert relative_error(velocity, torch_velocity) < 1e-5
    if case in ("max", "lse", "no linear branch"):
        return  # test_torch_model compares the torch module with JAX
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, *given: nnx.merge(graph, state)(*given))
    with jax.default_matmul_precision("highest"):
        expected = compiled(state, latents[None], timestep, text)[0]
    assert relative_error(velocity, expected) < 1e-5


@pytest.mark.parametrize("case", ["max", "lse"])
def test_tiling_does_not_change_the_velocity(saved, case):
    source, arguments = load(saved(case)[1]), inputs()
    shape = arguments[0].shape[:3]
    untiled, tiled = (run(mobile_transformer(source, shape, tile=tile), *arguments) for tile in (63, 10))
    assert relative_error(tiled, untiled) < 1e-6


@pytest.mark.parametrize("case", ["max", "lse"])
def test_groups_of_heads_do_not_change_the_velocity(saved, case, monkeypatch):
    source, arguments = load(saved(case)[1]), inputs()
    shape = arguments[0].shape[:3]
    together = run(mobile_transformer(source, shape), *arguments)
    monkeypatch.setattr(mobile_model, "HEADS", 1)
    assert relative_error(run(mobile_transformer(source, shape), *arguments), together) < 1e-6


@pytest.mark.parametrize("case", ["lse", "cubic"])
def test_control_another_feature_map_changes_the_velocity(saved, case):
    source, arguments = load(saved(case)[1]), inputs()
    shape = arguments[0].shape[:3]
    expected = run(mobile_transformer(source, shape), *arguments)
    maps = {name: p for name, p in source.named_parameters() if ".phi_" in name}
    assert maps
    for name, parameter in maps.items():
        if case == "lse" and name.startswith("blocks.2.") and name.endswith("log_scale"):
            continue  # the scale of a linear block cancels
        kept = parameter.data
        parameter.data = kept + 0.1
        assert relative_error(run(mobile_transformer(source, shape), *arguments), expected) > 1e-5, name
        parameter.data = kept


@pytest.mark.parametrize("hybrid", [hybrid for hybrid in HYBRIDS.values() if hybrid], ids=lambda hybrid: hybrid.lattice)
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 2, 2), (3, 3, 7), (5, 4, 6)])
def test_softmax_tokens_of_every_rate_are_a_prefix_of_the_slices(hybrid, grid):
    order, slices = hybrid.token_order(grid), PrefixSlices.of(hybrid, grid)
    assert sorted(slices.permutation) == list(range(math.prod(grid)))
    for rate in (*hybrid.chain, "linear"):
        kept = order.num_softmax(rate)
        assert set(slices.permutation[:kept]) == set(order.permutation[:kept])


@pytest.mark.parametrize("case", ["max", "cubic"])
def test_the_graph_has_tensors_of_rank_4_at_most_and_no_gather(saved, case):
    arguments = tuple(torch.tensor(x) for x in inputs())
    module = mobile_transformer(load(saved(case)[1]), arguments[0].shape[:3])
    graph = torch.export.export(module, arguments).graph
    assert {node.meta["val"].ndim for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)} <= {
        0, 1, 2, 3, 4,
    }  # fmt: skip
    operations = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert any("softmax" in name for name in operations)
    assert not [name for name in operations if any(word in name for word in ("index", "gather", "complex", "exp."))]


def test_float16_holds_the_linear_state(saved):
    """The features of large keys, summed over the tokens, overflow float16; the mobile model's state does not."""
    source = load(saved("lse")[1])
    layout = TokenLayout.of(source.config, (GRID[0], 2 * GRID[1], 2 * GRID[2]))
    attention = source.blocks[4].attn1  # rate 8
    attention.phi_q.log_scale.data[:] = -18.0
    attention.phi_k[1].kernel.data *= 100
    attention.phi_k[1].bias.data += 3000
    mobile = mobile_block(source, 4, layout).attn1
    rng = np.random.default_rng(0)
    q, k, v = (torch.tensor(rng.normal(size=(1, 2, 63, 16)).astype(np.float32)) for _ in range(3))
    linear = k[:, :, layout.softmax[8] :]
    with torch.no_grad():
        plain, scaled = attention.phi_k(linear), torch.cat(mobile.phi_k[0](linear), dim=-1)
        half = mobile.half().attend(0, q.half(), k.half(), v.half()).float()
        full = mobile.float().attend(0, q, k, v)
    assert plain.sum(dim=2).max() > 65504 > 4 * scaled.sum(dim=2).max()
    assert torch.isfinite(half).all() and relative_error(half, full) < 5e-3


def test_float16_holds_a_linear_block(saved):
    """The sum of the weighted values overflows float16; their mean does not."""
    source = load(saved("lse")[1])
    layout = TokenLayout.of(source.config, (GRID[0], 2 * GRID[1], 2 * GRID[2]))
    attention = source.blocks[2].attn1
    rng = np.random.default_rng(0)
    q, k, v = (torch.tensor(rng.normal(size=(1, 2, 63, 16)).astype(np.float32)) for _ in range(3))
    v += 8
    with torch.no_grad():
        attention.phi_q.log_scale += math.log(2e4 / (attention.phi_q(q) @ attention.phi_k(k).mT).sum(dim=-1).max())
        weighted_sum = attention.phi_q(q) @ attention.phi_k(k).mT @ v
        mobile = mobile_block(source, 2, layout).attn1
        full = mobile.attend(0, q, k, v)
        half = mobile.half().attend(0, q.half(), k.half(), v.half()).float()
    assert weighted_sum.max() > 65504
    assert torch.isfinite(half).all() and relative_error(half, full) < 5e-3


def test_patches_of_several_frames_are_refused(saved):
    source = load(saved("full")[1])
    config = dataclasses.replace(source.config, patch_size=(2, 2, 2))
    with pytest.raises(InputError, match="patch_size"):
        TokenLayout.of(config, (4, 4, 4))
