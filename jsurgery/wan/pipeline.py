"""Prompt to video: tokenizer, text encoder, transformer and VAE of one model folder."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsurgery.diffusion import (
    initial_noise,
    initial_state,
    sample,
    schedule,
    step_keys,
)
from jsurgery.wan.checkpoint import load_text_encoder, load_transformer, load_vae
from jsurgery.wan.guidance import guided_velocity, sampling_step
from jsurgery.wan.model_folder import model_path, pipeline_folder, transformer_folder
from jsurgery.wan.text_encoder import TextEncoder, encode_prompts
from jsurgery.wan.tokenizer import Tokenizer
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.vae import WanVae
from jsurgery.wan.video_size import latent_grid


@dataclasses.dataclass
class Pipeline:
    """A loaded model. `transformer` may be swapped for another of the same latents and text."""

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    transformer: WanTransformer
    vae: WanVae

    def embed(self, prompts: Sequence[str], length: int) -> jax.Array:
        """Text embeddings [B, length, text_dim], zero after each prompt's end."""
        token_ids, mask = self.tokenizer(list(prompts), length)
        return _embed(self.text_encoder, token_ids, mask)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return *latent_grid(frames, height, width), self.transformer.config.in_channels

    def sample(
        self, prompts: Sequence[str], config: ConfigDict, *, seed: int, first: int = 0, record: bool = False
    ) -> Any:
        """Latents [B, T, H, W, C] of prompts, by `config.sampler` and `config.video`, and with `record` the trajectory.

        The noise of a prompt depends on the seed and on its number (`first`, `first` + 1, ...), not on the batch.
        """
        return _sample(self.transformer, *self._inputs(prompts, config, seed, first), _Sampling.of(config, record))

    def sample_by_steps(
        self,
        prompts: Sequence[str],
        config: ConfigDict,
        *,
        seed: int,
        first: int = 0,
        on_step: Callable[[int], None] = lambda done: None,
    ) -> jax.Array:
        """The latents of `sample` by a compiled step instead of a compiled loop; `on_step` hears how many are done."""
        text, blank, noise, key = self._inputs(prompts, config, seed, first)
        sampler = config.sampler
        rows = schedule(sampler.solver, sampler.steps, sampler.shift)
        keys = step_keys(rows, key)
        state = initial_state(noise)
        for i in range(sampler.steps):
            inputs = text, blank, state, rows.row(i), None if keys is None else keys[i]
            state = sampling_step(self.transformer, *inputs, sampler.guidance, sampler.guidance_batched)
            state.x.block_until_ready()
            on_step(i + 1)
        return state.x

    def _inputs(
        self, prompts: Sequence[str], config: ConfigDict, seed: int, first: int
    ) -> tuple[Any, Any, jax.Array, jax.Array]:
        """Text, negative text (None where guidance does not read it), noise, and the key of fresh noise."""
        video, sampler = config.video, config.sampler
        shape = self.latent_shape(video.frames, video.height, video.width)
        noise = initial_noise(seed, range(first, first + len(prompts)), shape)
        text = self.embed(prompts, config.text_length)
        blank = None if sampler.guidance == 1 else self.embed([sampler.negative_prompt], config.text_length)
        return text, blank, noise, jax.random.fold_in(jax.random.key(seed), first)

    def encode(self, video_BxFxHxWx3: np.ndarray) -> np.ndarray:
        """Latents [B, T, H, W, C] of float videos in [-1, 1]."""
        return self.vae.encode_in_chunks(video_BxFxHxWx3)

    def decode(self, latents_BxTxHxWxC: jax.Array | np.ndarray) -> np.ndarray:
        """Videos uint8 [B, F, H, W, 3], one at a time."""
        videos = [self.vae.decode_in_chunks(latents[None])[0] for latents in latents_BxTxHxWxC]
        return np.stack([np.round((video + 1) * 127.5).astype(np.uint8) for video in videos])

    def __call__(self, prompts: str | Sequence[str], config: ConfigDict, *, seed: int = 0) -> np.ndarray:
        """Videos uint8 [B, F, H, W, 3] of one prompt or several."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return self.decode(self.sample(prompts, config, seed=seed)[0])


def load_pipeline(path: str, dtype: Any = jnp.float32, mesh: Mesh | None = None, exchange: str = "gather") -> Pipeline:
    """A pipeline folder in the diffusers layout, an operated model's folder, or a bundled name.

    With a mesh, the transformer's parameters go where they belong on it, and it computes there.
    """
    folder = model_path(path)
    base = pipeline_folder(folder)
    transformer = load_transformer(transformer_folder(folder), dtype, mesh)
    if mesh is not None:
        transformer.set_mesh(mesh, exchange)
    return Pipeline(
        tokenizer=Tokenizer(base / "tokenizer"),
        text_encoder=load_text_encoder(base / "text_encoder"),
        transformer=transformer,
        vae=load_vae(base / "vae"),
    )


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """What a compiled sampler is specialised to."""

    solver: str
    steps: int
    shift: float
    guidance: float
    guidance_batched: bool
    record: bool = False

    @classmethod
    def of(cls, config: ConfigDict, record: bool = False) -> Self:
        chosen = config.sampler.to_dict()
        del chosen["negative_prompt"]
        return cls(**chosen, record=record)


@functools.partial(nnx.jit, static_argnames="settings")
def _sample(transformer, text, blank, noise, key, settings: _Sampling):
    return sample(
        guided_velocity(transformer, text, blank, settings.guidance, settings.guidance_batched),
        noise,
        steps=settings.steps,
        shift=settings.shift,
        solver=settings.solver,
        key=key,
        record=settings.record,
    )


@nnx.jit
def _embed(text_encoder, token_ids, mask):
    return encode_prompts(text_encoder, token_ids, mask)


def batched(items: Sequence[Any], size: int) -> Iterator[tuple[int, Sequence[Any]]]:
    """(number of the first, batch) over `items`."""
    for start in range(0, len(items), size):
        yield start, items[start : start + size]
