"""Checkpoints by the clock; a checkpoint holds the saved state, though the next step overwrites its buffers at once."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from jsurgery.runtime import checkpoints as checkpoints_module
from jsurgery.runtime.checkpoints import Checkpoints


def test_state_whose_buffers_are_donated_while_it_is_saved(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def update(state):
        return {"a": state["a"] + 1}

    state = {"a": jnp.zeros((1000, 1000))}
    checkpoints = Checkpoints(tmp_path, every=1, keep=9)
    for step in range(1, 4):
        state = update(state)
        checkpoints.save(step, state)
    for _ in range(20):
        state = update(state)
    checkpoints.close()
    step, restored = Checkpoints(tmp_path, every=1, keep=9).restore({"a": jnp.zeros((1000, 1000))})
    assert step == 3 and (np.asarray(restored["a"]) == 3).all()


def test_checkpoints_by_minutes_and_by_steps(tmp_path, monkeypatch):
    """Steps take 25 seconds. A save by the number of steps starts the minute anew."""
    now = 0
    monkeypatch.setattr(checkpoints_module, "time", types.SimpleNamespace(monotonic=lambda: now))
    for minutes, saved in ((1, [3, 5, 8, 10, 11]), (0, [5, 10, 11])):
        with Checkpoints(tmp_path / str(minutes), every=5, minutes=minutes, keep=99) as checkpoints:
            for step in range(1, 12):
                now += 25
                checkpoints.save(step, {"a": jnp.full(2, step)}, last=step == 11)
        assert checkpoints.complete_steps() == saved
