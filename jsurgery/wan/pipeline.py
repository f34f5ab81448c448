"""From prompt to video: the tokenizer, text encoder, transformer and VAE of one model folder."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsurgery.diffusion import initial_noise, initial_state, schedule, step_keys, velocities_per_step
from jsurgery.errors import InputError
from jsurgery.runtime.finite import all_finite, describe_weights
from jsurgery.runtime.garbage import free_dropped_models
from jsurgery.runtime.mesh import batch_shards, replicate, to_host
from jsurgery.wan.checkpoint import load_transformer, load_vae
from jsurgery.wan.guidance import blocks_not_finite, sampling_step, with_given_frames
from jsurgery.wan.lora import check_loras, loras_of
from jsurgery.wan.lora_file import LoraSource

# `model_path` must stay importable from here: published model cards import it from `jsurgery.wan.pipeline`.
from jsurgery.wan.model_folder import check_pipeline, model_path, pipeline_folder, transformer_folder
from jsurgery.wan.prompt_embedder import PromptEmbedder
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.vae import WanVae
from jsurgery.wan.video_size import latent_grid


class Pipeline:
    """A model whose parts are loaded when they are first needed. `with_transformer` gives it another transformer."""

    def __init__(
        self,
        embedder: PromptEmbedder,
        transformer: WanTransformer | Callable[[], WanTransformer],
        vae: WanVae | Callable[[], WanVae],
    ):
        """`transformer` and `vae` are models, or functions that load them. A function is called at most once."""
        self.embedder = embedder
        self._transformer = transformer if isinstance(transformer, WanTransformer) else functools.cache(transformer)
        self._vae = vae if isinstance(vae, WanVae) else functools.cache(vae)

    @property
    def transformer(self) -> WanTransformer:
        return self._transformer if isinstance(self._transformer, WanTransformer) else self._transformer()

    @property
    def vae(self) -> WanVae:
        return self._vae if isinstance(self._vae, WanVae) else self._vae()

    def drop_transformer(self) -> None:
        """Frees the transformer, unless others hold it too. It is loaded again when it is next needed."""
        if not isinstance(self._transformer, WanTransformer):
            self._transformer.cache_clear()
            free_dropped_models()

    def drop_vae(self) -> None:
        """Frees the VAE, unless others hold it too. It is loaded again when it is next needed."""
        if not isinstance(self._vae, WanVae):
            self._vae.cache_clear()
            free_dropped_models()

    def with_transformer(self, transformer: WanTransformer) -> "Pipeline":
        """The pipeline with another transformer. It shares the embeddings and the VAE with this one."""
        return Pipeline(self.embedder, transformer, self._vae)

    def embed(self, prompts: Sequence[str], length: int) -> jax.Array:
        """Text embeddings float32 [B, length, text_dim], with zeros after the end of each prompt.

        Reads all layers of the text encoder unless the prompts were embedded before. A caller who needs many prompts
        in turn embeds all of them first, by one call of `embedder.unpadded`.
        """
        return jnp.asarray(self.embedder(prompts, length), jnp.float32)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, H, W, C) of the latents of a video of `frames` x `height` x `width` pixels."""
        network = self.transformer.config
        return *latent_grid(frames, height, width, network.strides), network.in_channels

    @property
    def slots(self) -> int:
        """The number of prompts that the mesh computes at once, each on devices of its own."""
        mesh = self.transformer.mesh
        return 1 if mesh is None else batch_shards(mesh)

    def filled(self, prompts: int, config: ConfigDict) -> list[int]:
        """The rows of a batch of `prompts`, repeated from the first on until their velocities divide over the mesh."""
        velocities = velocities_per_step(config.sampler.guidance) if config.sampler.guidance_batched else 1
        unit = self.slots // math.gcd(self.slots, velocities)
        return [row % prompts for row in range(-(-prompts // unit) * unit)]

    def sample(
        self,
        prompts: Sequence[str],
        config: ConfigDict,
        *,
        seed: int = 0,
        first: int = 0,
        sources: Sequence[tuple[int, int]] | None = None,
        given: np.ndarray | None = None,
        record: Sequence[int] = (),
        on_step: Callable[[int], None] = lambda done: None,
    ) -> tuple[jax.Array, np.ndarray | None]:
        """Samples latents of prompts by `config.sampler` and `config.video`.

        A prompt's noise depends on the seed and on the prompt's number (`first`, `first` + 1, ...), not on the batch.
        With `sources`, the (seed, number) of every prompt, so does the fresh noise that some solvers add; noise that is
        drawn frame by frame always does. A batch that the mesh does not divide is filled up. `on_step` is called after
        every step with the number of steps done.
        With the latents `given` [B, K, H, W, C], those of an image, the videos begin with them.
        Returns the latents [B, T, H, W, C], and the latents before each of the K steps `record`, [K, B, ...] on the
        host, or None without such steps.
        """
        count, sampler = len(prompts), config.sampler
        rows = self.filled(count, config)
        numbered = sources or [(seed, first + number) for number in range(count)]
        text, negative_text, noise = self._inputs(
            [prompts[row] for row in rows], config, [numbered[row] for row in rows]
        )
        keys = [jax.random.fold_in(jax.random.key(seed), number) for seed, number in numbered]
        steps = schedule(sampler.solver, sampler.steps, sampler.shift, sampler.timesteps)
        by_frame = sampler.noise == "frame"
        one_key = sources is None and not by_frame
        keys = step_keys(steps, keys[0] if one_key else jnp.stack([keys[row] for row in rows]))
        first_frame = 0 if by_frame else None
        state, trajectory = initial_state(noise), []
        begin = None if given is None else jnp.asarray(given[np.array(rows)], jnp.float32)
        if self.transformer.device_mesh is not None:
            state = replicate(self.transformer.device_mesh, state)
            begin = None if begin is None else replicate(self.transformer.device_mesh, begin)
        for i in range(sampler.steps):
            trajectory += [to_host(state.x)[:count]] if i in record else []
            inputs = text, negative_text, state, steps.row(i), None if keys is None else keys[i]
            rule = sampler.guidance, sampler.guidance_batched, begin, first_frame
            following = sampling_step(self.transformer, *inputs, *rule)
            if not all_finite(following.x):  # waits for the step
                raise InputError(
                    f"sampling: step {i + 1} of {sampler.steps}: {self._cause(inputs)}; nothing is written of it"
                )
            state = following
            on_step(i + 1)
        latents = with_given_frames(state.x, begin)
        return latents[:count] if len(rows) > count else latents, np.stack(trajectory) if trajectory else None

    def _cause(self, inputs: tuple[Any, ...]) -> str:
        """Why a sampling step with these inputs left latents that are not finite."""
        text, negative_text, state, row, _ = inputs
        cause = f"the latents are not finite: the transformer's {describe_weights(nnx.state(self.transformer))}"
        for branch in (text, negative_text):
            if branch is not None:
                timesteps = jnp.full(len(state.x), row.timestep)
                words = jnp.broadcast_to(branch, (len(state.x), *branch.shape[1:]))
                found = np.flatnonzero(to_host(blocks_not_finite(self.transformer, state.x, timesteps, words)))
                if len(found):
                    return f"{cause}; the attention of block {found[0]} is the first that is not finite"
        return f"{cause}; the attention of every block is finite"

    def _inputs(
        self, prompts: Sequence[str], config: ConfigDict, sources: Sequence[tuple[int, int]]
    ) -> tuple[Any, Any, jax.Array]:
        """Text, negative text (None at guidance 1, which does not read it), and the noise of each (seed, number)."""
        video, sampler = config.video, config.sampler
        shape = self.latent_shape(video.frames, video.height, video.width)
        frames = (0, shape[0]) if sampler.noise == "frame" else None
        noise = jnp.concatenate([initial_noise(seed, [number], shape, frames) for seed, number in sources])
        text = self.embed(prompts, config.text_length)
        negative_text = None if sampler.guidance == 1 else self.embed([sampler.negative_prompt], config.text_length)
        return text, negative_text, noise

    def encode(self, video_BxFxHxWx3: np.ndarray) -> np.ndarray:
        """Latents [B, T, H, W, C] of videos in [-1, 1], float; see `WanVae.spread` for several devices."""
        return self.vae.encode_in_chunks(video_BxFxHxWx3)

    def decode(self, latents_BxTxHxWxC: jax.Array | np.ndarray) -> np.ndarray:
        """Videos uint8 [B, F, H, W, 3] of latents. Every device decodes a clip at a time."""
        latents, at_once = np.asarray(latents_BxTxHxWxC), self.vae.clips_at_once
        groups = (latents[start : start + at_once] for start in range(0, len(latents), at_once))
        decoded = (self.vae.decode_in_chunks(group) for group in groups)
        return np.concatenate([as_pixels(videos) for videos in decoded])

    def decode_as_they_come(self, latents_BxTxHxWxC: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """`decode` of one video whose latents come piece by piece: yields frames uint8 [F, H, W, 3] in turn."""
        return (as_pixels(frames[0]) for frames in self.vae.decode_as_they_come(latents_BxTxHxWxC))

    def __call__(self, prompts: str | Sequence[str], config: ConfigDict, *, seed: int = 0) -> np.ndarray:
        """Videos uint8 [B, F, H, W, 3] of one prompt or of several."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return self.decode(self.sample(prompts, config, seed=seed)[0])


def as_pixels(video: np.ndarray) -> np.ndarray:
    """uint8 of a video in [-1, 1]."""
    return np.round((video + 1) * 127.5).astype(np.uint8)


def configured_pipeline(config: ConfigDict, mesh: Mesh) -> Pipeline:
    """`load_pipeline` of `config.model` on a mesh."""
    dtypes = {"dtype": jnp.dtype(config.model.dtype), "vae_dtype": jnp.dtype(config.model.vae_dtype)}
    loras = loras_of(config)
    return load_pipeline(config.model.path, mesh=mesh, exchange=config.mesh.exchange, loras=loras, **dtypes)


def load_pipeline(
    path: str,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    exchange: str = "gather",
    loras: Sequence[LoraSource] = (),
    *,
    vae_dtype: Any = jnp.float32,
) -> Pipeline:
    """The model of a pipeline folder in the diffusers layout, of an operated model's folder, or of a bundled name.

    Its parts are loaded when they are first needed. With a mesh, the transformer's parameters are loaded onto it, and
    the transformer computes on it, and the VAE on those of its devices that this process has, a clip on each.
    `exchange` is that of `WanTransformer.set_mesh`; `loras` are merged into the transformer's weights. Raises
    InputError naming the file that is missing, damaged or does not fit: here by what headers tell, and by the values
    when a part is loaded.
    """
    folder = model_path(path)
    base = pipeline_folder(folder)
    check_loras(check_pipeline(path), loras)

    def transformer() -> WanTransformer:
        model = load_transformer(transformer_folder(folder), dtype, mesh, inference=True, loras=loras)
        if mesh is not None:
            model.set_mesh(mesh, exchange)
        return model

    def vae() -> WanVae:
        model = load_vae(base / "vae", vae_dtype)
        model.spread([] if mesh is None else mesh.local_devices)
        return model

    return Pipeline(PromptEmbedder(base, dtype), transformer, vae)


def batched(items: Sequence[Any], size: int) -> Iterator[tuple[int, Sequence[Any]]]:
    """`items` in batches of `size`, each with the index of its first item."""
    for start in range(0, len(items), size):
        yield start, items[start : start + size]
