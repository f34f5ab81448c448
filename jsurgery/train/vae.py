"""Trains a small Wan VAE on crops of sprite clips, and measures the mean and deviation of its latents."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

from jsurgery.data import sprites
from jsurgery.runtime.guard import keep_if_finite, likely_causes, non_finite
from jsurgery.runtime.loop import run_steps
from jsurgery.runtime.progress import say
from jsurgery.wan.checkpoint import save_vae
from jsurgery.wan.model_config import VaeConfig
from jsurgery.wan.vae import WanVae
from jsurgery.wan.vae_layers import ResidualBlock

STATISTICS_CLIPS = 48
INITIAL_LOG_VARIANCE = -6.0


def loss_fn(vae: WanVae, video_BxFxHxWx3: jax.Array, key: jax.Array, kl_weight: float) -> tuple[jax.Array, dict]:
    """Mean absolute error of a sampled reconstruction + kl_weight * mean KL divergence of a latent to a unit normal."""
    mean, logvar = vae.moments(video_BxFxHxWx3)
    logvar = jnp.clip(logvar, -30, 20)
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    error = jnp.mean(jnp.abs(vae.pixels(z) - video_BxFxHxWx3))
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
    return error + kl_weight * kl, {"error": error, "kl": kl}


def convolutions(params: Any) -> Any:
    """Tells Muon to treat a convolution as one matrix, from all inputs of the window to the outputs."""

    def of(path: tuple, leaf: jax.Array) -> MuonDimensionNumbers | None:
        if "kernel" in jax.tree_util.keystr(path):
            return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
        return None

    return jax.tree_util.tree_map_with_path(of, params)


def crops(config: ConfigDict, step: int) -> np.ndarray:
    """A batch [B, f, h, w, 3] of float32 crops; three in four contain a part of a sprite's path."""
    train, video = config.train, config.video
    f, h, w = train.vae_crop
    batch = []
    for item in range(train.vae_batch):
        rng = np.random.default_rng([config.seed, step, item])
        scene = sprites.sample_scene(rng, two_sprites=0.5)
        clip = sprites.render(scene, video.frames, video.height, video.width)
        t = rng.integers(video.frames - f + 1)
        top, left = rng.integers(video.height - h + 1), rng.integers(video.width - w + 1)
        if rng.random() < 0.75:
            sprite = scene.sprites[rng.integers(len(scene.sprites))]
            y, x = sprite.centers(video.frames, video.height, video.width)[t + f // 2] + rng.uniform(-0.5, 0.5, 2) * (
                h,
                w,
            )
            top = int(np.clip(y - h / 2, 0, video.height - h))
            left = int(np.clip(x - w / 2, 0, video.width - w))
        batch.append(clip[t : t + f, top : top + h, left : left + w])
    return sprites.to_float(np.stack(batch))


def train_vae(config: ConfigDict, workdir: epath.Path, folder: epath.Path) -> None:
    """Trains, or continues training, and writes a diffusers `vae/` folder."""
    train = config.train
    unit = dict(latents_mean=(0.0,) * train.z_dim, latents_std=(1.0,) * train.z_dim)
    sizes = VaeConfig(base_dim=train.vae_base_dim, z_dim=train.z_dim, num_res_blocks=train.vae_res_blocks, **unit)
    vae = nnx.jit(lambda: WanVae(sizes, rngs=nnx.Rngs(config.seed)))()
    # Residual branches start at zero: the narrow, deep network is then shallow at first and learns colours early.
    for _, module in nnx.iter_modules(vae):
        if isinstance(module, ResidualBlock):
            module.conv2.kernel[...] = jnp.zeros_like(module.conv2.kernel[...])
    # The posterior starts narrow: at unit variance, its noise would drown a mean that is not trained yet.
    vae.quant_conv.bias[...] = vae.quant_conv.bias[...].at[train.z_dim :].set(INITIAL_LOG_VARIANCE)
    graph, params = nnx.split(vae)
    schedule = optax.warmup_cosine_decay_schedule(0.0, train.vae_learning_rate, train.vae_steps // 20, train.vae_steps)
    spectral = muon(schedule, adam_b2=0.99, muon_weight_dimension_numbers=convolutions, consistent_rms=0.2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), spectral)

    @jax.jit
    def update(params, opt_state, video, key):
        objective = lambda params: loss_fn(nnx.merge(graph, params), video, key, train.vae_kl_weight)
        (loss, parts), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        values = {"loss": loss, **parts, "gradient_norm": optax.tree.norm(grads)}
        finite = jnp.isfinite(loss) & jnp.isfinite(values["gradient_norm"])
        new = optax.apply_updates(params, updates), new_opt_state
        return *keep_if_finite(finite, new, (params, opt_state)), values, non_finite(grads)

    def one_step(state: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, jax.Array], Any]:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        params, opt_state, parts, faults = update(state["params"], state["opt_state"], crops(config, step), key)
        return {"params": params, "opt_state": opt_state}, parts, faults

    def explain(step: int, values: dict[str, Any], faults: Any, state: dict[str, Any]) -> str:
        return likely_causes(values["loss"], step, [], state["params"], faults)

    state = run_steps(
        "vae", config, {"params": params, "opt_state": optimizer.init(params)}, one_step, steps=train.vae_steps,
        checkpoints=workdir / "vae", metrics=workdir / "vae_metrics",
        format_metrics=lambda parts: (parts, f"error {parts['error']:.4f}  kl {parts['kl']:.3f}"), likely_cause=explain,
    )  # fmt: skip
    vae = nnx.merge(graph, state["params"])
    mean, std = latent_statistics(vae, config)
    say(f"vae: latent std per channel {np.round(std, 2).tolist()}")
    measured = dataclasses.replace(vae.config, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))
    vae.config = measured
    save_vae(vae, folder)


def latent_statistics(vae: WanVae, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the posterior's mean, per channel [C], over whole clips."""
    moments = jax.jit(lambda vae, video: vae.moments(video)[0])
    video, latents = config.video, []
    for index in range(STATISTICS_CLIPS):
        scene = sprites.scene_at(config.seed + 1, index, two_sprites=config.data.two_sprites)
        clip = sprites.to_float(sprites.render(scene, video.frames, video.height, video.width))
        latents.append(np.asarray(moments(vae, clip[None])))
    stacked = np.concatenate(latents)
    return stacked.mean(axis=(0, 1, 2, 3)), stacked.std(axis=(0, 1, 2, 3))
