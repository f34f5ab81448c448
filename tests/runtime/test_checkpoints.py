"""A checkpoint holds the saved state, though the next step overwrites its buffers at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

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
