"""Training a teacher: the loss of flow matching, and resuming to the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from jsurgery.data.shards import shard_path, text_array, write_shard
from jsurgery.data.sprites import all_captions
from jsurgery.errors import InputError
from jsurgery.load_config import load_config
from jsurgery.train.transformer import flow_matching_loss, train_transformer
from jsurgery.wan.checkpoint import save_text_encoder, save_transformer
from jsurgery.wan.tokenizer import train_tokenizer


def test_loss_is_zero_for_the_true_velocity_and_drops_a_share_of_captions():
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(8, 1, 2, 2, 3)), jnp.float32)
    batch = {
        "latents": latents,
        "token_ids": jnp.ones((8, 4), int),
        "mask": jnp.ones((8, 4), int),
        "blank_ids": jnp.zeros((1, 4), int),
        "blank_mask": jnp.zeros((1, 4), int),
    }
    seen = {}

    def oracle(noisy, timesteps, token_ids, mask):
        seen.update(timesteps=timesteps, blank=(token_ids == 0).all(axis=1), mask=mask)
        sigma = (timesteps / 1000).reshape(-1, 1, 1, 1, 1)
        return (noisy - latents) / sigma  # noisy = x0 + sigma (noise - x0)

    assert flow_matching_loss(oracle, batch, jax.random.key(0), shift=3.0, dropout=0.25) < 1e-8
    assert seen["blank"].sum() == 2 and np.array_equal(seen["mask"].sum(axis=1) == 0, seen["blank"])
    assert seen["timesteps"].min() > 0 and seen["timesteps"].max() <= 1000
    # One noise level in each eighth of [0, 1], before the shift by 3.
    sigma = seen["timesteps"] / 1000
    assert np.array_equal(np.floor(8 * sigma / (3 - 2 * sigma)), np.arange(8))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("latents"))
    rng = np.random.default_rng(0)
    captions = all_captions()
    for split in ("train", "holdout"):
        records = (
            {"latents": rng.normal(size=(1, 4, 4, 4)).astype(np.float16), "caption": text_array(captions[i])}
            for i in range(12)
        )
        write_shard(shard_path(folder / split, 0), records)
    return folder, train_tokenizer(captions[:360], folder / "tokenizer", 64)


@pytest.fixture
def config():
    config = load_config("tiny_teacher").copy_and_resolve_references()
    config.unlock()
    config.train.update(layers=1, heads=1, head_dim=12, ffn_dim=16, text_dim=8, text_layers=1, z_dim=4, steps=4)
    config.train.update(warmup=1, decay=1, batch=4)
    config.checkpoint.every = config.log_every = 2
    return config


def test_resumed_training_gives_the_same_bits(data, config, tmp_path):
    latents, tokenizer = data

    def trained(folder, steps):
        config.train.steps = steps
        model = train_transformer(config, epath.Path(tmp_path / folder), tokenizer=tokenizer, latents=latents)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]

    config.train.decay = 0
    straight = trained("straight", 4)
    halfway = trained("stopped", 2)
    resumed = trained("stopped", 4)
    assert all(np.array_equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(halfway, resumed, strict=True))


def test_training_starts_from_the_weights_of_a_folder(data, config, tmp_path):
    latents, tokenizer = data
    config.train.update(steps=2, warmup=0, decay=0)
    common = {"tokenizer": tokenizer, "latents": latents}
    first = train_transformer(config, epath.Path(tmp_path / "first"), **common)
    folder = epath.Path(tmp_path / "model")
    save_transformer(first.transformer, folder / "transformer")
    save_text_encoder(first.text_encoder, folder / "text_encoder")

    def distance(init):
        config.train.learning_rate = 1e-9
        model = train_transformer(config, epath.Path(tmp_path / f"second{init is None}"), **common, init=init)
        pairs = zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(first)), strict=True)
        return max(float(jnp.abs(a - b).max()) for a, b in pairs)

    assert distance(folder) < 1e-6 < 1e-4 < distance(None)
    config.train.layers = 2
    with pytest.raises(InputError, match="config.train.init: .*transformer: expected .*num_layers=2"):
        distance(folder)
