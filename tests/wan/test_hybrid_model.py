"""Hybrid models and their gradients against a second model in torch float64.

The second model has tokens in natural order and attention weights for all pairs of tokens (`tests/equation_5.py`). It
shares only the tensors with the project, by their names in the diffusers layout.
"""

import functools
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax import nnx

from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.hybrid import HybridConfig, token_order
from jsurgery.errors import InputError
from jsurgery.io.safetensors import read_tensors, write_tensors
from jsurgery.surgery.operate import operate
from jsurgery.wan import checkpoint_layouts
from jsurgery.wan.checkpoint import load_transformer, save_transformer
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer
from tests.wan.second_model import (
    SIZES,
    brute_force_batch,
    gradient_error,
    in_double,
    inputs,
    natural,
    off_by_one,
    relative_error,
    run,
    staggered,
    staggered_by_rows,
    value_and_gradients,
)

MIXED = (4, 1, "linear", 2, 8)
GRIDS = {"24 tokens": (3, 2, 4), "27 tokens": (3, 3, 3)}  # rates 2, 4 and 8 divide 24, none divides 27


@pytest.fixture(scope="module")
def build(random_transformer):
    """A function that makes a model with random tensors, hybrid or not."""

    def build(hybrid: HybridConfig | None) -> WanTransformer:
        return random_transformer(WanConfig(**SIZES, num_layers=len(hybrid.rates if hybrid else MIXED), hybrid=hybrid))

    return build


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
        ({"format_version": 99}, "hybrid.format_version: this jsurgery reads 1 and 2, found 99"),
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
