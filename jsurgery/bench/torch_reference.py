"""diffusers' and transformers' models, to compare with."""

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
