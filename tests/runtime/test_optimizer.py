"""A training step compared with its formulas in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jsurgery.runtime.optimizer import adamw, initial_train_state, learning_rate, train_step, trained_parameters

SETTINGS = ConfigDict(
    {
        "learning_rate": 0.1,
        "weight_decay": 0.01,
        "schedule": "constant",
        "warmup": 0,
        "steps": 20,
        "clip_norm": 0.7,
    }
)


def squares(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def problem(examples=12):
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(examples, 5)), "y": rng.normal(size=(examples, 3))}
    return jax.tree.map(np.float32, ({"w": rng.normal(size=(5, 3))}, batch))


def trained(steps, settings=SETTINGS, pieces=1, ema=0.0):
    params, batch = problem()
    optimizer = adamw(settings)
    update = jax.jit(lambda state: train_step(state, squares, batch, optimizer, pieces=pieces, ema=ema))
    state, found = initial_train_state(jax.tree.map(jnp.asarray, params), optimizer, ema), []
    for _ in range(steps):
        state, values, _ = update(state)
        found.append(jax.device_get(values))
    return jax.device_get(state), found


def in_numpy(steps, settings=SETTINGS, ema=0.0):
    """(weights, their moving average, gradient norms) by the formulas of AdamW (arXiv 1711.05101)."""
    params, batch = jax.tree.map(np.float64, problem())
    w, x, y = params["w"], batch["x"], batch["y"]
    m, v, average, norms = np.zeros_like(w), np.zeros_like(w), w, []
    for t in range(1, steps + 1):
        g = 2 * x.T @ (x @ w - y) / y.size
        norms.append(np.linalg.norm(g))
        g = g * min(1.0, settings.clip_norm / norms[-1])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + settings.weight_decay * w
        w = w - settings.learning_rate * step
        decay = min(ema, t / (9 + t))
        average = decay * average + (1 - decay) * w
    return w, average, norms


def test_steps_are_adamw_on_clipped_gradients():
    state, values = trained(6)
    w, _, norms = in_numpy(6)
    np.testing.assert_allclose(state["params"]["w"], w, atol=2e-5)
    np.testing.assert_allclose([step["gradient_norm"] for step in values], norms, rtol=1e-4)
    assert max(norms) > SETTINGS.clip_norm and "ema" not in state
    loose = ConfigDict(SETTINGS.to_dict() | {"clip_norm": 1e3})
    assert not np.allclose(trained(6, loose)[0]["params"]["w"], w, rtol=1e-2)


@pytest.mark.parametrize("ema", [0.6, 0.999])
def test_moving_average_of_the_weights_is_the_result(ema):
    state, _ = trained(6, ema=ema)
    w, average, _ = in_numpy(6, ema=ema)
    np.testing.assert_allclose(trained_parameters(state)["w"], average, atol=2e-5)
    assert np.abs(average - w).max() > 1e-2


@pytest.mark.parametrize("pieces", [2, 3, 12])
def test_gradient_accumulation_gives_the_same_step(pieces):
    whole, whole_values = trained(5)
    state, values = trained(5, pieces=pieces)
    np.testing.assert_allclose(state["params"]["w"], whole["params"]["w"], atol=2e-6)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose([v[name] for v in values], [v[name] for v in whole_values], rtol=1e-5)


def test_gradient_accumulation_needs_less_memory():
    def temporary(pieces):
        def loss(params, batch):
            h = batch["x"] @ params["w"]
            return jnp.mean(jnp.sin(jnp.sin(h) @ params["w"].T) ** 2)

        shape = jax.ShapeDtypeStruct((4096, 64), jnp.float32)
        params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
        step = lambda params, batch: train_step(
            initial_train_state(params, adamw(SETTINGS), 0.0), loss, batch, adamw(SETTINGS), pieces=pieces, ema=0.0
        )
        return jax.jit(step).lower(params, {"x": shape}).compile().memory_analysis().temp_size_in_bytes

    # Not 1/8, as the batch is in memory twice: as it is and in the order of the pieces.
    assert temporary(8) < 0.7 * temporary(1)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, lambda t: 0.1),
        ("constant", 4, lambda t: 0.1 * min(1, t / 4)),
        ("cosine", 0, lambda t: 0.05 * (1 + np.cos(np.pi * t / 20))),
        ("cosine", 4, lambda t: 0.1 * t / 4 if t < 4 else 0.05 * (1 + np.cos(np.pi * (t - 4) / 16))),
    ],
)
def test_learning_rate_schedules(schedule, warmup, expected):
    rate = learning_rate(ConfigDict(SETTINGS.to_dict() | {"schedule": schedule, "warmup": warmup}))
    found = [float(rate(t)) for t in range(21)]
    np.testing.assert_allclose(found, [expected(t) for t in range(21)], atol=1e-7)
