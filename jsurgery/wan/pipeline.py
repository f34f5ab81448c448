"""Prompt to video: tokenizer, text encoder, transformer and VAE of one model folder."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsurgery.diffusion import State, Velocity, guided, initial_state, sample, schedule, solver_step, step_keys
from jsurgery.errors import InputError
from jsurgery.files import read_object
from jsurgery.wan import hub
from jsurgery.wan.hashes import check_hashes
from jsurgery.wan.rope import check_grid
from jsurgery.wan.safetensors_files import check_tensors
from jsurgery.wan.text_encoder import TextEncoder, encode_prompts, load_text_encoder, read_text_encoder_config
from jsurgery.wan.tokenizer import Tokenizer
from jsurgery.wan.transformer import WanConfig, WanTransformer, load_transformer, read_config
from jsurgery.wan.vae import WanVae, load_vae, read_vae_config

BUNDLED = {"tiny_wan": pathlib.Path(__file__).parents[1] / "assets" / "tiny_wan"}
VAE_STRIDES = (4, 8, 8)


def model_path(path: str) -> epath.Path:
    """A model folder, or the name of a bundled one. Raises InputError when it is not there."""
    found = epath.Path(BUNDLED.get(path) or hub.local_path(path))
    if not path or not found.exists():
        raise InputError(f"config.model.path: {path or '(empty)'}: no such folder; bundled: {', '.join(BUNDLED)}")
    return found


def transformer_folder(path: epath.Path) -> epath.Path:
    """The transformer of a pipeline folder, or the folder itself."""
    return path / "transformer" if (path / "transformer").exists() else path


def pipeline_folder(path: epath.Path) -> epath.Path:
    """Where the VAE and the text encoder lie: beside the transformer, or where an operated model's base is."""
    if (path / "vae").exists():
        return path
    file = path / "config.json"
    base = read_object(file).get("base_pipeline") if file.exists() else None
    if base is not None and not isinstance(base, str):
        raise InputError(f"{file}: base_pipeline: expected a folder, a bundled name or a repository, found {base!r}")
    if not base:
        raise InputError(f"{path}: expected a pipeline folder (transformer/, vae/, text_encoder/, tokenizer/)")
    return model_path(base)


def check_pipeline(path: str) -> WanConfig:
    """The transformer's config. Raises InputError where `load_pipeline` would, having read the weights' headers.

    Where the folders have hashes, all of the weights is read once for them.
    """
    folder = model_path(path)
    base = pipeline_folder(folder)
    parts = transformer_folder(folder), base / "vae", base / "text_encoder"
    for part in dict.fromkeys((folder, base, *parts)):
        check_hashes(part)
    config = read_config(transformer_folder(folder))
    read_vae_config(base / "vae")
    read_text_encoder_config(base / "text_encoder")
    for part in parts:
        check_tensors(part)
    Tokenizer(base / "tokenizer")
    return config


def check_size(config: WanConfig, frames: int, height: int, width: int) -> None:
    """Raises InputError for a video that patches do not divide or that is longer than RoPE's table on an axis."""
    grid = config.token_grid(latent_grid(frames, height, width))
    check_grid(grid, config.rope_max_seq_len)


def latent_grid(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(T, H, W) of a video's latents."""
    t, h, w = VAE_STRIDES
    return (frames - 1) // t + 1, height // h, width // w


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
        transformer.compute_on(mesh, exchange)
    return Pipeline(
        tokenizer=Tokenizer(base / "tokenizer"),
        text_encoder=load_text_encoder(base / "text_encoder"),
        transformer=transformer,
        vae=load_vae(base / "vae"),
    )


def initial_noise(seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> jax.Array:
    """Unit normal [B, *shape]; row b belongs to prompt number `numbers[b]` alone."""
    key = jax.random.key(seed)
    return jnp.stack([jax.random.normal(jax.random.fold_in(key, number), shape) for number in numbers])


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


@functools.partial(nnx.jit, static_argnames=("guidance", "batched"))
def sampling_step(transformer, text, blank, state: State, row, key, guidance: float, batched: bool):
    """The next state of a solver from `state` by a row of its schedule."""
    return solver_step(guided_velocity(transformer, text, blank, guidance, batched), state, row, key)


def guided_velocity(
    transformer: WanTransformer, text: jax.Array, blank: jax.Array | None, guidance: float, batched: bool
) -> Velocity:
    """The velocity (x, timesteps) of text [B, L, D] guided away from `blank` [1, L, D]; float32.

    `batched` runs both branches as one batch of 2 B, else one after the other. Without `blank` there is one branch.
    """
    if blank is None:
        return lambda x, timesteps: transformer(x, timesteps, text).astype(jnp.float32)
    blank = jnp.broadcast_to(blank, text.shape)

    def velocity(x, timesteps):
        if batched:
            both = transformer(jnp.tile(x, (2, 1, 1, 1, 1)), jnp.tile(timesteps, 2), jnp.concatenate([text, blank]))
            conditional, unconditional = jnp.split(both, 2)
        else:
            conditional, unconditional = (transformer(x, timesteps, words) for words in (text, blank))
        return guided(conditional.astype(jnp.float32), unconditional.astype(jnp.float32), guidance)

    return velocity


@nnx.jit
def _embed(text_encoder, token_ids, mask):
    return encode_prompts(text_encoder, token_ids, mask)


def batched(items: Sequence[Any], size: int) -> Iterator[tuple[int, Sequence[Any]]]:
    """(number of the first, batch) over `items`."""
    for start in range(0, len(items), size):
        yield start, items[start : start + size]
