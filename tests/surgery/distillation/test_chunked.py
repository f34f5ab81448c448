"""Distillation of chunked hybrids: losses, gradients and statistics from all pairs of tokens. All kinds on meshes."""

import jax
import numpy as np
import pytest

from jsurgery.config import base
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, losses_and_gradients, measure_heads
from jsurgery.surgery.distillation.update import initial_maps
from tests import equation_5
from tests.conftest import FULL_GRID
from tests.surgery.distillation.raster_order import FRAMES, PER_FRAME, activations_of, random_batch
from tests.wan.second_model import chunks

RATES = ("C2O1", 2, "B3O0")
CHUNKED = {0: (2, 1, True), 2: (3, 0, False)}  # index in RATES: Tc, To, causal


@pytest.fixture(scope="module")
def batch():
    return random_batch()


@pytest.fixture(scope="module")
def activations(teacher, batch):
    return activations_of(teacher, batch)


@pytest.fixture(scope="module")
def maps(teacher):
    config, rng = base(), np.random.default_rng(2)
    config.hybrid.rates = RATES
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), initial_maps(config, teacher)
    )


def masks(size):
    pairs = np.array([[chunks(query, key, *size) for key in range(FRAMES)] for query in range(FRAMES)])
    pairs = pairs.repeat(PER_FRAME, 0).repeat(PER_FRAME, 1)
    return pairs[..., 0], pairs[..., 1]


def relative_error(actual, expected):
    actual, expected = (np.concatenate([np.float64(leaf).ravel() for leaf in leaves]) for leaves in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("stabilizer", ["max", "lse"] if FULL_GRID else ["max"])
def test_losses_gradients_and_statistics_are_those_of_all_pairs(teacher, batch, maps, activations, stabilizer):
    spec = DistillSpec(RATES, (1, 2), "strided", stabilizer, "value")
    losses, gradients = losses_and_gradients(teacher, batch, maps, spec)
    (statistics,) = measure_heads(teacher, batch, (maps,), spec)
    every = np.ones((FRAMES * PER_FRAME,) * 2, bool)
    for block in range(2):
        q, k, v = (x[block] for x in activations)
        full = equation_5.values((q, k, v, None, None), masks=(every, ~every)).y
        scores = np.einsum("bnhd,bmhd->bnhm", np.float64(q), np.float64(k)) / np.sqrt(q.shape[-1])
        for index, size in CHUNKED.items():
            in_S, in_L = masks(size)
            pair = jax.tree.map(lambda leaf, at=(block, index): leaf[at], maps.pair)
            found = equation_5.values((q, k, v, *pair), masks=(in_S, in_L), stabilizer=stabilizer)
            error = np.abs(found.y - full)
            assert losses[block, index] == pytest.approx(error.mean(), rel=1e-4)
            # The sum of the heads' own losses has the gradient of each.
            cotangent = np.sign(found.y - full) * full.shape[2] / full.size
            options = {"masks": (in_S, in_L), "stabilizer": stabilizer}
            _, (*_, of_query_map, of_key_map) = equation_5.values_and_gradients((q, k, v, *pair), cotangent, **options)
            actual = jax.tree.leaves(jax.tree.map(lambda leaf, at=(block, index): leaf[at], gradients))
            assert relative_error(actual, jax.tree.leaves((of_query_map, of_key_map))) < 1e-4

            mass = lambda keys, of=np.exp(scores - found.c[..., None]): (of * keys[:, None]).sum(-1)  # noqa: B008
            n_S, n_L = mass(in_S), mass(in_L)
            expected = {
                "error": error.sum((0, 1, 3)),
                "size": np.abs(full).sum((0, 1, 3)),
                "share": found.softmax_share.mean((0, 1)),
                "teacher_share": (n_S / mass(every)).mean((0, 1)),
                "teacher_mass": n_L.mean((0, 1)),
                "mass": (n_S * (1 / found.softmax_share - 1)).mean((0, 1)),
            }
            for name, values in expected.items():
                np.testing.assert_allclose(statistics[name][block, index], values, rtol=1e-4, err_msg=name)


CHECK = """
import json, sys
import jax, numpy as np
from flax import nnx
from ml_collections import ConfigDict
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.config import base
from jsurgery.runtime.mesh import AXES, make_mesh
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, losses_and_gradients, measure_heads
from jsurgery.surgery.distillation.update import initial_maps
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer

rates = ("C2O1", 2, "S40B8")
sizes = dict(num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
             ffn_dim=32)
rng = np.random.default_rng(0)
batch = jax.tree.map(np.float32, {
    "latents": rng.normal(size=(2, 3, 10, 6, 4)),  # 45 tokens, which no axis divides
    "timestep": rng.uniform(0, 1000, size=2), "text": rng.normal(size=(2, 7, 16)),
})
config = base()
config.hybrid.rates = rates

def build(hybrid):
    layers = len(hybrid.rates) if hybrid else 1
    built = WanTransformer(WanConfig(**sizes, num_layers=layers, hybrid=hybrid), rngs=nnx.Rngs(0))
    noise = np.random.default_rng(1)
    nnx.update(built, jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), nnx.state(built)))
    return built

def found(mesh):
    teacher, hybrid = build(None), build(HybridConfig(rates, stabilizer="max"))
    maps = jax.tree.map(lambda x: x + 0.2, initial_maps(config, teacher))
    if mesh is not None:
        teacher.shard(mesh)
        hybrid.shard(mesh)
    spec = DistillSpec(rates, (1, 2), "strided", "max", "value")
    losses, of_maps = losses_and_gradients(teacher, batch, maps, spec)
    # The gradient of a scale, whose terms nearly cancel, counts together with those of its map.
    flat = lambda rate: np.concatenate([np.ravel(leaf[0, rate]) for leaf in jax.tree.leaves(of_maps.pair)])
    velocity = lambda params: nnx.merge(graph, params)(batch["latents"], batch["timestep"], batch["text"])
    graph, params = nnx.split(hybrid)
    parts = [losses, [flat(0), flat(1)], [np.ravel(leaf) for leaf in of_maps.projection]]
    if sys.argv[1] == "all":
        parts.append(measure_heads(teacher, batch, (maps,), spec))
        parts += jax.jit(jax.value_and_grad(lambda params: (velocity(params) ** 2).sum()))(params)
    else:
        parts.append(jax.jit(velocity)(params))
    return [jax.device_get(jax.tree.leaves(part)) for part in parts]

mesh = make_mesh(ConfigDict(dict(zip(AXES, (1, 1, 2, 2)))))
errors = []
for part, expected in zip(found(mesh), found(None)):
    # So has a gradient of the model the absolute error of its terms.
    least = 1e-3 * np.sqrt(sum(np.sum(leaf**2) for leaf in expected))
    errors.append(max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), least)) for a, b in zip(part, expected)))
print(json.dumps(errors))
"""


def test_a_mesh_computes_what_one_device_does(on_fake_devices):
    """Tokens and heads on two devices each, which exchange sequence for heads."""
    (errors,) = on_fake_devices(CHECK, "all" if FULL_GRID else "")
    assert len(errors) >= 3 and max(errors) < 1e-5, errors
