"""Models with sparse + linear attention (SLA) against the second model, which routes and attends by the formula."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from flax import nnx

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.attention.kinds.base import AttentionSize
from jsurgery.attention.kinds.registry import kind_of
from jsurgery.attention.map_sizes import map_parameters
from jsurgery.errors import InputError
from jsurgery.surgery.operate import operate
from jsurgery.wan import checkpoint_layouts
from jsurgery.wan.checkpoint import load_transformer, save_transformer
from jsurgery.wan.cost import Workload, added_parameters, core_flops
from jsurgery.wan.model_config import WanConfig
from tests.wan.second_model import (
    SIZES,
    brute_force_batch,
    check_formula,
    inputs,
    relative_error,
    run,
)

GRID = (5, 3, 3)  # 45 tokens, which neither a block of 8 nor a rate divides
CASES = {
    "with prefix order": HybridConfig(("S40B8", 2, 1), stabilizer="max"),
    "alone": HybridConfig(("S20B4", "S60B16")),
    "no linear branch": HybridConfig(("S30B8",), linear_branch=False),
}


@pytest.fixture(scope="module")
def build(random_transformer):
    return lambda hybrid: random_transformer(WanConfig(**SIZES, num_layers=len(hybrid.rates), hybrid=hybrid))


@pytest.mark.parametrize("case", CASES)
def test_velocity_and_gradients_are_those_of_the_formula(build, case):
    """Gradients are those at the routing."""
    model, arguments = build(CASES[case]), inputs(GRID)
    velocity, tensors = check_formula(model, arguments, with_gradients=case == "with prefix order")

    hybrid = model.config.hybrid
    more = {"S40B8": "S60B8", "S20B4": "S30B4", "S30B8": "S50B8"}
    wrong = [(tensors, tuple(more.get(str(rate), rate) for rate in hybrid.rates))]
    if hybrid.linear_branch:
        wrong.append(({name: 0 * x if "proj_l" in name else x for name, x in tensors.items()}, hybrid.rates))
    for others, rates in wrong:
        config = dataclasses.replace(model.config, hybrid=dataclasses.replace(hybrid, rates=rates))
        with torch.no_grad():
            assert relative_error(velocity, brute_force_batch(others, config, *arguments)) > 1e-3, rates


def test_a_checkpoint_has_the_projections_by_the_name_that_sla_gives_them(build, tmp_path):
    model = build(HybridConfig(("S40B8", 2, "S20B4")))
    save_transformer(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hybrid"]["format_version"] == 2
    tensors = checkpoint_layouts.transformer_tensors(model)
    assert sorted(name for name in tensors if "proj_l" in name) == [
        f"blocks.{block}.attn1.proj_l.{leaf}" for block in (0, 2) for leaf in ("bias", "weight")
    ]
    assert np.array_equal(tensors["blocks.2.attn1.proj_l.weight"], model.projections.kernel[1].T)
    loaded = load_transformer(tmp_path)
    assert loaded.config == model.config
    assert np.array_equal(run(*nnx.split(loaded), *inputs(GRID)), run(*nnx.split(model), *inputs(GRID)))
    for name in ("config.json", "hashes.json"):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"a hybrid transformer without its config\.json"):
        load_transformer(tmp_path)


def test_a_plan_needs_the_projections_of_its_blocks(build):
    teacher = build(HybridConfig((1, 1)))
    teacher.config = dataclasses.replace(teacher.config, hybrid=None)
    with pytest.raises(InputError, match="the plan converts 1 blocks, found maps for 0"):
        operate(teacher, HybridConfig(("S10", 1)), None)


def test_counts_and_parameters():
    tokens, kind = 45, kind_of("S40B8")  # 6 blocks, of which 2 are chosen
    found = kind.counts(AttentionSize(tokens, 5, 2, 16, None))
    assert (found.softmax_pairs, found.softmax_keys) == (tokens * 16, 6 * 16)
    assert (found.linear_queries, found.linear_keys) == (tokens, tokens)
    assert kind_of("S29B8").counts(AttentionSize(800, 5, 2, 16, None)).softmax_keys == 100 * int(0.29 * 100) * 8
    config = WanConfig()
    work = Workload(config, 0).of_video(81, 480, 832)
    phi = map_parameters(work.feature_map, 12, 128)
    assert added_parameters(config, work.feature_map, ["S10"]) == 128 * 129
    assert added_parameters(config, work.feature_map, [2]) == 2 * (phi + 12)
    # A tenth of softmax, and of the rest the linear branch most, 4 N D^2 a head: 4 % of a tenth of 4 N^2 D.
    softmax = core_flops(work, 1)
    assert 0.1 < core_flops(work, "S10") / softmax < 0.106
    assert core_flops(work, "S5") < core_flops(work, "S10") < core_flops(work, 8)
