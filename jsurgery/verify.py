"""verify: a checkpoint against diffusers and transformers, one component after the other, on the user's machine.

torch and those libraries are imported here (and for `bench`), and nowhere else in the package but in `export`.
"""

import gc
import importlib
import importlib.metadata
import importlib.util
import json
import math
import pathlib
import platform
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from jsurgery.config import check_video
from jsurgery.data import sprites
from jsurgery.errors import InputError, ParityError
from jsurgery.runtime.progress import say
from jsurgery.runtime.stages import file_identity, write_json
from jsurgery.sample import sampling_config
from jsurgery.wan.pipeline import (
    check_pipeline,
    check_size,
    latent_grid,
    model_path,
    pipeline_folder,
    transformer_folder,
)
from jsurgery.wan.safetensors_files import open_tensors
from jsurgery.wan.text_encoder import encode_prompts, load_text_encoder
from jsurgery.wan.tokenizer import Tokenizer, clean_prompt
from jsurgery.wan.transformer import WanConfig, load_transformer
from jsurgery.wan.vae import load_vae
from jsurgery.wan.weights import transformer_layout

REFERENCE = ("torch", "diffusers", "accelerate", "transformers")
# Relative errors |ours - theirs| / |theirs| that float32 explains at any published size; of token ids, the share that
# differs.
BOUNDS = {"token ids": 0.0, "text embeddings": 1e-4, "VAE encode": 1e-4, "VAE decode": 1e-4, "velocity": 1e-4}
PROMPTS = (
    "a red circle moves left over a grey background",
    "Two cats &amp; a dog   box on a spotlighted stage,\ncinematic, 4k",
    "一只猫在雨中奔跑",
)
TIMESTEPS = (999.0, 750.0, 500.0, 250.0, 20.0)


def verify(model: str, frames: int, height: int, width: int, report: str | None = None) -> None:
    """Compares text embeddings, the VAE's two ways and velocities of a video size; prints the result as JSON.

    With `report` that JSON is also a file. A hybrid's velocities are compared with `jsurgery.export.torch_model`.
    One component is in memory at a time, ours or the reference's, in float32; ours runs where JAX runs, the reference
    on the CPU. Raises InputError where a library or a weight file is missing, and at the end ParityError where an error
    is over its bound.
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
    latent_shape = *latent_grid(frames, height, width), network.in_channels
    found = {
        "model": folder.name if epath.Path(model).exists() else model,
        "hybrid": network.hybrid is not None,
        "video": {"frames": frames, "height": height, "width": width},
        "text_length": length,
        "weights": {name: file_identity(path) for name, path in parts.items()},
        "versions": versions(("jsurgery", "jax", "jaxlib", "flax", *REFERENCE)),
        "devices": {"jsurgery": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "reference": "cpu"},
        "system": f"Python {platform.python_version()}, {platform.platform()}",
    }

    with jax.default_matmul_precision("highest"):
        errors, text = text_errors(base, length)
        errors |= vae_errors(base / "vae", frames, height, width)
        errors |= velocity_errors(parts["transformer"], network, latent_shape, text[:1])

    checks = [
        {
            "check": name,
            "error": error if math.isfinite(error) else None,  # JSON has no word for the others
            "bound": bound,
            "passed": error <= bound,
        }
        for name, error in errors.items()
        for bound in [BOUNDS[name.partition(" at ")[0]]]
    ]
    breached = [check for check in checks if not check["passed"]]
    publish(found | {"checks": checks, "passed": not breached}, report)
    if breached:
        listed = ", ".join(f"{check['check']} {check['error']} (bound {check['bound']})" for check in breached)
        raise ParityError(f"{model}: {len(breached)} of {len(checks)} checks are over their bound: {listed}")


def text_errors(base: epath.Path, length: int) -> tuple[dict[str, float], np.ndarray]:
    """Errors of the tokenizer and the text encoder in a pipeline folder; the reference's embeddings [P, L, D]."""
    say("verify: text encoder")
    token_ids, mask = Tokenizer(base / "tokenizer")(PROMPTS, length)
    embed: Any = nnx.jit(encode_prompts)
    ours = np.asarray(embed(load_text_encoder(base / "text_encoder"), token_ids, mask))
    gc.collect()

    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base / "tokenizer")
    cleaned = [clean_prompt(prompt) for prompt in PROMPTS]
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "np"}
    expected_ids = tokenizer(cleaned, **options)["input_ids"]
    encoder = transformers.UMT5EncoderModel.from_pretrained(base / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = encoder(torch.tensor(token_ids), torch.tensor(mask)).last_hidden_state.numpy() * mask[:, :, None]
    differing = float(np.mean(token_ids != expected_ids))
    return {"token ids": differing, "text embeddings": relative_error(ours, theirs)}, theirs


def vae_errors(folder: epath.Path, frames: int, height: int, width: int) -> dict[str, float]:
    """Errors of encoding one clip of sprites and of decoding what came of it."""
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
    """Errors of velocities at several timesteps, for latents of `latent_shape` = (T, H, W, C)."""
    say("verify: transformer")
    noise = np.random.default_rng(0).normal(size=(1, *latent_shape)).astype(np.float32)
    inputs = [(noise, np.array([timestep], np.float32), text_1xLxD) for timestep in TIMESTEPS]
    model, run = load_transformer(folder), nnx.jit(lambda model, *inputs: model(*inputs))
    ours = [np.asarray(run(model, *each)) for each in inputs]
    del model
    gc.collect()

    module = reference_transformer(folder, network)
    errors = {}
    for timestep, each, velocity in zip(TIMESTEPS, inputs, ours, strict=True):
        errors[f"velocity at {timestep:g}"] = relative_error(velocity, reference_velocity(module, *each))
    return errors


def need_reference() -> None:
    """Raises InputError where a library to compare with is missing; silences those that are there."""
    absent = [name for name in REFERENCE if importlib.util.find_spec(name) is None]
    if absent:
        names = ", ".join(absent)
        raise InputError(f"{names}: not installed, and needed to compare with: `pip install 'jsurgery[verify]'`")
    for library in ("diffusers", "transformers"):
        logging = importlib.import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def reference_transformer(folder: epath.Path, network: WanConfig, dtype: str = "float32") -> Any:
    """diffusers' transformer of a folder on the CPU; for a hybrid, which diffusers has not, our torch module."""
    import torch

    if transformer_layout(open_tensors(folder), folder) != "diffusers":
        raise InputError(f"{folder}: diffusers reads its own layout only; `jsurgery convert` writes it")
    if network.hybrid:
        return importlib.import_module("jsurgery.export.torch_model").load(folder, getattr(torch, dtype))
    diffusers: Any = importlib.import_module("diffusers")
    return diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).eval()


def reference_velocity(module: Any, latents: np.ndarray, timesteps: np.ndarray, text: np.ndarray) -> np.ndarray:
    """The velocity [B, T, H, W, C] of a torch module, for inputs as ours takes them."""
    import torch

    with torch.no_grad():
        inputs = channels_first(latents), torch.tensor(timesteps), torch.tensor(text)
        hidden, timestep, states = (x.to(module.dtype) if i != 1 else x for i, x in enumerate(inputs))
        return channels_last(module(hidden, timestep, states, return_dict=False)[0])


def channels_first(x_BxTxHxWxC: np.ndarray) -> Any:
    import torch

    return torch.tensor(x_BxTxHxWxC).permute(0, 4, 1, 2, 3)


def channels_last(x_BxCxTxHxW: Any) -> np.ndarray:
    return x_BxCxTxHxW.permute(0, 2, 3, 4, 1).float().numpy()


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|, Euclidean norms in float64; infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return math.inf
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def check_report(path: str | None) -> None:
    """Raises InputError where `--json=path` could not be written at the end."""
    if path is not None and (pathlib.Path(path).is_dir() or not pathlib.Path(path).resolve().parent.is_dir()):
        raise InputError(f"--json={path}: expected a file in a folder that exists")


def publish(result: dict[str, Any], path: str | None) -> None:
    """The result as JSON to standard output, and to a file if one is named."""
    print(json.dumps(result, indent=2), flush=True)
    if path is not None:
        write_json(epath.Path(path), result)
