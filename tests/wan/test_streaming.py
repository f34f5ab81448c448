"""Sampling chunk after chunk against sampling the whole video at once."""

import dataclasses

import numpy as np
import pytest

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.load_config import load_config
from jsurgery.wan.pipeline import Pipeline
from jsurgery.wan.streaming import latent_chunks, stream_latents, streamed_kinds
from tests.conftest import TINY_TRANSFORMER

SIZE = {"video.height": "32", "video.width": "48", "text_length": "3", "trace.keep_steps": "1"}


class Words:
    """An embedder whose texts depend on the prompt alone."""

    def __call__(self, prompts, length):
        draw = lambda prompt: np.random.default_rng(len(prompt)).normal(size=(length, TINY_TRANSFORMER.text_dim))
        return np.stack([draw(prompt) for prompt in prompts]).astype(np.float32)


@pytest.fixture(scope="module")
def build(random_transformer):
    def make(rates, **fields):
        hybrid = HybridConfig(rates, **fields)
        return random_transformer(dataclasses.replace(TINY_TRANSFORMER, num_layers=len(rates), hybrid=hybrid))

    return make


def config_of(latent_frames, **sampler):
    fields = {f"sampler.{name}": str(value) for name, value in sampler.items()}
    frames = {"video.frames": str(4 * latent_frames - 3), "sampler.noise": "frame"}
    return load_config("tiny", SIZE | frames | fields)


def both_ways(transformer, config, given=None):
    """(latents of the whole video, the chunks of the stream)."""
    pipeline = Pipeline(Words(), transformer, lambda: None)
    sources = [(3, 7)]
    whole = pipeline.sample(["a prompt"], config, sources=sources, given=given)[0]
    text, negative = pipeline.embed(["a prompt"], 3), pipeline.embed([config.sampler.negative_prompt], 3)
    negative = None if config.sampler.guidance == 1 else negative
    return np.asarray(whole), list(stream_latents(transformer, config, text, negative, source=sources[0], given=given))


CASES = {
    # several overlaps, also longer than a chunk; the last of 4 chunks is shorter
    "overlaps": (("C2O1", "C2O3", "C2O0"), 7, {"steps": 3, "solver": "unipc", "guidance": 4.0}),
    "one frame": (("C1O1", "C1O1"), 5, {"steps": 2, "solver": "lcm", "guidance": 2.0, "guidance_batched": False}),
    "longer than the video": (("C9O1",), 3, {"steps": 2, "solver": "euler", "guidance": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stream_has_the_latents_of_the_whole_video(build, case):
    rates, frames, sampler = CASES[case]
    transformer, config = build(rates), config_of(frames, **sampler)
    whole, chunks = both_ways(transformer, config)
    assert [chunk.shape[1] for chunk in chunks] == [
        end - first
        for first, end in latent_chunks(transformer.config, streamed_kinds(transformer.config, ""), config.video.frames)
    ]
    streamed = np.concatenate(chunks, axis=1)
    assert np.abs(streamed - whole).max() < 1e-4 and whole.std() > 0.1
