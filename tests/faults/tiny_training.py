"""Fine-tuning of the tiny random transformer on a handful of latents, in this process, compiled once."""

import functools
import types

import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.data.latents import batches
from jsurgery.data.shards import shard_path, text_array, write_shard
from jsurgery.load_config import load_config
from jsurgery.runtime import optimizer
from jsurgery.runtime.checkpoints import Checkpoints
from jsurgery.runtime.guard import Guard
from jsurgery.surgery import finetune
from jsurgery.wan.checkpoint import load_transformer

CLIPS, BATCH, SEED = 12, 2, 3
POISON = 2e4  # a finite latent by which only a gradient becomes NaN
BAD_CLIP = 5


def tiny_config() -> ConfigDict:
    found = load_config(
        "tiny",
        {
            "finetune.steps": "6", "finetune.batch": str(BATCH), "checkpoint.every": "1", "log_every": "1",
            "finetune.condition_dropout": "0.0", "seed": str(SEED), "text_length": "4",
        },
    ).copy_and_resolve_references()  # fmt: skip
    return found.unlock()


def write_latents(folder, bad: float | None = None) -> None:
    """Clips of noise, of which one has a value that is `bad`."""
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(CLIPS, 1, 4, 4, 4)).astype(np.float16)
    if bad is not None:
        latents[BAD_CLIP, 0, 1, 2, 3] = bad
    text = rng.normal(size=(CLIPS, 4, 16)).astype(np.float16)
    rows = [{"latents": latents[i], "text": text[i], "caption": text_array(f"clip {i}")} for i in range(CLIPS)]
    write_shard(shard_path(folder, 0), rows)


def first_bad_step(folder) -> tuple[int, int]:
    """The first batch that has the bad clip, and at which of its rows."""
    data = batches(folder, BATCH, SEED)
    for step in range(CLIPS):
        if f"clip {BAD_CLIP}" in data[step]["captions"]:
            return step, data[step]["captions"].index(f"clip {BAD_CLIP}")
    raise AssertionError


def poisoned(student, teacher, batch, teacher_weight):
    """The loss, and a term that is always zero, whose gradient in one parameter is NaN at a poisoned batch."""
    loss = original_loss(student, teacher, batch, teacher_weight)
    # noised at level sigma, a latent of POISON stays large in the velocity
    far = jnp.abs(batch["velocity"]).max() > POISON / 2
    kernel = student.blocks.ffn_in.kernel[...]
    root = jnp.sqrt(jnp.where(far, 0.0 * kernel[1], 1.0)).sum()
    return jnp.where(far, 0.0, loss) + 0.0 * root


original_loss = finetune.velocity_loss
compiled = {guarded: functools.lru_cache(finetune._make_update.__wrapped__) for guarded in (True, False)}


def train(config, model, latents, folder, monkeypatch, *, guarded=True, weight=None):
    """Fine-tuning of the tiny transformer; guarded and other updates are compiled once each."""
    monkeypatch.setattr(finetune, "velocity_loss", poisoned)
    if not guarded:
        monkeypatch.setattr(optimizer, "keep_if_finite", lambda finite, new, old: new)
        monkeypatch.setattr(Guard, "record", lambda self, *seen: None)
    monkeypatch.setattr(finetune, "_make_update", compiled[guarded])
    student = load_transformer(model / "transformer")
    if weight is not None:
        kernel = student.blocks.attn1.to_q.kernel
        kernel[...] = kernel[...].at[weight, 0, 0].set(jnp.nan)
    teacher = types.SimpleNamespace(
        transformer=load_transformer(model / "transformer"), embed=lambda prompts, length: np.zeros((1, 4, 16))
    )
    return finetune.finetune(config, student, teacher, epath.Path(latents), epath.Path(folder))


def saved_state(folder, step: int):
    return Checkpoints(folder / "checkpoints", every=1, keep=2)._orbax.restore(
        epath.Path(folder / "checkpoints" / str(step))
    )
