"""Distillation of sparse + linear attention: losses, gradients and statistics from the formula, in float64."""

import jax
import numpy as np
import pytest
import torch
from etils import epath

from jsurgery.attention.feature_maps import FeatureMapConfig, Projection
from jsurgery.config import base
from jsurgery.surgery.distillation.distill import calibrate
from jsurgery.surgery.distillation.saved_maps import load_all_maps, load_maps, save_maps
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, losses_and_gradients, measure_heads
from jsurgery.surgery.distillation.update import apply_gradients, initial_maps, make_optimizer
from tests.conftest import FULL_GRID
from tests.surgery.distillation.raster_order import activations_of, random_batch
from tests.wan.second_model import linear_average, sparse_mask

RATES = ("S40B8", 2, "S20B4")
SPARSE = {0: (40, 8), 2: (20, 4)}  # place in RATES: percent, tokens of a block


@pytest.fixture(scope="module")
def config():
    settings = base()
    settings.hybrid.rates = RATES
    return settings


@pytest.fixture(scope="module")
def batch():
    return random_batch()


@pytest.fixture(scope="module")
def activations(teacher, batch):
    return activations_of(teacher, batch)


@pytest.fixture(scope="module")
def maps(teacher, config):
    rng = np.random.default_rng(2)
    draw = lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
    return jax.tree.map(draw, initial_maps(config, teacher))


@pytest.mark.parametrize("lattice", ["strided", "staggered_rows"] if FULL_GRID else ["staggered_rows"])
def test_losses_gradients_and_statistics_are_those_of_the_formula(teacher, config, batch, maps, activations, lattice):
    """In any order of the network's tokens. A projection's gradient is the sum of its heads', each of its own loss."""
    spec = DistillSpec(RATES, (1, 2), lattice, "lse", "value")
    losses, gradients = losses_and_gradients(teacher, batch, maps, spec)
    (statistics,) = measure_heads(teacher, batch, (maps,), spec)
    for block in range(2):
        q, k, v = (torch.tensor(x[block]).double().transpose(1, 2) for x in activations)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        full = scores.softmax(-1) @ v
        for slot, (place, size) in enumerate(SPARSE.items()):
            kernel, bias = (torch.tensor(np.array(leaf[block, slot])).double() for leaf in maps.projection)
            kernel.requires_grad_(True), bias.requires_grad_(True)
            seen = torch.stack([sparse_mask(*of_one, *size) for of_one in zip(q, k, strict=True)])
            average = torch.stack([linear_average(*of_one) for of_one in zip(q, k, v, strict=True)])
            y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v + average @ kernel + bias
            error = (y - full).abs()
            assert losses[block, place] == pytest.approx(error.mean().item(), rel=1e-5)
            error.mean((0, 2, 3)).sum().backward()
            for found, expected in zip(gradients.projection, (kernel.grad, bias.grad), strict=True):
                np.testing.assert_allclose(found[block, slot], expected, rtol=1e-4, atol=1e-6 * error.mean().item())
            mass = (scores.exp() * seen).sum(-1) / scores.exp().sum(-1)
            expected = {
                "error": error.detach().sum((0, 2, 3)),
                "size": full.abs().sum((0, 2, 3)),
                "share": torch.ones(full.shape[1]),
                "teacher_share": mass.mean((0, 2)),
                "mass": torch.zeros(full.shape[1]),
            }
            for name, values in expected.items():
                np.testing.assert_allclose(statistics[name][block, place], values, rtol=1e-5, err_msg=name)


def test_a_candidate_changes_nothing_of_the_others(teacher, config, batch, maps):
    """Losses and gradients of R2 are those of a distillation of R2 alone; only feature maps are calibrated."""
    spec = lambda rates: DistillSpec(rates, (1, 2), "strided", "lse", "value")
    together, alone = (losses_and_gradients(teacher, batch, m, spec(rates)) for m, rates in (
        (maps, RATES), (maps._replace(projection=None), (2,)),
    ))  # fmt: skip
    np.testing.assert_allclose(together[0][:, 1], alone[0][:, 0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), together[1].pair, alone[1].pair)
    calibrated = calibrate(teacher, [batch], maps, spec(RATES))
    expected = calibrate(teacher, [batch], maps._replace(projection=None), spec((2,)))
    np.testing.assert_allclose(calibrated.key.log_scale, expected.key.log_scale, rtol=1e-5)
    assert calibrated.projection is maps.projection
    only = maps._replace(query=None, key=None)
    assert calibrate(teacher, [batch], only, spec(("S40B8", "S20B4"))) is only


def test_an_update_with_a_bad_projection_changes_nothing_and_says_where(teacher, config, batch, maps):
    optimizer, spec = make_optimizer(config), DistillSpec(RATES, (1, 2), "strided", "lse", "value")
    state = {"maps": maps, "opt_state": optimizer.init(maps)}
    losses, gradients = losses_and_gradients(teacher, batch, maps, spec)
    kernel, bias = gradients.projection
    bad = gradients._replace(projection=Projection(kernel, bias.at[1, 1, 0].set(np.inf)))
    after, found = apply_gradients(optimizer, state, losses, bad, RATES)
    assert np.argwhere(np.isnan(found)).tolist() == [[1, 2]]
    jax.tree.map(np.testing.assert_array_equal, after["maps"], maps)
    after, found = apply_gradients(optimizer, state, losses, gradients, RATES)
    assert np.isfinite(found).all() and not np.array_equal(after["maps"].projection.kernel, maps.projection.kernel)


def test_files_hold_what_each_kind_learned(config, maps, tmp_path):
    path, phi = epath.Path(tmp_path) / "maps.safetensors", FeatureMapConfig.of(config)
    save_maps(path, maps, RATES, range(2))
    jax.tree.map(np.testing.assert_array_equal, load_all_maps(path, RATES, 2, phi), maps)
    found = load_maps(path, (2, "S20B4"), phi)
    np.testing.assert_array_equal(found.projection.kernel, maps.projection.kernel[1:, 1])
    np.testing.assert_array_equal(found.key.log_scale, maps.key.log_scale[:1, 0])
    only = load_maps(path, ("S40B8", 1), phi)
    assert only.pair is None and np.array_equal(only.projection.bias, maps.projection.bias[:1, 0])
