"""Models with chunked hybrids (ReHyAt) against the second model, whose keys are those of the formula, pair by pair."""

import json

import numpy as np
import pytest
import torch
from flax import nnx

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.attention.kinds.base import AttentionSize
from jsurgery.attention.kinds.chunked import Chunked
from jsurgery.attention.kinds.registry import kind_of
from jsurgery.config import base
from jsurgery.errors import DoesNotFit
from jsurgery.runtime.mesh import abstract_mesh
from jsurgery.runtime.mesh_choice import choose_mesh
from jsurgery.wan.checkpoint import load_transformer, save_transformer
from jsurgery.wan.cost import Workload, block_bytes, core_flops
from jsurgery.wan.model_config import WanConfig
from tests.wan.second_model import (
    SIZES,
    brute_force_batch,
    check_formula,
    chunks,
    chunks_overlap_twice,
    chunks_see_ahead,
    inputs,
    relative_error,
    run,
)

GRID = (5, 3, 3)  # neither 2 nor 3 divides the frames, nor any rate the 45 tokens of prefix order
CASES = {
    "with prefix order": HybridConfig(("C3O1", 2, 1), stabilizer="max"),
    "alone": HybridConfig(("B3O1",), stabilizer="lse"),
    "long overlap": HybridConfig(("B2O0", "C2O3", "linear")),
    "no linear branch": HybridConfig(("C2O1", 4), linear_branch=False),
}
WITH_GRADIENTS = ("with prefix order", "alone")


@pytest.fixture(scope="module")
def build(random_transformer):
    return lambda hybrid: random_transformer(WanConfig(**SIZES, num_layers=len(hybrid.rates), hybrid=hybrid))


@pytest.mark.parametrize("case", CASES)
def test_velocity_and_gradients_are_those_of_the_formula(build, case):
    model, arguments = build(CASES[case]), inputs(GRID)
    velocity, tensors = check_formula(model, arguments, with_gradients=case in WITH_GRADIENTS)

    chunked = [kind for kind in model.config.hybrid.kinds if isinstance(kind, Chunked)]
    with torch.no_grad():
        wrong = [lambda query, key, Tc, To, causal: chunks(query, key, Tc + 1, To, causal)]
        if any(kind.rate[0] == "C" for kind in chunked) and model.config.hybrid.linear_branch:
            wrong += [chunks_overlap_twice, chunks_see_ahead]
        for masks in wrong:
            other = brute_force_batch(tensors, model.config, *arguments, chunked=masks)
            assert relative_error(velocity, other) > 1e-2, masks


@pytest.mark.parametrize("rate", ["C2O1", "B2O1"])
def test_a_later_chunk_changes_nothing_before_it(build, rate):
    """If all blocks are causal; those that are not, or stay softmax, see it."""
    model, (latents, *rest) = build(HybridConfig((rate,) * 2)), inputs(GRID)
    changed = latents.copy()
    changed[:, 4:] += 1  # the last chunk
    before, after = (np.asarray(run(*nnx.split(model), each, *rest)) for each in (latents, changed))
    same = [np.array_equal(before[:, frame], after[:, frame]) for frame in range(5)]
    assert same == [rate == "C2O1"] * 4 + [False]


def test_a_checkpoint_of_format_2_loads_as_it_was(build, tmp_path):
    model = build(CASES["with prefix order"])
    save_transformer(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hybrid"]["format_version"] == 2
    loaded = load_transformer(tmp_path)
    assert loaded.config == model.config
    assert np.array_equal(run(*nnx.split(loaded), *inputs(GRID)), run(*nnx.split(model), *inputs(GRID)))


def test_counts_are_those_of_the_pairs():
    """FLOPs and keys from the pairs of the formula, one by one."""
    frames, per_frame = 7, 6
    for rate, size in {
        "C3O1": (3, 1, True),
        "C2O3": (2, 3, True),
        "B2O1": (2, 1, False),
        "B9O0": (9, 0, False),
    }.items():
        pairs = np.array([[chunks(query, key, *size) for key in range(frames)] for query in range(frames)])
        pairs = pairs.repeat(per_frame, 0).repeat(per_frame, 1)
        found = kind_of(rate).counts(AttentionSize(frames * per_frame, frames, 2, 8, None))
        assert found.softmax_pairs == pairs[..., 0].sum()
        assert found.linear_queries == pairs[..., 1].any(1).sum()
        assert found.linear_keys == pairs[..., 1].any(0).sum()
        chunk = size[0] * per_frame
        runs = [pairs[first : first + chunk, :, 0].any(0).sum() for first in range(0, len(pairs), chunk)]
        assert found.softmax_keys == sum(runs)


def test_cost_at_full_size():
    """18 % of the keys at 21 latent frames (arXiv 2601.04342), and the traffic of the permutation."""
    work = Workload(WanConfig(), 0).of_video(81, 480, 832)
    pairs = kind_of("C3O1").counts(work.attention).softmax_pairs / work.tokens**2
    assert pairs == pytest.approx((3 * 3 + 6 * 3 * 4) / 21**2) and round(pairs, 2) == 0.18
    assert core_flops(work, "C3O1") < core_flops(work, "B3O1") < core_flops(work, 4)
    moved = block_bytes(work, "C3O1").core - block_bytes(work, 1).core
    assert moved > 2 * 8 * work.tokens * work.config.dim


def test_heads_that_a_mesh_does_not_divide_are_refused(build):
    model = build(HybridConfig(("C2O1", 2)))
    mesh = lambda context: abstract_mesh({"data": 1, "fsdp": 1, "context": context, "tensor": 1})
    model.set_mesh(mesh(2))
    with pytest.raises(DoesNotFit, match=r"expected tensor 1 x context 4 \(C2O1\) to divide the 2 heads of the model"):
        model.set_mesh(mesh(4))


def test_meshes_that_are_chosen_divide_the_heads():
    choose = lambda batch, rates: (
        choose_mesh("distill", base(), batch, 12, lambda mesh: 0, 8, None, tell=lambda line: None, rates=rates).mesh
    )
    assert choose(1, (2, "linear")).context == 8
    assert (choose(2, (2, "C3O1")).data, choose(2, (2, "C3O1")).context) == (2, 4)
    with pytest.raises(DoesNotFit, match="expected a batch and the 12 heads of C3O1 to share 8 devices evenly"):
        choose(1, (2, "C3O1"))
