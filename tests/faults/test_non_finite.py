"""NaN in a batch, a weight or a gradient: training stops at that step, says where the NaN is, and saves no NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jsurgery.attention.feature_maps import LearnedMaps
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
def test_a_non_finite_batch_or_gradient_stops_training(config, tiny_pipeline, tmp_path, monkeypatch, bad, parts):
    write_latents(tmp_path / "latents", bad)
    step, row = first_bad_step(tmp_path / "latents")
    assert 0 < step < 5
    with pytest.raises(InputError) as raised:
        train(config, tiny_pipeline, tmp_path / "latents", tmp_path / "run", monkeypatch)
    message = str(raised.value)
    expected = [f"finetune: step {step + 1}:", f"batch {step}", "config.max_skipped", *parts]
    assert all(part.format(row=row) in message for part in expected), message
    assert len(message.splitlines()) == 1
    assert ("gradients of" in message) and ("weights" not in message)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", every=1, keep=2)
    assert checkpoints.complete_steps()[-1] == step and finite(saved_state(tmp_path / "run", step))


def test_a_non_finite_weight_stops_training(config, tiny_pipeline, tmp_path, monkeypatch):
    write_latents(tmp_path / "latents")
    with pytest.raises(InputError, match="finetune: step 1: .*weights blocks/attn1/to_q/kernel of block 1; gradients"):
        train(config, tiny_pipeline, tmp_path / "latents", tmp_path / "run", monkeypatch, weight=1)
    assert Checkpoints(tmp_path / "run" / "checkpoints", every=1, keep=2).complete_steps() == []


def test_up_to_max_skipped_steps_are_skipped(config, tiny_pipeline, tmp_path, monkeypatch, capsys):
    write_latents(tmp_path / "latents", np.nan)
    step, _ = first_bad_step(tmp_path / "latents")
    config.max_skipped, config.finetune.steps = 1, step + 2
    model = train(config, tiny_pipeline, tmp_path / "latents", tmp_path / "run", monkeypatch)
    assert finite(nnx.state(model))
    assert "the update was skipped (1 of at most 1 skipped steps, config.max_skipped)" in capsys.readouterr().err
    # a step is checked after the next step has started
    assert [row["skipped"] for row in read_metrics(tmp_path / "run")] == [0] * (step + 1) + [1]
    states = [saved_state(tmp_path / "run", number) for number in (step + 1, step + 2)]
    assert [int(state["step"]) for state in states] == [step, step + 1]


def test_control_without_the_guard_nan_is_saved(config, tiny_pipeline, tmp_path, monkeypatch):
    """The parameters and the checkpoint become NaN without an error."""
    write_latents(tmp_path / "latents", np.nan)
    model = train(config, tiny_pipeline, tmp_path / "latents", tmp_path / "run", monkeypatch, guarded=False)
    assert not finite(nnx.state(model)) and not finite(saved_state(tmp_path / "run", 6)["params"])


def test_a_nan_gradient_of_feature_maps_marks_its_block_and_rate():
    """A gradient that is NaN in block 1 at the second rate changes no map, and makes only that loss NaN."""
    rng = np.random.default_rng(0)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=(3, 2, 4, *shape)), jnp.float32)
    phi = lambda: PolynomialMap((leaf(5, 5),), (leaf(5),), leaf(), degree=1, activation="relu")
    maps, rates = LearnedMaps(phi(), phi()), (2, 4)
    optimizer = optax.adamw(1e-2)
    state = {"maps": maps, "opt_state": optimizer.init(maps)}
    gradients = jax.tree.map(jnp.ones_like, maps)
    losses = jnp.ones((3, 2))
    updated, same_losses = apply_gradients(optimizer, state, losses, gradients, rates)
    assert not np.array_equal(updated["maps"][0].log_scale, maps[0].log_scale) and (same_losses == 1).all()
    kernels = (gradients[1].kernels[0].at[1, 1, 2, 3, 4].set(jnp.nan),)
    bad = gradients._replace(key=PolynomialMap(kernels, gradients[1].biases, gradients[1].log_scale, 1, "relu"))
    unchanged, losses = apply_gradients(optimizer, state, losses, bad, rates)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(unchanged), jax.tree.leaves(state), strict=True))
    assert np.argwhere(np.isnan(losses)).tolist() == [[1, 1]]


def test_non_finite_tensors_are_described_by_block():
    tree = {"blocks": {"kernel": np.ones((3, 2, 2))}, "head": {"kernel": np.ones((2, 2))}}
    tree["blocks"]["kernel"][2, 0, 1] = np.inf
    tree["head"]["kernel"][0, 0] = np.nan
    assert (
        guard.describe_non_finite(non_finite(jax.tree.map(jnp.asarray, tree)))
        == "blocks/kernel of block 2, head/kernel"
    )


def test_the_guard_reads_a_step_after_the_next_has_started():
    """It waits for the step that has just started only before a save."""
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

    guarded = Guard("stage", 0, lambda *_: "here")
    for step in range(3):
        guarded.record(step, [Number(float(step))])
        assert read == [float(i) for i in range(step)]
    guarded.check_last()
    assert read == [0.0, 1.0, 2.0]
    guarded.record(3, [Number(np.inf)])
    with pytest.raises(InputError, match="stage: step 4: here"):
        guarded.check_last()
