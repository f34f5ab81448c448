"""verify: a checkpoint through jsurgery and through diffusers and transformers, component by component.

Only `verify`, `bench` and `export` import torch, diffusers and transformers.
"""

import gc
import importlib
import importlib.metadata
import importlib.util
import math
import platform
from typing import Any

import jax
import numpy as np
from etils import epath

from jsurgery.bench.torch_reference import (
    REFERENCE,
    channels_first,
    channels_last,
    need_reference,
    reference_transformer,
    reference_velocity,
)
from jsurgery.config import check_video
from jsurgery.data import sprites
from jsurgery.errors import ParityError
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.io.results import check_report, publish, relative_error, versions
from jsurgery.runtime.progress import say
from jsurgery.sample import sampling_config
from jsurgery.wan.checkpoint import load_transformer, load_vae, open_text_encoder
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_folder import check_pipeline, model_path, pipeline_folder, transformer_folder
from jsurgery.wan.models import takes_image
from jsurgery.wan.prompt_embedder import PromptEmbedder
from jsurgery.wan.tokenizer import clean_prompt
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.video_size import check_size, latent_grid

# Largest relative error |ours - theirs| / |theirs| that float32 rounding explains at any published size. For token ids:
# the share of ids that differ.
BOUNDS = {"token ids": 0.0, "text embeddings": 1e-4, "VAE encode": 1e-4, "VAE decode": 1e-4, "velocity": 1e-4}
PROMPTS = (
    "a red circle moves left over a grey background",
    "Two cats &amp; a dog   box on a spotlighted stage,\ncinematic, 4k",
    "一只猫在雨中奔跑",
)
TIMESTEPS = (999.0, 750.0, 500.0, 250.0, 20.0)


def verify(model: str, frames: int, height: int, width: int, report: str | None = None) -> None:
    """Compares text embeddings, VAE encoding and decoding, and velocities at one video size; prints the result as JSON.

    `report` names a file for the same JSON. Velocities of a hybrid are compared with `jsurgery.export.torch_model`. All
    components are float32, and only one of them, ours or the reference's, is in memory at a time. Ours runs on JAX's
    default device, but its text encoder on the CPU; the reference runs on the CPU. Raises InputError where a library or
    a weight file is missing, and ParityError, after printing, where an error is over its bound.
    """
    check_report(report)
    need_reference()
    check_video(frames, height, width, prefix="--")
    network = check_pipeline(model)
    check_size(network, frames, height, width)
    length = sampling_config(None, {"model.path": model}).text_length
    folder = model_path(model)
    base = pipeline_folder(folder)
    parts = {"transformer": transformer_folder(folder)}
    parts |= {name: base / name for name in ("text_encoder", "tokenizer", "vae")}
    latent_shape = *latent_grid(frames, height, width, network.strides), network.in_channels
    result = {
        "model": folder.name if epath.Path(model).exists() else model,
        "hybrid": network.hybrid is not None,
        "video": {"frames": frames, "height": height, "width": width},
        "text_length": length,
        "weights": {name: folder_fingerprint(path) for name, path in parts.items()},
        "versions": versions(("jsurgery", "jax", "jaxlib", "flax", *REFERENCE)),
        "devices": {
            "jsurgery": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "text encoder": "cpu",
            "reference": "cpu",
        },
        "system": f"Python {platform.python_version()}, {platform.platform()}",
    }

    with jax.default_matmul_precision("highest"):
        errors, text = text_errors(base, length)
        errors |= vae_errors(base / "vae", frames, height, width)
        errors |= velocity_errors(parts["transformer"], network, latent_shape, text[:1])

    checks = [
        {
            "check": name,
            "error": error if math.isfinite(error) else None,  # JSON has no NaN and no infinity
            "bound": bound,
            "passed": error <= bound,
        }
        for name, error in errors.items()
        for bound in [BOUNDS[name.partition(" at ")[0]]]
    ]
    breached = [check for check in checks if not check["passed"]]
    publish(result | {"checks": checks, "passed": not breached}, report)
    if breached:
        listed = ", ".join(f"{check['check']} {check['error']} (bound {check['bound']})" for check in breached)
        raise ParityError(f"{model}: {len(breached)} of {len(checks)} checks are over their bound: {listed}")


def text_errors(base: epath.Path, length: int) -> tuple[dict[str, float], np.ndarray]:
    """Errors of the tokenizer and of the text encoder, and the reference's embeddings [P, L, D]."""
    say("verify: text encoder, on the CPU, a layer at a time")
    embedder = PromptEmbedder(base)
    token_ids, mask = embedder.tokenizer(PROMPTS, length)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        ours = embedder(PROMPTS, length)

    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base / "tokenizer")
    cleaned = [clean_prompt(prompt) for prompt in PROMPTS]
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "np"}
    expected_ids = tokenizer(cleaned, **options)["input_ids"]
    theirs = reference_embeddings(base / "text_encoder", token_ids, mask) * mask[:, :, None]
    differing = float(np.mean(token_ids != expected_ids))
    return {"token ids": differing, "text embeddings": relative_error(ours, theirs)}, theirs


def reference_embeddings(folder: epath.Path, token_ids_BxL: np.ndarray, mask_BxL: np.ndarray) -> np.ndarray:
    """The embeddings [B, L, D] of transformers' encoder in float32, with one of its layers in memory at a time.

    All of UMT5-XXL takes 22.7 GB in float32.
    """
    import torch
    import transformers

    config, tensors = open_text_encoder(folder)

    def load(module: Any, prefix: str) -> None:
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        module.load_state_dict({name: torch.from_numpy(np.array(tensor, np.float32)) for name, tensor in own.items()})

    settings = transformers.UMT5Config.from_pretrained(folder, num_layers=1, vocab_size=1)
    stack: Any = transformers.UMT5EncoderModel(settings).eval().encoder
    norm, stack.final_layer_norm = stack.final_layer_norm, torch.nn.Identity()
    load(norm, "encoder.final_layer_norm.")
    hidden = torch.from_numpy(np.asarray(tensors["shared.weight"])[token_ids_BxL].astype(np.float32))
    with torch.no_grad():
        for number in range(config.num_layers):
            load(stack.block[0], f"encoder.block.{number}.")
            hidden = stack(inputs_embeds=hidden, attention_mask=torch.tensor(mask_BxL)).last_hidden_state
        return norm(hidden).numpy()


def vae_errors(folder: epath.Path, frames: int, height: int, width: int) -> dict[str, float]:
    """Errors of encoding one sprites video and of decoding its latents. Both sides decode our latents."""
    say("verify: VAE")
    video = sprites.to_float(sprites.render(sprites.scene_at(0, 0), frames, height, width))[None]
    vae = load_vae(folder)
    latents = vae.encode_in_chunks(video)
    decoded = vae.decode_in_chunks(latents)
    del vae
    gc.collect()

    import torch

    diffusers: Any = importlib.import_module("diffusers")
    reference = diffusers.AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).eval()
    mean, std = (np.array(reference.config[name], np.float32) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        z = channels_last(reference.encode(channels_first(video)).latent_dist.mode())
        expected = channels_last(reference.decode(channels_first(latents * std + mean)).sample.clamp(-1, 1))
    return {
        "VAE encode": relative_error(latents, (z - mean) / std),
        "VAE decode": relative_error(decoded, expected),
    }


def velocity_errors(
    folder: epath.Path, network: WanConfig, latent_shape: tuple[int, ...], text_1xLxD: np.ndarray
) -> dict[str, float]:
    """Errors of the velocity at each of `TIMESTEPS`, for noise of `latent_shape` = (T, H, W, C)."""
    say("verify: transformer")
    noise = np.random.default_rng(0).normal(size=(1, *latent_shape)).astype(np.float32)
    inputs = [(noise, np.array([timestep], np.float32), text_1xLxD) for timestep in TIMESTEPS]
    model, run = load_transformer(folder), jax.jit(WanTransformer.__call__, static_argnums=4)
    ours = [np.asarray(run(model, *each)) for each in inputs]
    of_image = np.asarray(run(model, *inputs[0], 1)) if takes_image(network.in_channels) else None
    del model
    gc.collect()

    module = reference_transformer(folder, network)
    errors = {}
    for timestep, each, velocity in zip(TIMESTEPS, inputs, ours, strict=True):
        errors[f"velocity at {timestep:g}"] = relative_error(velocity, reference_velocity(module, *each))
    if of_image is not None:
        frames, height, width = network.token_grid(latent_shape[:3])
        per_token = np.where(np.arange(frames * height * width)[None] < height * width, 0, inputs[0][1][:, None])
        expected = reference_velocity(module, noise, per_token.astype(np.float32), text_1xLxD)
        errors[f"velocity at {TIMESTEPS[0]:g} after a given frame"] = relative_error(of_image, expected)
    return errors
