"""Losses, gradients and statistics of distillation on meshes of fake devices equal those on one device."""

import json

from tests.conftest import FULL_GRID

CHECK = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from ml_collections import ConfigDict
from jsurgery.config import base
from jsurgery.runtime.mesh import AXES, make_mesh, global_batch, put_state
from jsurgery.surgery.distillation.distill import initial_maps
from jsurgery.surgery.distillation.replay import make_optimizer, make_update
from jsurgery.surgery.plan_forward import plan_velocity, velocity_errors
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, losses_and_gradients, measure_heads
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer

rates = (2, 8, "linear")
network = WanConfig(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
                    freq_dim=16, ffn_dim=32, num_layers=2)
rng = np.random.default_rng(0)
batch = jax.tree.map(np.float32, {
    "latents": rng.normal(size=(2, 3, 10, 6, 4)),  # 45 tokens: 23 and 6 of them keep softmax
    "timestep": rng.uniform(0, 1000, size=2), "text": rng.normal(size=(2, 7, 16)),
})
config = base()
config.hybrid.rates = rates

def teacher():
    built = WanTransformer(network, rngs=nnx.Rngs(0))
    noise = np.random.default_rng(1)
    perturbed = lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32)
    nnx.update(built, jax.tree.map(perturbed, nnx.state(built)))
    return built

maps = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), initial_maps(config, teacher()))

def found(model, job):
    values = []
    for loss, stabilizer in (("value", "max"), ("attention", "lse")):
        spec = DistillSpec(rates, (1, 2, 8), "strided", stabilizer, loss)
        values.append(losses_and_gradients(model, batch, maps, spec))
    values.append(measure_heads(model, batch, (maps,), spec))
    teacher_velocity = plan_velocity(model, batch, maps, np.zeros(2, int), spec)
    values.append(velocity_errors(model, batch, maps, np.array([[2, 0], [0, 1], [1, 3]]), spec, teacher_velocity))
    if job:
        one = dataclasses.replace(spec, blocks=(0,))
        values.append(losses_and_gradients(model, batch, jax.tree.map(lambda x: x[:1], maps), one))
    return jax.device_get(jax.tree.leaves(values))

def resharded(model, mesh):
    # the number of arrays of a training state whose sharding changes in a step
    optimizer, (graph, params) = make_optimizer(config), nnx.split(model)
    state = {"maps": maps, "opt_state": optimizer.init(maps)}
    state = put_state(mesh, jax.device_get(state))  # a step overwrites its state
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    update = make_update(optimizer, graph, DistillSpec(rates, (1, 2, 8), "strided", "max", "value"))
    state, _ = update(state, params, global_batch(mesh, range(2), 2, batch))
    same = jax.tree.map(lambda leaf, where: where.is_equivalent_to(leaf.sharding, leaf.ndim), state, before)
    return jax.tree.leaves(same).count(False)

expected = found(teacher(), job=True)
for sizes in json.loads(sys.argv[1]):
    spread = teacher()
    mesh = make_mesh(ConfigDict(dict(zip(AXES, sizes))))
    spread.shard(mesh)
    pairs = zip(found(spread, job=sizes == [1, 2, 2, 2]), expected)
    errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs if b.any()]
    print(json.dumps([sizes, resharded(spread, mesh), max(errors)]), flush=True)
"""
MESHES = [(2, 1, 4, 1), (1, 2, 2, 2)]
if FULL_GRID:
    MESHES += [(1, 1, 1, 2), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 4, 1)]


def test_results_on_meshes_equal_those_on_one_device(on_fake_devices):
    found = on_fake_devices(CHECK, json.dumps(MESHES))
    assert len(found) == len(MESHES)
    assert not [case for case in found if not case[-1] < 1e-5], found
    assert not [case for case in found if case[1]], "a resumed run would compile another program"
