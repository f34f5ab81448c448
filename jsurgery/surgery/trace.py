"""trace: the teacher samples from prompts, and the noisy latents that it passes through are kept."""

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.data import sprites
from jsurgery.data.shards import Records, shard_path, text_array, write_shard
from jsurgery.diffusion import schedule
from jsurgery.errors import InputError
from jsurgery.runtime.progress import Progress
from jsurgery.wan.pipeline import Pipeline

SPRITE_PROMPTS = 10_000_000  # scene numbers from here on are prompts; training clips are numbered from 0


def load_prompts(config: ConfigDict, count: int, *, skip: int = 0) -> list[str]:
    """`count` prompts after the first `skip`: lines of a file, or captions of the procedural set."""
    if config.prompts == "sprites":
        numbers = range(SPRITE_PROMPTS + skip, SPRITE_PROMPTS + skip + count)
        return [sprites.scene_at(config.seed, i, two_sprites=config.data.two_sprites).caption for i in numbers]
    path = epath.Path(config.prompts)
    if not path.exists():
        raise InputError(f"config.prompts: {config.prompts}: no such file; expected one prompt a line, or 'sprites'")
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(lines) < skip + count:
        raise InputError(f"config.prompts: {config.prompts}: expected {skip + count} prompts, found {len(lines)}")
    return lines[skip : skip + count]


def kept_steps(steps: int, keep: int) -> np.ndarray:
    """Which of the sampler's steps are kept, evenly spread, the first and noisiest always among them."""
    return np.round(np.linspace(0, steps - 1, keep)).astype(int) if keep > 1 else np.array([0])


def trace(config: ConfigDict, pipeline: Pipeline, folder: epath.Path) -> None:
    """Writes `folder/steps` (one record a prompt and step) and `folder/text` (one a prompt, the negative prompt last).

    A step holds `latents` float16 [T, H, W, C], `timestep`, `conditional` (the guidance branch to replay, a coin toss)
    and `prompt`, a number into the texts.
    """
    sampler, count, size = config.sampler, config.trace.prompts, config.trace.batch
    prompts = load_prompts(config, count)
    texts = np.asarray(pipeline.embed([*prompts, sampler.negative_prompt], config.text_length), np.float32)
    write_shard(
        shard_path(folder / "text", 0),
        (
            {"embedding": e, "prompt": text_array(p)}
            for e, p in zip(texts, [*prompts, sampler.negative_prompt], strict=True)
        ),
    )
    kept = kept_steps(sampler.steps, config.trace.keep_steps)
    timesteps = schedule(config.trace.solver, sampler.steps, sampler.shift).timestep[kept]
    with config.unlocked():
        traced = config.copy_and_resolve_references()
    traced.sampler.solver = config.trace.solver
    progress = Progress("trace", count)
    for start in range(0, count, size):
        path = shard_path(folder / "steps", start // size)
        batch = prompts[start : start + size]
        if not path.exists():
            _, trajectory = pipeline.sample(batch, traced, seed=config.seed, first=start, record=True)
            latents_KxBxTxHxWxC = np.asarray(jax.device_get(trajectory))[kept].astype(np.float16)
            coin = np.random.default_rng([config.seed, start]).random((len(batch), len(kept))) < 0.5
            write_shard(
                path,
                (
                    {
                        "latents": latents_KxBxTxHxWxC[step, item],
                        "timestep": np.float32(timesteps[step]),
                        "conditional": np.bool_(coin[item, step]),
                        "prompt": np.int32(start + item),
                    }
                    for item in range(len(batch))
                    for step in range(len(kept))
                ),
            )
        progress.show(start + len(batch))
    progress.show(count, last=True)


class TraceSteps:
    """Random access to traced steps of some prompts, each with the text to replay it with; a source for grain."""

    def __init__(self, folder: epath.Path, prompts: range):
        self.steps, self.texts = Records(folder / "steps"), Records(folder / "text")
        per_prompt = len(self.steps) // (len(self.texts) - 1)
        self.first, self.count = prompts.start * per_prompt, len(prompts) * per_prompt

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        step = self.steps[self.first + index]
        text = int(step["prompt"]) if step["conditional"] else len(self.texts) - 1
        return {
            "latents": step["latents"].astype(np.float32),
            "timestep": step["timestep"],
            "text": self.texts[text]["embedding"],
        }
