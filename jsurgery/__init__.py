"""Attention surgery: turns a trained video diffusion transformer into a hybrid of softmax and linear attention.

The names below are the public API. They are imported when first used: `import jsurgery` alone loads nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jsurgery.version import __version__ as __version__

if TYPE_CHECKING:
    from jsurgery.surgery.knapsack import solve_block_rates
    from jsurgery.surgery.operate import operate
    from jsurgery.wan.checkpoint import load_text_encoder, load_transformer, load_vae, save_transformer
    from jsurgery.wan.pipeline import load_pipeline

__all__ = [
    "load_pipeline",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "operate",
    "save_transformer",
    "solve_block_rates",
]

_MODULES = {
    "load_pipeline": "wan.pipeline",
    "load_text_encoder": "wan.checkpoint",
    "load_transformer": "wan.checkpoint",
    "load_vae": "wan.checkpoint",
    "operate": "surgery.operate",
    "save_transformer": "wan.checkpoint",
    "solve_block_rates": "surgery.knapsack",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jsurgery' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jsurgery.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
