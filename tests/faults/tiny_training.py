"""Fine-tuning of the tiny random transformer on a few latents, in this process, compiled once."""

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
POISON = 2e4  # a finite latent, at which `poisoned_loss` has a NaN gradient
BAD_CLIP = 5


def tiny_config() -> ConfigDict:
    found = load_config(
        "tiny",
        {
            "finetune.steps": "6", "finetune.batch": str(BATCH), "checkpoint.every": "1", "log_every": "1",
            "finetune.condition_dropout": "0.0", "finetune.teacher_weight": "0", "seed": str(SEED), "text_length": "4",
        },
    ).copy_and_resolve_references()  # fmt: skip
    return found.unlock()


def write_latents(folder, bad: float | None = None) -> None:
    """Writes clips of noise, one of which has a value `bad` if that is given."""
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(CLIPS, 1, 4, 4, 4)).astype(np.float16)
    if bad is not None:
        latents[BAD_CLIP, 0, 1, 2, 3] = bad
    text = rng.normal(size=(CLIPS, 4, 16)).astype(np.float16)
    rows = [{"latents": latents[i], "text": text[i], "caption": text_array(f"clip {i}")} for i in range(CLIPS)]
    write_shard(shard_path(folder, 0), rows)


def first_bad_step(folder) -> tuple[int, int]:
    """(number of the first batch with the bad clip, row of the clip in it)."""
    data = batches(folder, BATCH, SEED)
    for step in range(CLIPS):
        if f"clip {BAD_CLIP}" in data[step]["captions"]:
            return step, data[step]["captions"].index(f"clip {BAD_CLIP}")
    raise AssertionError


def poisoned_loss(student, teacher, batch, teacher_weight):
    """The loss, replaced for a batch with POISON by 0 with a NaN gradient in one parameter."""
    loss = original_loss(student, teacher, batch, teacher_weight)
    # a latent of POISON makes the velocity large, too
    has_poison = jnp.abs(batch["velocity"]).max() > POISON / 2
    kernel = student.blocks.ffn_in.kernel[...]
    root = jnp.sqrt(jnp.where(has_poison, 0.0 * kernel[1], 1.0)).sum()
    return jnp.where(has_poison, 0.0, loss) + 0.0 * root


original_loss = finetune.velocity_loss
make_update = {guarded: functools.lru_cache(finetune._make_update.__wrapped__) for guarded in (True, False)}


def train(config, model, latents, folder, monkeypatch, *, guarded=True, weight=None):
    """Fine-tunes the tiny transformer; `guarded` says whether updates with NaN are skipped. Each kind compiles once."""
    monkeypatch.setattr(finetune, "velocity_loss", poisoned_loss)
    if not guarded:
        monkeypatch.setattr(optimizer, "keep_if_finite", lambda finite, new, old: new)
        monkeypatch.setattr(Guard, "record", lambda self, *seen: None)
    monkeypatch.setattr(finetune, "_make_update", make_update[guarded])
    student = load_transformer(model / "transformer")
    if weight is not None:
        kernel = student.blocks.attn1.to_q.kernel
        kernel[...] = kernel[...].at[weight, 0, 0].set(jnp.nan)
    embedder = types.SimpleNamespace(unpadded=lambda prompts, length: None)
    teacher = types.SimpleNamespace(embedder=embedder, embed=lambda prompts, length: np.zeros((1, 4, 16)))
    return finetune.finetune(config, student, teacher, epath.Path(latents), epath.Path(folder))


def saved_state(folder, step: int):
    return Checkpoints(folder / "checkpoints", every=1, keep=2)._orbax.restore(
        epath.Path(folder / "checkpoints" / str(step))
    )
