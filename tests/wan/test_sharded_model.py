"""Meshes of fake devices compute what one device computes: gradients of a hybrid, sampled clips, the VAE's chunks."""

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


PIPELINE = """
import json, sys
import jax, numpy as np
from flax import nnx
from jsurgery.load_config import load_config
from jsurgery.runtime.mesh import make_mesh
from jsurgery.wan import vae as vae_module, vae_chunks
from jsurgery.wan.pipeline import load_pipeline

fields = {"model.path": sys.argv[1], "video.frames": "5", "video.height": "32", "video.width": "48",
          "sampler.steps": "2", "trace.keep_steps": "1", "sampler.solver": "euler_ancestral"}
video = np.random.default_rng(0).uniform(-1, 1, (3, 5, 32, 48, 3)).astype(np.float32)
prompts, sources = ["a circle", "a square", "a red one"], [(0, 4), (9, 1), (0, 6)]

worked = {}  # (program, device): its clips
def counted(name, run):
    def count(device):
        worked[name, int(device)] = worked.get((name, int(device)), 0) + 1
    def run_and_count(graph, state, x, kept=None):
        jax.debug.callback(count, jax.lax.axis_index("clips"))
        return run(graph, state, x, kept)
    return run_and_count

found = []
for sizes in ({}, {"mesh.data": "4", "mesh.tensor": "2"}):
    config = load_config("tiny", fields | sizes)
    pipeline = load_pipeline(sys.argv[1], mesh=make_mesh(config.mesh))
    if sizes:
        for name in ("encode_chunk", "decode_chunk"):
            setattr(vae_module, name, counted(name, getattr(vae_module, name)))
    latents = found[0]["latents"] if found else pipeline.encode(video)
    found.append({
        "sampled": pipeline.sample(prompts, config, seed=3, first=5)[0],
        "apart": pipeline.sample(prompts, config, sources=sources)[0],
        "alone": pipeline.sample(prompts[1:2], config, seed=9, first=1)[0],
        "latents": pipeline.encode(video) if found else latents,
        "decoded": pipeline.vae.decode_in_chunks(np.concatenate([latents] * 3)),
        "video": pipeline.decode(latents).astype(np.float32),
    })
jax.effects_barrier()
one, many = ({name: np.asarray(values) for name, values in each.items()} for each in found)
error = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
errors = {name: error(many[name], one[name]) for name in one}
errors["alone in a batch"] = error(many["apart"][1], one["alone"][0])
errors["other noise"] = error(one["apart"], one["sampled"])
errors["video"] = float(np.abs(many["video"] - one["video"]).max())
print(json.dumps([errors, sorted([*key, count] for key, count in worked.items())]), flush=True)
"""
CHUNKS = (("decode_chunk", 6), ("encode_chunk", 2))  # on each device: two a clip, of three groups and of one


def test_clips_are_spread_over_devices(on_fake_devices, tiny_pipeline):
    """Sampling on 4 x 2 devices fills up three prompts; the VAE works on a clip a device, 3 and 9 clips in all."""
    errors, worked = on_fake_devices(PIPELINE, str(tiny_pipeline))[0]
    assert errors.pop("other noise") > 0.1
    assert errors.pop("video") <= 1, "a value between two levels may be rounded either way"
    assert max(errors.values()) < 1e-5, errors
    expected = [["decode_chunk", device, 6] for device in range(8)] + [
        ["encode_chunk", device, 2] for device in range(8)
    ]
    assert worked == expected
