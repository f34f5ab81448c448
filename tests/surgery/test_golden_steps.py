"""Updates of distillation and of fine-tuning from fixed seeds, compared with recorded losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.config import base
from jsurgery.runtime.optimizer import adamw, initial_train_state
from jsurgery.surgery import finetune
from jsurgery.surgery.distillation import update as distillation
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.surgery.operate import operate
from jsurgery.wan.checkpoint import load_transformer

RATES = (2, "linear")
PLAN = (2, "linear")
WHEN_TO_UPDATE = (
    "a training step no longer has its recorded loss. Change the number only for an intended change of the mathematics "
    "(the loss, the model, the initialisation, the optimiser), and name that change in CHANGELOG.md"
)


def assert_as_recorded(actual, recorded) -> None:
    """Allows a few units in the last place of float32, by which processors differ."""
    digits = np.array2string(np.asarray(actual), separator=", ", floatmode="unique")
    np.testing.assert_allclose(actual, recorded, rtol=1e-6, err_msg=f"{WHEN_TO_UPDATE}. Found {digits}")


@pytest.fixture(scope="module")
def config():
    config = base()
    config.hybrid.rates = RATES
    config.finetune.learning_rate = 1e-3
    return config


@pytest.fixture(scope="module")
def teacher(tiny_pipeline):
    return load_transformer(tiny_pipeline / "transformer")


@pytest.fixture(scope="module")
def maps(config, teacher):
    return distillation.initial_maps(config, teacher)


@pytest.fixture(scope="module")
def batch():
    """Two examples of 15 tokens, a number that no rate divides; text of four tokens."""
    rng = np.random.default_rng(0)
    batch = {"latents": rng.normal(size=(2, 5, 2, 6, 4)), "text": rng.normal(size=(2, 4, 16))}
    return jax.tree.map(np.float32, batch)


def test_losses_before_and_after_an_update_of_distillation(config, teacher, maps, batch):
    """Losses are [blocks, rates]."""
    graph, params = nnx.split(teacher)
    optimizer = distillation.make_optimizer(config)
    update = distillation.make_update(optimizer, graph, DistillSpec.of(config))
    state = {"maps": jax.tree.map(jnp.copy, maps), "opt_state": optimizer.init(maps)}
    batch = batch | {"timestep": np.float32([900, 300])}
    state, first = update(state, params, batch)
    _, second = update(state, params, batch)
    assert_as_recorded(first, [[0.20629798, 0.20788844], [0.21690875, 0.18776898]])
    assert_as_recorded(second, [[0.20031342, 0.20185046], [0.21165751, 0.18281423]])


def test_losses_before_and_after_an_update_of_fine_tuning(config, teacher, maps, batch):
    """And gradient norms, with the same noise in both updates."""
    hybrid = HybridConfig(PLAN, (1, 2), feature_map=FeatureMapConfig.of(config))
    of_plan = jax.tree.map(
        lambda leaf: jnp.stack([leaf[block, RATES.index(rate)] for block, rate in enumerate(PLAN)]), maps
    )
    graph, params = nnx.split(operate(teacher, hybrid, of_plan))
    optimizer = adamw(config.finetune)
    update = finetune.make_update(config, optimizer, graph, graph)
    state = initial_train_state(jax.tree.map(jnp.copy, params), optimizer, config.finetune.ema)
    measured = []
    for _ in range(2):
        state, values, _ = update(state, params, batch, jax.random.key(0))
        measured.append([values["loss"], values["gradient_norm"]])
    assert_as_recorded(measured, [[3.618928, 3.1303868], [3.4312046, 2.807347]])
