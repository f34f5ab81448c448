"""Videos by the exported parts alone beside JAX's of the same noise, judged by the sprites score."""

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
from jsurgery.runtime.progress import say
from jsurgery.wan import guidance
from jsurgery.wan import pipeline as ours
from jsurgery.wan.checkpoint import load_text_encoder, load_transformer, load_vae
from jsurgery.wan.tokenizer import Tokenizer

from .driver import Pipeline
from .parts import ExportJob

# Largest differences of the mean score from JAX's, relative; the others are reported only.
BOUNDS = {"float32": 0.02, "w8a16": 0.05}


def export(job: ExportJob, folder: pathlib.Path, choices: tuple[str, ...]) -> None:
    """Writes `chain/score.PRECISION.json`, rows of parity.json; `choices` are the number of prompts and precisions."""
    count, *precisions = choices
    if job.sampler["solver"] == "euler_ancestral":
        raise InputError("--score: needs a solver without fresh noise, found euler_ancestral")
    numbers = range(SPRITE_PROMPTS, SPRITE_PROMPTS + int(count))
    prompts = [sprites.scene_at(job.seed, number).caption for number in numbers]
    makers = {"jax": jax_maker(job)} | {precision: Pipeline(folder, precision) for precision in precisions}
    shape = job.tensors()["latents"].shape
    noises = [np.asarray(diffusion.initial_noise(job.seed, [number], shape)[0]) for number in range(int(count))]
    total = {}
    for name, make in makers.items():
        videos = [make(prompt, noise) for prompt, noise in zip(prompts, noises, strict=True)]
        scores = [np.mean(list(measure(v, prompt).values())) for v, prompt in zip(videos, prompts, strict=True)]
        total[name] = float(np.mean(scores))
        say(f"export: sprites score of {count} videos, {name}: {total[name]:.4f}")
    for precision in precisions:
        difference = abs(total[precision] / total["jax"] - 1)
        bound = BOUNDS.get(precision)
        row = {"part": "video", "format": "tflite", "precision": precision, "prompts": int(count)}
        row |= {"score": total[precision], "jax_score": total["jax"], "relative_error": difference, "max_error": None}
        row |= {"bound": bound, "passed": bound is None or difference <= bound}
        write_json(epath.Path(folder) / "chain" / f"score.{precision}.json", row)


def jax_maker(job: ExportJob):
    """(prompt, noise) -> video uint8 [F, H, W, 3], by our own pipeline."""
    base = pathlib.Path(job.base)
    tokenizer, encoder = Tokenizer(base / "tokenizer"), load_text_encoder(base / "text_encoder")
    network, vae, sampler = load_transformer(job.transformer), load_vae(base / "vae"), job.sampler

    @jax.jit
    def latents(text, blank, noise):
        velocity = guidance.guided_velocity(network, text, blank, sampler["guidance"], True)
        fixed = {name: sampler[name] for name in ("steps", "shift", "solver")}
        return sample(velocity, noise[None], **fixed, key=jax.random.key(job.seed))[0]

    def make(prompt: str, noise: np.ndarray) -> np.ndarray:
        embed = lambda words: ours._embed(encoder, *tokenizer([words], job.text_length))
        found = latents(embed(prompt), embed(sampler["negative_prompt"]), noise)
        return np.round((vae.decode_in_chunks(np.asarray(found))[0] + 1) * 127.5).astype(np.uint8)

    return make
