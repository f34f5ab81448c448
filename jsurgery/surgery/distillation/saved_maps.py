"""The files that distillation leaves for later stages: the feature maps and their errors."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jsurgery.attention.feature_maps import (
    KEY_MAP,
    QUERY_MAP,
    FeatureMapConfig,
    FeatureMapPair,
    build_feature_map,
    named_leaves,
)
from jsurgery.attention.kinds.registry import check_rates
from jsurgery.errors import InputError, shortened
from jsurgery.io.files import read_object
from jsurgery.io.safetensors import read_tensors, write_tensors
from jsurgery.rates import Rate

INITIAL, TRAINED = "initial.safetensors", "feature_maps.safetensors"


def save_maps(path: epath.Path, maps: FeatureMapPair, rates: Sequence[Rate], blocks: Sequence[int]) -> list[Any]:
    """Writes tensors named blocks.I.rate_R.phi_q.LEAF, one map for each rate and each of `blocks`.

    Returns the file's [size, sha256].
    """
    tensors = {}
    for side, stacked in zip((QUERY_MAP, KEY_MAP), maps, strict=True):
        for leaf_name, leaf in named_leaves(stacked).items():
            array = np.asarray(leaf)
            for of_block, block in zip(array, blocks, strict=True):
                for of_rate, rate in zip(of_block, rates, strict=True):
                    tensors[f"blocks.{block}.rate_{rate}.{side}.{leaf_name}"] = of_rate
    phi = maps[0]
    return write_tensors(
        path,
        tensors,
        metadata={"degree": str(phi.degree), "layers": str(len(phi.kernels)), "activation": phi.activation},
    )


def load_maps(path: epath.Path, plan: Sequence[Rate], config: FeatureMapConfig) -> FeatureMapPair | None:
    """The maps of the blocks that `plan` converts, leaves [converted, heads, ...]; None if it converts none."""
    tensors = read_tensors(path)
    chosen = [(block, rate) for block, rate in enumerate(plan) if rate != 1]
    if not chosen:
        return None

    def stacked(side: str, leaf: str) -> jax.Array:
        names = [f"blocks.{block}.rate_{rate}.{side}.{leaf}" for block, rate in chosen]
        if missing := [name for name in names if name not in tensors]:
            raise InputError(f"{path}: holds no {missing[0]}; was its rate distilled?")
        return jnp.asarray(np.stack([tensors[name] for name in names]))

    query_maps, key_maps = (
        build_feature_map(config, functools.partial(stacked, side)) for side in (QUERY_MAP, KEY_MAP)
    )
    return query_maps, key_maps


def read_errors(folder: epath.Path) -> dict[str, Any]:
    """The content of errors.json. Raises InputError for a file that is missing or damaged."""
    path = folder / "errors.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; run `jsurgery distill` first")
    content = read_object(path, "the errors of `jsurgery distill`")
    rates, rows, blocks = content.get("rates"), content.get("errors"), content.get("blocks", [])
    if not isinstance(rates, list):
        raise InputError(f"{path}: rates: expected those distilled, found {shortened(rates)}")
    check_rates(f"{path}: rates", rates)
    if not isinstance(rows, list):
        raise InputError(f"{path}: errors: expected a row for each block, found {shortened(rows)}")
    if not isinstance(blocks, list) or not all(type(block) is int and block >= 0 for block in blocks):
        raise InputError(f"{path}: blocks: expected their numbers, found {shortened(blocks)}")
    return content
