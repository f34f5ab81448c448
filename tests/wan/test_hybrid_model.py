"""Hybrid models and their gradients against a second model in torch float64.

The second model has tokens in natural order and attention weights for all pairs of tokens (`tests/equation_5.py`). It
shares only the tensors with the project, by their names in the diffusers layout.
"""

import functools
import json
import math
import re

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional as F

from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.hybrid import HybridConfig, token_order
from jsurgery.errors import InputError
from jsurgery.io.safetensors import read_tensors, write_tensors
from jsurgery.surgery.operate import operate
from jsurgery.wan import checkpoint_layouts
from jsurgery.wan.checkpoint import load_transformer, save_transformer
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer
from pallas_kernels.api import hybrid_attention
from tests import equation_5

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 4, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 40,
}  # fmt: skip
MIXED = (4, 1, "linear", 2, 8)
GRIDS = {"24 tokens": (3, 2, 4), "27 tokens": (3, 3, 3)}  # rates 2, 4 and 8 divide 24, none divides 27


def natural(j, rate, site):
    return j % rate == 0


def off_by_one(j, rate, site):
    return j % rate == (1 if rate > 1 else 0)


def staggered(j, rate, site):
    return (j + site[0]) % rate == 0


def staggered_by_rows(j, rate, site, rows=3):
    return (j + rows * site[0] + site[1]) % rate == 0


def hybrid_attention_of(tensors, prefix, q, k, v, rate, sites, hybrid, lattice):
    """Eq. 5 in one block, for q, k, v [H, N, D] in natural order."""
    in_S = torch.tensor([[rate != "linear" and lattice(j, rate, site) for j, site in enumerate(sites)]])
    in_L = ~in_S if hybrid.linear_branch else torch.zeros_like(in_S)

    def phi(side, x):
        tensor = lambda name: tensors[f"{prefix}.phi_{side}.{name}"]
        kernels, biases = (
            [tensor(f"{layer}.{kind}") for layer in range(hybrid.feature_map.layers)] for kind in ("kernel", "bias")
        )
        shape = hybrid.feature_map.degree, hybrid.feature_map.activation
        return equation_5.feature_map(x, kernels, biases, tensor("log_scale"), *shape)

    return equation_5.equation_5(
        q, k, v, functools.partial(phi, "q"), functools.partial(phi, "k"), in_S, in_L, stabilizer=hybrid.stabilizer
    ).y


def apply_rope(x, sites):
    """RoPE of [H, N, D]: pairs of channels are rotated by time, then height, then width."""
    width = x.shape[-1]
    third = 2 * (width // 6)
    angles = torch.tensor([
        [
            site[axis] * 10_000.0 ** (-pair / size)
            for axis, size in enumerate((width - 2 * third, third, third))
            for pair in range(0, size, 2)
        ]
        for site in sites
    ]).double()  # fmt: skip
    rotated = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(rotated).flatten(-2)


def brute_force(tensors, config, latents, timestep, text, lattice=natural, given_frames=0):
    """The velocity [T, H, W, C] of one example. The tokens of the first `given_frames` frames have timestep 0."""
    hybrid, heads = config.hybrid, config.num_attention_heads
    frames, height, width, _ = latents.shape
    sites = [(t, y, x) for t in range(frames) for y in range(height // 2) for x in range(width // 2)]

    def linear(name, x):
        return F.linear(x, tensors[f"{name}.weight"].flatten(1), tensors[f"{name}.bias"])

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=config.eps)

    def project(name, x, context):
        q, k, v = linear(f"{name}.to_q", x), linear(f"{name}.to_k", context), linear(f"{name}.to_v", context)
        q, k = (
            F.rms_norm(t, t.shape[-1:], tensors[f"{name}.norm_{side}.weight"], config.eps)
            for side, t in (("q", q), ("k", k))
        )
        return (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))

    half = config.freq_dim // 2
    timesteps = torch.tensor([[0.0 if site[0] < given_frames else float(timestep)] for site in sites]).double()
    angles = timesteps * 10_000.0 ** (-torch.arange(half).double() / half)
    time = linear("condition_embedder.time_embedder.linear_1", torch.cat([torch.cos(angles), torch.sin(angles)], -1))
    time = linear("condition_embedder.time_embedder.linear_2", F.silu(time))
    modulation = linear("condition_embedder.time_proj", F.silu(time)).unflatten(-1, (6, -1))
    text = F.gelu(linear("condition_embedder.text_embedder.linear_1", text), approximate="tanh")
    text = linear("condition_embedder.text_embedder.linear_2", text)

    patches = [latents[t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].permute(2, 0, 1).flatten() for t, y, x in sites]
    x = linear("patch_embedding", torch.stack(patches))
    for i, rate in enumerate(hybrid.rates):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (tensors[f"{block}.scale_shift_table"] + modulation).unbind(1)
        h = norm(x) * (1 + scale1) + shift1
        q, k, v = project(f"{block}.attn1", h, h)
        q, k = apply_rope(q, sites), apply_rope(k, sites)
        y = hybrid_attention_of(tensors, f"{block}.attn1", q, k, v, rate, sites, hybrid, lattice)
        x = x + gate1 * linear(f"{block}.attn1.to_out.0", y.transpose(0, 1).flatten(1))
        h = norm(x) * tensors[f"{block}.norm2.weight"] + tensors[f"{block}.norm2.bias"]
        q, k, v = project(f"{block}.attn2", h, text)
        y = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
        x = x + linear(f"{block}.attn2.to_out.0", y.transpose(0, 1).flatten(1))
        h = norm(x) * (1 + scale2) + shift2
        x = x + gate2 * linear(f"{block}.ffn.net.2", F.gelu(linear(f"{block}.ffn.net.0.proj", h), approximate="tanh"))
    shift, scale = (tensors["scale_shift_table"] + time[:, None]).unbind(1)
    out = linear("proj_out", norm(x) * (1 + scale) + shift)
    return out.unflatten(0, (frames, height // 2, width // 2)).unflatten(-1, (2, 2, -1)).transpose(2, 3).reshape(
        frames, height, width, -1
    )  # fmt: skip


@pytest.fixture(scope="module")
def build(random_transformer):
    """A function that makes a model with random tensors, hybrid or not."""

    def build(hybrid: HybridConfig | None) -> WanTransformer:
        return random_transformer(WanConfig(**SIZES, num_layers=len(hybrid.rates if hybrid else MIXED), hybrid=hybrid))

    return build


def inputs(grid):
    rng = np.random.default_rng(1)
    frames, height, width = grid
    latents = rng.normal(size=(2, frames, 2 * height, 2 * width, SIZES["in_channels"])).astype(np.float32)
    text = rng.normal(size=(2, 5, SIZES["text_dim"])).astype(np.float32)
    # Small timesteps: near 1000 the float32 sinusoids of the model have errors of 1e-4.
    return latents, np.array([31.0, 4.5], np.float32), text


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def run(graph, params, latents, timesteps, text, order=None, given_frames=0):
    """The velocity; with `order`, that of full softmax on tokens in this order."""
    model = nnx.merge(graph, params)
    if order is None:
        return model(latents, timesteps, text, given_frames)
    full = lambda q, k, v, _: (hybrid_attention(q, k, v, None, None, num_softmax=k.shape[1]), None)
    return model.apply_blocks(latents, timesteps, text, full, None, order=order)[0]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(graph, params, arguments, cotangent):
    velocity, pullback = jax.vjp(lambda params: nnx.merge(graph, params)(*arguments), params)
    return velocity, pullback(cotangent)[0]


def in_double(model):
    tensors = checkpoint_layouts.transformer_tensors(model).items()
    return {name: torch.tensor(tensor, dtype=torch.float64, requires_grad=True) for name, tensor in tensors}


def brute_force_batch(tensors, config, latents, timesteps, text, lattice=natural, given_frames=0):
    latents, timesteps, text = (torch.tensor(x).double() for x in (latents, timesteps, text))
    examples = zip(latents, timesteps, text, strict=True)
    return torch.stack([brute_force(tensors, config, *example, lattice, given_frames) for example in examples])


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def gradient_error(gradients, tensors):
    """The largest relative error of a tensor's gradient.

    The tensors of a feature map count as one, since log_scale has the gradient 0 in a purely linear block.
    """
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(re.sub(r"(phi_[qk]).*", r"\1", name), []).append(name)
    flat = lambda arrays, names: np.concatenate([np.ravel(arrays[name]) for name in names])
    expected = {name: tensor.grad.numpy() for name, tensor in tensors.items()}
    return max(relative_error(flat(gradients, names), flat(expected, names)) for names in groups.values())


CASES = {
    "max": HybridConfig(MIXED, stabilizer="max"),
    "lse": HybridConfig(MIXED, stabilizer="lse"),
    "cubic": HybridConfig((2, 1, 4), (1, 2, 4), "staggered", feature_map=FeatureMapConfig(3, 1, "softplus")),
    "no linear branch": HybridConfig((8, 1, 2), linear_branch=False),
    "rows": HybridConfig((2, 1, 4), (1, 2, 4), "staggered_rows"),
}


@pytest.mark.parametrize(
    ("case", "grid", "with_gradients"),
    [
        ("max", "24 tokens", False),
        ("max", "27 tokens", True),
        ("lse", "24 tokens", True),
        ("lse", "27 tokens", False),
        ("cubic", "27 tokens", True),
        ("no linear branch", "27 tokens", False),
        ("rows", "24 tokens", False),
    ],
)
def test_velocity_and_gradients_are_those_of_the_second_model(build, case, grid, with_gradients):
    model, arguments = build(CASES[case]), inputs(GRIDS[grid])
    by_rows = functools.partial(staggered_by_rows, rows=GRIDS[grid][1])
    lattices = {"strided": natural, "staggered": staggered, "staggered_rows": by_rows}
    lattice = lattices.pop(CASES[case].lattice)
    tensors = in_double(model)
    expected = brute_force_batch(tensors, model.config, *arguments, lattice)
    graph, params = nnx.split(model)
    if with_gradients:
        cotangent = np.random.default_rng(2).normal(size=expected.shape).astype(np.float32)
        velocity, gradients = value_and_gradients(graph, params, arguments, cotangent)
        gradients = checkpoint_layouts.transformer_tensors(nnx.merge(graph, gradients))
        (expected * torch.tensor(cotangent)).sum().backward()
        assert gradients.keys() == tensors.keys()
        assert gradient_error(gradients, tensors) < 1e-5
    else:
        velocity = run(graph, params, *arguments)
    assert relative_error(velocity, expected.detach()) < 1e-5

    with torch.no_grad():
        for wrong in (off_by_one, *lattices.values()):
            other = brute_force_batch(tensors, model.config, *arguments, wrong)
            assert relative_error(velocity, other) > 1e-2, wrong


def test_given_frames_keep_their_timestep_in_every_order_of_the_tokens(build):
    """Image to video through hybrid blocks: the mask of the given tokens is permuted with them."""
    model, arguments = build(CASES["max"]), inputs(GRIDS["27 tokens"])
    with torch.no_grad():
        expected = {n: brute_force_batch(in_double(model), model.config, *arguments, natural, n) for n in (0, 1)}
    velocity = run(*nnx.split(model), *arguments, None, 1)
    assert relative_error(velocity, expected[1]) < 1e-5
    assert relative_error(velocity, expected[0]) > 1e-2


def test_control_every_tensor_affects_the_second_model(build):
    """Except the two scales of the linear block, which cancel."""
    model, arguments = build(CASES["max"]), inputs(GRIDS["27 tokens"])
    tensors = in_double(model)
    brute_force_batch(tensors, model.config, *arguments).square().sum().backward()
    without_effect = [name for name, tensor in tensors.items() if not tensor.grad.abs().max() > 1e-3]
    assert sorted(without_effect) == ["blocks.2.attn1.phi_k.log_scale", "blocks.2.attn1.phi_q.log_scale"]


@pytest.fixture(scope="module")
def teacher(build):
    return build(None)


@pytest.mark.parametrize("grid", GRIDS)
def test_an_all_softmax_plan_and_another_token_order_equal_the_teacher(teacher, grid):
    arguments = inputs(GRIDS[grid])
    expected = run(*nnx.split(teacher), *arguments)
    operated = operate(teacher, HybridConfig((1,) * len(MIXED)), None)
    assert np.array_equal(run(*nnx.split(operated), *arguments), expected)

    order = token_order(GRIDS[grid], (1, 2, 4, 8), "strided")
    assert (order.permutation != np.arange(order.num_tokens)).any()
    permuted = run(*nnx.split(teacher), *arguments, order)
    assert not np.array_equal(permuted, expected)  # rounded differently
    assert relative_error(permuted, expected) < 1e-5
    assert np.abs(permuted - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_saved_hybrid_loads_as_it_was(build, tmp_path):
    hybrid = CASES["cubic"]
    model = build(hybrid)
    save_transformer(model, tmp_path)
    loaded = load_transformer(tmp_path)
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(loaded)), nnx.to_pure_dict(nnx.state(model)))

    tensors = read_tensors(tmp_path)
    of_maps = {name.split(".phi")[0] for name in tensors if ".phi_" in name}
    assert of_maps == {"blocks.0.attn1", "blocks.2.attn1"}
    assert np.array_equal(tensors["blocks.2.attn1.phi_k.0.kernel"], model.key_maps.kernels[0][...][1])

    lacking = {name: tensor for name, tensor in tensors.items() if name != "blocks.2.attn1.phi_k.0.bias"}
    write_tensors(next(tmp_path.glob("*.safetensors")), lacking)
    with pytest.raises(InputError, match=r"missing blocks.2.attn1.phi_k.0.bias \(2, 48\)"):
        load_transformer(tmp_path)


def test_bad_hybrid_configs_are_refused(build, tmp_path):
    save_transformer(build(CASES["cubic"]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "hashes.json").unlink()
    for change, message in [
        ({"format_version": 99}, "hybrid.format_version: this jsurgery reads 1, found 99"),
        ({"rates": [2, 1]}, "hybrid.rates has 2 entries"),
        ({"temperature": 1.0}, "temperature"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | {"hybrid": config["hybrid"] | change}))
        with pytest.raises(InputError, match=message):
            load_transformer(tmp_path)


def test_a_hybrid_has_no_original_layout(build):
    with pytest.raises(InputError, match="no original layout"):
        checkpoint_layouts.transformer_tensors(build(CASES["cubic"]), "original")


def test_diffusers_refuses_a_hybrid(build, tmp_path):
    save_transformer(build(CASES["cubic"]), tmp_path)
    with pytest.raises(ValueError, match="HybridWanTransformer3DModel"):
        diffusers.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
