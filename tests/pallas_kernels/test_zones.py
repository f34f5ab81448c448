"""Softmax over nested prefixes, by every implementation, against float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu, softmax_zones, tpu
from pallas_kernels.tpu_problem import BlockSizes
from pallas_kernels.tpu_zones import segments_of_steps
from tests.conftest import FULL_GRID
from tests.pallas_kernels.kernel_tests import LENGTHS

BLOCKS = BlockSizes(query=128, key=256, key_chunk=128)


def arrays(queries, keys, width, spread, dtype=np.float32):
    rng = np.random.default_rng([queries, keys, width])
    shapes = (2, queries, 2, width), (2, keys, 2, width), (2, keys, 2, width)
    q, k, v = (rng.normal(size=shape) for shape in shapes)
    return tuple(jnp.asarray(x, dtype) for x in (q * spread, k, v))


def expected(q, k, v, bounds, valid):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bnhm", q, k) / np.sqrt(q.shape[-1])
    if valid is not None:
        scores = np.where(valid[:, None, None], scores, -np.inf)
    zones = []
    for bound in bounds:
        s = scores[..., :bound]
        top = s.max(axis=-1)
        weights = np.exp(s - top[..., None])
        mass = weights.sum(axis=-1)
        zones.append((np.einsum("bnhm,bmhd->bnhd", weights, v[:, :bound]) / mass[..., None], top + np.log(mass), top))
    return [np.stack(parts) for parts in zip(*zones, strict=True)]


IMPLEMENTATIONS = {
    "reference": functools.partial(softmax_zones, implementation="reference"),
    "xla": functools.partial(softmax_zones, implementation="xla"),
    "tpu": functools.partial(tpu.softmax_zones, block_sizes=BLOCKS, interpret=True),
    "gpu": functools.partial(gpu.softmax_zones, block_sizes=gpu.BlockSizes(32, 32, 32), interpret=True),
}


CASES = [
    (131, 700, 64, (88, 175, 350, 700), 1.0, False),  # ends within blocks and within chunks
    (70, 600, 128, (256, 512), 40.0, True),  # ends of blocks; large scores; keys beyond the last prefix
    (9, 5, 16, (1, 2, 3, 5), 1.0, False),  # less than a chunk
]
if FULL_GRID:
    grid = itertools.product(LENGTHS, (64, 128), (1.0, 10.0), (False, True))
    CASES += [(n, n, width, tuple(-(-n // rate) for rate in (8, 4, 2, 1)), *rest) for n, width, *rest in grid]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("queries", "keys", "width", "bounds", "spread", "masked"), CASES)
def test_every_prefix_is_softmax_of_its_own(name, queries, keys, width, bounds, spread, masked):
    q, k, v = arrays(queries, keys, width, spread)
    valid = None
    if masked:
        valid = np.random.default_rng(0).random((2, keys)) < 0.7
        valid[:, 3] = True
    found = IMPLEMENTATIONS[name](q, k, v, bounds, key_valid=None if valid is None else jnp.asarray(valid))
    of_all = expected(q, k, v, bounds, valid)
    for values, reference in zip(found, of_all, strict=True):
        assert values.shape == reference.shape and values.dtype == jnp.float32
        rounding = 2e-5 * max(1, spread / 4)  # that of the scores is a relative one
        np.testing.assert_allclose(values, reference, rtol=2e-5, atol=rounding)
    shorter = expected(q, k, v, [bounds[-1] * 4 // 5], valid)[0]
    assert np.abs(shorter[0] - of_all[0][-1]).max() > 0.01, "control: other prefixes would be noticed"


@pytest.mark.parametrize(
    ("module", "keys", "blocks"), [(tpu, 700, {"block_sizes": BLOCKS}), (gpu, 3001, {})], ids=["tpu", "gpu"]
)
def test_prefixes_in_bfloat16_are_as_close_as_flash_attention(module, keys, blocks):
    q, k, v = arrays(131, keys, 64, 1.0, jnp.bfloat16)
    bounds, options = (keys // 8 + 1, keys // 2, keys), {"interpret": True, **blocks}
    reference = expected(q, k, v, bounds, None)[0]
    zones = module.softmax_zones(q, k, v, bounds, **options)[0]
    flash = module.hybrid_attention(q, k, v, None, None, num_softmax=keys, **options)
    distance = lambda y, exact: np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact)
    allowed = distance(flash, reference[2])
    assert 1e-4 < max(distance(y, exact) for y, exact in zip(zones, reference, strict=True)) < 1.2 * allowed < 0.01


def test_xla_has_gradients_and_kernels_refuse_them():
    q, k, v = arrays(20, 60, 16, 1.0)
    loss = lambda function: lambda q: sum(jnp.sum(jnp.sin(x)) for x in function(q, k, v, (7, 60)))
    found, reference = (jax.grad(loss(IMPLEMENTATIONS[name]))(q) for name in ("xla", "reference"))
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5)
    for name in ("tpu", "gpu"):
        with pytest.raises(NotImplementedError, match=f"'{name}': softmax_zones has no gradients"):
            jax.grad(loss(IMPLEMENTATIONS[name]))(q)


@pytest.mark.parametrize("bounds", [(), (0, 5), (5, 5), (7, 5), (5, 61)])
def test_bounds_that_are_no_prefixes_are_refused(bounds):
    with pytest.raises(ValueError, match="bounds must ascend from at least 1 to at most 60"):
        softmax_zones(*arrays(20, 60, 16, 1.0), bounds)


def test_segments_cover_every_key_once_and_end_where_prefixes_do():
    rng = np.random.default_rng(0)
    for _ in range(200):
        count, keys = int(rng.integers(1, 900)), int(rng.integers(1, 300))
        bounds = tuple(sorted({count, *rng.integers(1, count + 1, 3).tolist()}))
        steps = segments_of_steps(bounds, keys)
        flat = [(number * keys + s.low, number * keys + s.high, s.prefix) for number, s in enumerate_segments(steps)]
        assert [start for start, *_ in flat] == [0, *(stop for _, stop, _ in flat[:-1])] and flat[-1][1] == count
        assert {prefix: stop for _, stop, prefix in flat if prefix is not None} == dict(enumerate(bounds))


def enumerate_segments(steps):
    return [(number, segment) for number, parts in enumerate(steps) for segment in parts]
