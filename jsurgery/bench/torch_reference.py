"""The reference to compare with: diffusers' Wan transformer, or for a hybrid our own torch module."""

import importlib
import importlib.util
from typing import Any

import numpy as np
from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.safetensors import open_tensors
from jsurgery.wan.checkpoint_layouts import transformer_layout
from jsurgery.wan.model_config import WanConfig

REFERENCE = ("torch", "diffusers", "accelerate", "transformers")


def need_reference() -> None:
    """Raises InputError where a library of the reference is missing; else silences their logs and progress bars."""
    absent = [name for name in REFERENCE if importlib.util.find_spec(name) is None]
    if absent:
        names = ", ".join(absent)
        raise InputError(f"{names}: not installed, and needed to compare with: `pip install 'jsurgery[verify]'`")
    for library in ("diffusers", "transformers"):
        logging = importlib.import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def reference_transformer(folder: epath.Path, network: WanConfig, dtype: str = "float32") -> Any:
    """The transformer of a folder, in torch on the CPU: diffusers' model, for a hybrid `jsurgery.export.torch_model`.

    Raises InputError where the folder is not in the diffusers layout.
    """
    import torch

    if transformer_layout(open_tensors(folder), folder) != "diffusers":
        raise InputError(f"{folder}: diffusers reads its own layout only; `jsurgery convert` writes it")
    if network.hybrid:
        return importlib.import_module("jsurgery.export.torch_model").load(folder, getattr(torch, dtype))
    diffusers: Any = importlib.import_module("diffusers")
    return diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).eval()


def reference_velocity(module: Any, latents: np.ndarray, timesteps: np.ndarray, text: np.ndarray) -> np.ndarray:
    """The velocity [B, T, H, W, C], float32, of a torch module for latents [B, T, H, W, C], timesteps [B] and text
    embeddings [B, L, text_dim]. Timesteps stay float32 whatever the module's dtype."""
    import torch

    with torch.no_grad():
        hidden, states = channels_first(latents).to(module.dtype), torch.tensor(text).to(module.dtype)
        return channels_last(module(hidden, torch.tensor(timesteps), states, return_dict=False)[0])


def channels_first(x_BxTxHxWxC: np.ndarray) -> Any:
    import torch

    return torch.tensor(x_BxTxHxWxC).permute(0, 4, 1, 2, 3)


def channels_last(x_BxCxTxHxW: Any) -> np.ndarray:
    return x_BxCxTxHxW.permute(0, 2, 3, 4, 1).float().numpy()
