"""Losses and gradients of a hybrid transformer on meshes of fake devices equal those on one device."""

import json

from tests.conftest import FULL_GRID

CHECK = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from ml_collections import ConfigDict
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.runtime.mesh import AXES, make_mesh
from jsurgery.surgery.finetune import velocity_loss
from jsurgery.wan.transformer import WanConfig, WanTransformer

rates = (1, 2, 8, "linear")
hybrid = HybridConfig(rates=rates, stabilizer="max")
network = WanConfig(num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
                    freq_dim=16, ffn_dim=32, num_layers=4, hybrid=hybrid)
rng = np.random.default_rng(0)
grid = (3, 10, 6)  # 45 tokens: 23, 6 and 45 of them keep softmax; no axis divides any of these
batch = {
    "latents": rng.normal(size=(4, *grid, 4)), "velocity": rng.normal(size=(4, *grid, 4)),
    "timesteps": rng.uniform(0, 1000, size=4), "text": rng.normal(size=(4, 7, 16)),
}
batch = jax.tree.map(np.float32, batch)

def model(config):
    built = WanTransformer(config, rngs=nnx.Rngs(0))
    state = nnx.state(built)
    noise = np.random.default_rng(1)
    nnx.update(built, jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), state))
    return built

def loss_and_gradients(built):
    graph, params = nnx.split(built)
    objective = lambda params, batch: velocity_loss(nnx.merge(graph, params), None, batch, 0.0)
    value, gradients = jax.jit(jax.value_and_grad(objective))(params, batch)
    return jax.device_get((value, jax.tree.leaves(gradients)))

inputs = ("latents", "timesteps", "text")
import dataclasses
for config in (network, dataclasses.replace(network, hybrid=None)):
    value, gradients = loss_and_gradients(model(config))
    for sizes, exchange in json.loads(sys.argv[1 if config.hybrid else 2]):
        mesh = ConfigDict(dict(zip(AXES, sizes)))
        spread = model(config)
        spread.shard(make_mesh(mesh), exchange)
        found, found_gradients = loss_and_gradients(spread)
        # A gradient whose terms nearly cancel has the absolute error of its terms.
        least = 1e-3 * np.sqrt(sum(np.sum(gradient**2) for gradient in gradients))
        error = lambda a, b: float(np.linalg.norm(a - b) / max(np.linalg.norm(b), least))
        errors = [error(found, value), *map(error, found_gradients, gradients)]
        one = lambda built: np.asarray(nnx.jit(lambda model, *x: model(*x))(built, *(batch[n][:1] for n in inputs)))
        errors.append(error(one(spread), one(model(config))) if sizes == [1, 2, 4, 1] else 0.0)  # 2 does not divide 1
        print(json.dumps([sizes, exchange, max(errors)]), flush=True)
"""
MESHES = [
    [(1, 1, 8, 1), "gather"],
    [(2, 1, 2, 2), "all_to_all"],
    [(1, 2, 4, 1), "gather"],
]
TEACHER_MESHES = [[(1, 1, 4, 1), "all_to_all"]]
if FULL_GRID:
    MESHES += [[axes, "gather"] for axes in ((4, 1, 1, 1), (1, 4, 1, 1), (1, 1, 1, 4))] + TEACHER_MESHES
    TEACHER_MESHES += [[(1, 1, 8, 1), "gather"]]


def test_results_on_meshes_equal_those_on_one_device(on_fake_devices):
    found = on_fake_devices(CHECK, json.dumps(MESHES), json.dumps(TEACHER_MESHES))
    assert len(found) == len(MESHES) + len(TEACHER_MESHES)
    assert not [case for case in found if not case[-1] < 1e-5], found
