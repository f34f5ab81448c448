"""Resumed fine-tuning gives the same bits as uninterrupted fine-tuning, and reads the same data.

Checkpoints written on eight devices are resumed on four and on one.
"""

import hashlib
import json

import jax
import numpy as np
import pytest
from etils import epath

from jsurgery.data.latents import batches, encode_sprites
from jsurgery.load_config import load_config
from jsurgery.runtime import optimizer
from jsurgery.runtime.checkpoints import Checkpoints
from jsurgery.surgery import finetune as stage
from jsurgery.wan.checkpoint import load_transformer
from jsurgery.wan.pipeline import load_pipeline

FIELDS = {
    "video.frames": "5", "video.height": "32", "video.width": "48", "finetune.batch": "2", "finetune.ema": "0.9",
    "finetune.learning_rate": "1e-3", "finetune.warmup": "3", "log_every": "5", "checkpoint.keep": "9",
    "finetune.teacher_weight": "0",
}  # fmt: skip


@pytest.fixture(scope="module")
def latents(tiny_pipeline, tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("latents"))
    config = load_config("tiny", FIELDS)
    pipeline = load_pipeline(str(tiny_pipeline))
    encode_sprites(pipeline.vae, folder, seed=0, clips=7, video=config.video, two_sprites=0.0)
    return folder


def digest(tree) -> str:
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


class RecordingDataset:
    """A dataset that records what is read. `forgotten` shifts it back, as if its position had not been restored."""

    def __init__(self, data, forgotten=0):
        self.data, self.forgotten, self.read = data, forgotten, []

    def __getitem__(self, step):
        element = self.data[step - self.forgotten]
        self.read.append(digest(element["latents"]))
        return element


def finetuned(tiny_pipeline, latents, folder, steps, monkeypatch, forgotten=0):
    """(hashes of the latents that were read, {name: hash} of the parts of the last checkpoint)."""
    config = load_config("tiny", FIELDS | {"model.path": str(tiny_pipeline), "finetune.steps": str(steps)})
    datasets = []

    def recorded_batches(*arguments):
        datasets.append(RecordingDataset(batches(*arguments), forgotten))
        return datasets[-1]

    monkeypatch.setattr(stage, "batches", recorded_batches)
    teacher = load_pipeline(str(tiny_pipeline))
    student = load_transformer(tiny_pipeline / "transformer")
    stage.finetune(config, student, teacher, latents, epath.Path(folder))
    state = {"params": None, "opt_state": None, "ema": None, "step": None}
    saved = optimizer.initial_train_state(stage.nnx.split(student)[1], optimizer.adamw(config.finetune), 0.9)
    with Checkpoints(epath.Path(folder) / "checkpoints", every=1, keep=9) as checkpoints:
        step, saved = checkpoints.restore(saved)
    assert step == steps == int(saved["step"]) and saved.keys() == state.keys()
    return datasets[0].read, {name: digest(part) for name, part in saved.items()}


@pytest.fixture(scope="module")
def straight(tiny_pipeline, latents, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return finetuned(tiny_pipeline, latents, tmp_path_factory.mktemp("straight"), 20, patch)


def test_resumed_fine_tuning_equals_uninterrupted_fine_tuning(tiny_pipeline, latents, straight, tmp_path, monkeypatch):
    read, saved = straight
    first, middle = finetuned(tiny_pipeline, latents, tmp_path, 10, monkeypatch)
    then, resumed = finetuned(tiny_pipeline, latents, tmp_path, 20, monkeypatch)
    assert resumed == saved
    assert first + then == read and len(then) == 10 and len(set(read)) > 10, "other data"
    assert not any(middle[name] == saved[name] for name in saved)


def test_control_data_that_restarts_gives_another_result(tiny_pipeline, latents, straight, tmp_path, monkeypatch):
    read, saved = straight
    first, _ = finetuned(tiny_pipeline, latents, tmp_path, 10, monkeypatch)
    then, resumed = finetuned(tiny_pipeline, latents, tmp_path, 20, monkeypatch, forgotten=10)
    assert then == first != read[10:]
    assert [name for name in saved if resumed[name] == saved[name]] == ["step"]


ON_THREE_MESHES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from ml_collections import ConfigDict
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.config import base
from jsurgery.runtime.checkpoints import Checkpoints
from jsurgery.runtime.mesh import AXES, make_mesh, global_batch, put_state
from jsurgery.runtime.optimizer import adamw, initial_train_state
from jsurgery.surgery.finetune import make_update
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer

network = WanConfig(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
                    freq_dim=16, ffn_dim=32, num_layers=2, hybrid=HybridConfig(rates=(8, 8)))
config = base()
config.finetune.ema = 0.9
optimizer = adamw(config.finetune)
rng = np.random.default_rng(0)
batch = {"latents": rng.normal(size=(4, 3, 10, 6, 4)), "text": rng.normal(size=(4, 7, 16))}
batch = jax.tree.map(np.float32, batch)

for number, sizes in enumerate([(1, 4, 1, 2), (2, 2, 1, 1), (1, 1, 1, 1)]):
    mesh = make_mesh(ConfigDict(dict(zip(AXES, sizes))))
    model = WanTransformer(network, rngs=nnx.Rngs(number))  # other weights than those in the checkpoint
    model.shard(mesh)
    graph, params = nnx.split(model)
    update = make_update(config, optimizer, graph, graph)
    placed, key = global_batch(mesh, range(4), 4, batch), jax.random.key(7)
    checkpoints = Checkpoints(sys.argv[1], every=1, keep=1)
    state = put_state(mesh, initial_train_state(jax.tree.map(jnp.copy, params), optimizer, 0.9))
    step, state = checkpoints.restore(state)
    if step == 0:
        for step in range(1, 4):
            state, *_ = update(state, params, placed, jax.random.key(step))
        checkpoints.save(3, state, last=True)
    checkpoints.close()
    held = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state["params"])}
    kernel = state["opt_state"][1][0].mu["blocks"]["ffn_in"]["kernel"]
    shard = kernel[...] if hasattr(kernel, "get_value") else kernel
    share = shard.addressable_shards[0].data.size / shard.size
    _, values, _ = update(state, params, placed, key)
    print(json.dumps([step, sorted(held), share, float(values["loss"]), float(values["gradient_norm"])]), flush=True)
"""


def test_a_checkpoint_of_eight_devices_resumes_on_four_and_on_one(on_fake_devices, tmp_path):
    eight, four, one = on_fake_devices(ON_THREE_MESHES, str(tmp_path / "checkpoints"))
    assert [found[0] for found in (eight, four, one)] == [3, 3, 3]
    assert [found[1] for found in (eight, four, one)] == [[8], [4], [1]]
    assert [found[2] for found in (eight, four, one)] == [1 / 8, 1 / 2, 1], "moments are sharded otherwise"
    for found in (four, one):
        np.testing.assert_allclose(found[3:], eight[3:], rtol=1e-5)
    assert json.dumps(eight[3:]) != "[0.0, 0.0]"
