"""The sprites score of videos made by the exported parts, against videos that JAX makes from the same noise."""

import pathlib

import jax
import numpy as np
from etils import epath

from jsurgery import diffusion
from jsurgery.data import sprites
from jsurgery.data.prompts import SPRITE_PROMPTS
from jsurgery.diffusion import sample
from jsurgery.errors import InputError
from jsurgery.evaluate.sprites_score import measure
from jsurgery.io.files import write_json
from jsurgery.runtime.finite import check_finite
from jsurgery.runtime.progress import say
from jsurgery.wan import pipeline
from jsurgery.wan.checkpoint import load_transformer, load_vae
from jsurgery.wan.guidance import guided_velocity
from jsurgery.wan.prompt_embedder import PromptEmbedder

from .driver import Pipeline
from .parts import ExportJob

# Largest relative difference of the mean score from JAX's. Other precisions are reported without a bound.
BOUNDS = {"float32": 0.02, "w8a16": 0.05}


def export(job: ExportJob, folder: pathlib.Path, choices: tuple[str, ...]) -> None:
    """Writes `chain/score.PRECISION.json`, a row of parity.json, for each precision.

    `choices` are the number of prompts and the precisions. Raises InputError for a solver that draws noise every step.
    """
    count, *precisions = choices
    if job.sampler["solver"] == "euler_ancestral":
        raise InputError("--score: expected a solver that draws no noise at every step, found euler_ancestral")
    numbers = range(SPRITE_PROMPTS, SPRITE_PROMPTS + int(count))
    prompts = [sprites.scene_at(job.seed, number).caption for number in numbers]
    generators = {"jax": jax_generator(job)} | {precision: Pipeline(folder, precision) for precision in precisions}
    shape = job.tensors()["latents"].shape
    noises = [np.asarray(diffusion.initial_noise(job.seed, [number], shape)[0]) for number in range(int(count))]
    mean_scores = {}
    for name, generate in generators.items():
        try:
            videos = [generate(prompt, noise) for prompt, noise in zip(prompts, noises, strict=True)]
        except ArithmeticError as error:
            raise InputError(f"export: --score: {name}: {error}") from None
        scores = [np.mean(list(measure(v, prompt).values())) for v, prompt in zip(videos, prompts, strict=True)]
        mean_scores[name] = float(np.mean(scores))
        say(f"export: sprites score of {count} videos, {name}: {mean_scores[name]:.4f}")
    for precision in precisions:
        score, jax_score = mean_scores[precision], mean_scores["jax"]
        difference = abs(score / jax_score - 1)
        bound = BOUNDS.get(precision)
        row = {"part": "video", "format": "tflite", "precision": precision, "prompts": int(count)}
        row |= {"score": score, "jax_score": jax_score, "relative_error": difference, "max_error": None}
        row |= {"bound": bound, "passed": bound is None or difference <= bound}
        write_json(epath.Path(folder) / "chain" / f"score.{precision}.json", row)


def jax_generator(job: ExportJob):
    """A function (prompt, noise [T, H, W, C]) -> video uint8 [F, H, W, 3], by our own JAX pipeline."""
    base = pathlib.Path(job.base)
    ours = pipeline.Pipeline(PromptEmbedder(base), load_transformer(job.transformer), load_vae(base / "vae"))
    sampler = job.sampler

    @jax.jit
    def latents(text, negative_text, noise):
        velocity = guided_velocity(ours.transformer, text, negative_text, sampler["guidance"], True)
        fixed = {name: sampler[name] for name in ("steps", "shift", "solver")}
        return sample(velocity, noise[None], **fixed, key=jax.random.key(job.seed))[0]

    def generate(prompt: str, noise: np.ndarray) -> np.ndarray:
        embed = lambda words: ours.embed([words], job.text_length)
        sampled = np.asarray(latents(embed(prompt), embed(sampler["negative_prompt"]), noise))
        check_finite(sampled, f"export: JAX's latents of {prompt!r}")
        return np.round((ours.vae.decode_in_chunks(sampled)[0] + 1) * 127.5).astype(np.uint8)

    return generate
