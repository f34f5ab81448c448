"""trace: samples videos of prompts with the teacher and keeps the noisy latents of its steps."""

from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.data.latents import clip_record
from jsurgery.data.prompts import load_prompts
from jsurgery.data.shards import Record, Records, array_text, shard_path, text_array, write_shard
from jsurgery.diffusion import evenly_spaced_steps, schedule
from jsurgery.runtime import processes
from jsurgery.runtime.finite import in_half
from jsurgery.runtime.mesh import to_host
from jsurgery.runtime.preemption import Preemption
from jsurgery.runtime.progress import Progress
from jsurgery.wan.pipeline import Pipeline

CLIPS = "clips"  # the folder of the clips at which trajectories of training prompts end


def traced_prompts(config: ConfigDict) -> range:
    """The prompts whose steps are kept: all, or only the held-out ones if maps learn while the teacher samples."""
    first = config.trace.prompts - config.trace.holdout if config.distill.mode == "sampling" else 0
    return range(first, config.trace.prompts)


def trace(
    config: ConfigDict,
    pipeline: Pipeline,
    folder: epath.Path,
    seen: Callable[[str, jax.Array], None] = lambda prompt, latents: None,
) -> None:
    """Writes `folder/steps` (one record a prompt and step) and `folder/text` (one a prompt, the negative prompt last).

    Also `folder/clips`, where the trajectories of training prompts end, for a fine-tuning that is given no other data.
    A step holds `latents` float16 [T, H, W, C], `timestep`, `conditional` (the branch of guidance to replay: a coin
    toss, or always the prompt without guidance) and `prompt`, the number of its text. With several processes, all
    sample, each with its part of the model, and process 0 writes. `seen` is called with the first prompt that is
    sampled and its latents [1, T, H, W, C].
    """
    sampler, size = config.sampler, config.trace.batch
    prompts, chosen = load_prompts(config, config.trace.prompts), traced_prompts(config)
    words = [*prompts, sampler.negative_prompt]
    embeddings = pipeline.embedder.unpadded(words, config.text_length)
    text_records = (text_record(*each, config.text_length) for each in zip(embeddings, words, strict=True))
    processes.on_first(lambda: write_shard(shard_path(folder / "text", 0), text_records))
    kept = evenly_spaced_steps(sampler.steps, config.trace.keep_steps)
    timesteps = schedule(config.trace.solver, sampler.steps, sampler.shift, sampler.timesteps).timestep[kept]
    with config.unlocked():
        traced = config.copy_and_resolve_references()
    traced.sampler.solver = config.trace.solver
    starts = chosen[::size]
    paths = {start: shard_path(folder / "steps", number) for number, start in enumerate(starts)}
    missing = processes.on_first(lambda: [start for start in starts if not paths[start].exists()])
    progress = Progress("trace", len(chosen))
    with Preemption("trace") as preemption:
        for start in starts:
            batch = prompts[start : start + size]
            if start in missing:
                on_step = progress.during(start - chosen.start, len(batch), sampler.steps)
                latents, trajectory = pipeline.sample(
                    batch, traced, seed=config.seed, first=start, record=list(kept), on_step=on_step
                )
                if start == missing[0]:
                    seen(batch[0], latents[:1])
                ends = list(zip(to_host(latents), embeddings[start:], batch, strict=False))
                clips = [
                    clip_record(*end) for end in ends[: max(0, config.trace.prompts - config.trace.holdout - start)]
                ]
                assert trajectory is not None
                number = starts.index(start)
                processes.on_first(lambda number=number, clips=clips: write_clips(folder, number, clips))
                coin = np.random.default_rng([config.seed, start]).random((len(batch), len(kept))) < 0.5
                coin |= sampler.guidance == 1  # sampling never asks for the other branch
                steps = (
                    {
                        "latents": in_half(trajectory[step, item], f"traced latents of prompt {start + item}"),
                        "timestep": np.float32(timesteps[step]),
                        "conditional": np.bool_(coin[item, step]),
                        "prompt": np.int32(start + item),
                    }
                    for item in range(len(batch))
                    for step in range(len(kept))
                )
                processes.on_first(lambda start=start, steps=steps: write_shard(paths[start], steps))
            progress.show(start - chosen.start + len(batch))
            preemption.should_stop()
            preemption.stop_if_asked()
    progress.show(len(chosen), last=True)


def write_clips(folder: epath.Path, number: int, clips: list[Record]) -> None:
    """Writes the clips of one batch of prompts, if there are any, to a shard in `folder/clips`."""
    if clips:
        write_shard(shard_path(folder / CLIPS, number), clips)


def text_record(embedding_LxD: np.ndarray, prompt: str, length: int) -> Record:
    """The record of a prompt's text embedding, unpadded, and in 16 bits where it was computed in 16."""
    stored = embedding_LxD if embedding_LxD.dtype == np.float32 else in_half(embedding_LxD, f"text of {prompt!r}")
    return {"embedding": stored, "prompt": text_array(prompt), "length": np.int32(length)}


def padded_embedding(record: Record) -> np.ndarray:
    """The text embedding float32 [text_length, D] of a `text_record`, or of an older one, which is padded already."""
    embedding_LxD = record["embedding"].astype(np.float32)
    missing = int(record.get("length", len(embedding_LxD))) - len(embedding_LxD)
    return np.pad(embedding_LxD, ((0, missing), (0, 0)))


class TraceSteps:
    """Random access to the traced steps of some prompts, by default of all that were traced; a source for grain.

    Each step comes with the text embedding of its guidance branch. `prompts` are the numbers of the prompts, each of
    which has `steps_per_prompt` steps: `steps[position(prompt, step)]`.
    """

    def __init__(self, folder: epath.Path, prompts: range | None = None):
        self.steps, self.texts = Records(folder / "steps"), Records(folder / "text")
        first_traced = int(self.steps[0]["prompt"])  # `trace` keeps no steps of earlier prompts
        self.negative_text = len(self.texts) - 1
        traced = range(first_traced, self.negative_text)
        self.prompts = traced if prompts is None else prompts
        self.steps_per_prompt = len(self.steps) // len(traced)
        self.first = (self.prompts.start - first_traced) * self.steps_per_prompt

    def __len__(self) -> int:
        return len(self.prompts) * self.steps_per_prompt

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        step = self.steps[self.first + index]
        return {
            "latents": step["latents"].astype(np.float32),
            "timestep": step["timestep"],
            "text": padded_embedding(self._text_record(step)),
        }

    def position(self, prompt: int, step: int) -> int:
        """The index of a prompt's step; `step` counts the steps that were kept of it."""
        return self.prompts.index(prompt) * self.steps_per_prompt + step

    def text(self, index: int) -> str:
        """The prompt whose embedding a step comes with: the negative prompt in the unconditional branch."""
        return array_text(self._text_record(self.steps[self.first + index])["prompt"])

    def _text_record(self, step: Record) -> Record:
        return self.texts[int(step["prompt"]) if step["conditional"] else self.negative_text]
