"""NaN in a batch, in a weight or in a gradient: training stops at that step, says where, and has saved none of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jsurgery.errors import InputError
from jsurgery.runtime import guard
from jsurgery.runtime.checkpoints import Checkpoints
from jsurgery.runtime.guard import Guard, non_finite
from jsurgery.runtime.metrics import read_metrics
from jsurgery.surgery.distillation.update import apply_gradients
from pallas_kernels.feature_map import PolynomialMap
from tests.faults.tiny_training import POISON, first_bad_step, saved_state, tiny_config, train, write_latents


@pytest.fixture
def config():
    return tiny_config()


def finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        (np.nan, ["whose examples {row} are not finite", "loss nan"]),
        (POISON, ["gradients of blocks/ffn_in/kernel of block 1"]),
    ],
)
def test_a_batch_and_a_gradient(config, tiny_pipeline, tmp_path, monkeypatch, bad, parts):
    write_latents(tmp_path / "latents", bad)
    step, row = first_bad_step(tmp_path / "latents")
    assert 0 < step < 5
    with pytest.raises(InputError) as told:
        train(config, tiny_pipeline, tmp_path / "latents", tmp_path / "run", monkeypatch)
    message = str(told.value)
    expected = [f"finetune: step {step + 1}:", f"batch {step}", "config.max_skipped", *parts]
    assert all(part.format(row=row) in message for part in expected), message
    assert len(message.splitlines()) == 1
    assert ("gradients of" in message) and ("weights" not in message)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", every=1, keep=2)
    assert checkpoints.complete_steps()[-1] == step and finite(saved_state(tmp_path / "run", step))


def test_a_weight(config, tiny_pipeline, tmp_path, monkeypatch):
    write_latents(tmp_path / "latents")
    with pytest.raises(InputError, match="finetune: step 1: .*weights blocks/attn1/to_q/kernel of block 1; gradients"):
        train(config, tiny_pipeline, tmp_path / "latents", tmp_path / "run", monkeypatch, weight=1)
    assert Checkpoints(tmp_path / "run" / "checkpoints", every=1, keep=2).complete_steps() == []


def test_up_to_so_many_are_passed_over(config, tiny_pipeline, tmp_path, monkeypatch, capsys):
    write_latents(tmp_path / "latents", np.nan)
    step, _ = first_bad_step(tmp_path / "latents")
    config.max_skipped, config.finetune.steps = 1, step + 2
    model = train(config, tiny_pipeline, tmp_path / "latents", tmp_path / "run", monkeypatch)
    assert finite(nnx.state(model))
    assert "the update was skipped (1 of at most 1 skipped steps, config.max_skipped)" in capsys.readouterr().err
    # looked at when the next step has begun
    assert [row["skipped"] for row in read_metrics(tmp_path / "run")] == [0] * (step + 1) + [1]
    states = [saved_state(tmp_path / "run", number) for number in (step + 1, step + 2)]
    assert [int(state["step"]) for state in states] == [step, step + 1]


def test_without_the_guard_it_is_lost(config, tiny_pipeline, tmp_path, monkeypatch):
    """The control: the parameters and what is saved are NaN, and nobody says so."""
    write_latents(tmp_path / "latents", np.nan)
    model = train(config, tiny_pipeline, tmp_path / "latents", tmp_path / "run", monkeypatch, guarded=False)
    assert not finite(nnx.state(model)) and not finite(saved_state(tmp_path / "run", 6)["params"])


def test_of_feature_maps_the_block_and_rate_are_named():
    """A gradient that is NaN in block 1 at the second rate: no map moves, and its loss says where."""
    rng = np.random.default_rng(0)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=(3, 2, 4, *shape)), jnp.float32)
    maps = tuple(
        PolynomialMap(kernels=(leaf(5, 5),), biases=(leaf(5),), log_scale=leaf(), degree=1, activation="relu")
        for _ in range(2)
    )
    optimizer = optax.adamw(1e-2)
    state = {"maps": maps, "opt_state": optimizer.init(maps)}
    gradients = jax.tree.map(jnp.ones_like, maps)
    losses = jnp.ones((3, 2))
    moved, same_losses = apply_gradients(optimizer, state, losses, gradients)
    assert not np.array_equal(moved["maps"][0].log_scale, maps[0].log_scale) and (same_losses == 1).all()
    kernels = (gradients[1].kernels[0].at[1, 1, 2, 3, 4].set(jnp.nan),)
    bad = gradients[0], PolynomialMap(kernels, gradients[1].biases, gradients[1].log_scale, 1, "relu")
    kept, losses = apply_gradients(optimizer, state, losses, bad)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(state), strict=True))
    assert np.argwhere(np.isnan(losses)).tolist() == [[1, 1]]


def test_faults_are_found_by_block():
    tree = {"blocks": {"kernel": np.ones((3, 2, 2))}, "head": {"kernel": np.ones((2, 2))}}
    tree["blocks"]["kernel"][2, 0, 1] = np.inf
    tree["head"]["kernel"][0, 0] = np.nan
    assert (
        guard.describe_non_finite(non_finite(jax.tree.map(jnp.asarray, tree)))
        == "blocks/kernel of block 2, head/kernel"
    )


def test_the_guard_asks_for_a_step_when_the_next_has_begun():
    """It never waits for the step that has just been started, but does before a save."""
    read = []

    class Number:
        is_fully_replicated = True

        def __init__(self, value):
            self.value = value

        def copy_to_host_async(self):
            pass

        def __array__(self, *_, **__):
            read.append(self.value)
            return np.array(self.value)

    watched = Guard("stage", 0, lambda *_: "here")
    for step in range(3):
        watched.record(step, [Number(float(step))])
        assert read == [float(i) for i in range(step)]
    watched.check_last()
    assert read == [0.0, 1.0, 2.0]
    watched.record(3, [Number(np.inf)])
    with pytest.raises(InputError, match="stage: step 4: here"):
        watched.check_last()
