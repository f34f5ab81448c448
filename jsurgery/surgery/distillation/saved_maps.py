"""The files that distillation leaves for later stages: the feature maps and their errors."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jsurgery.attention.feature_maps import (
    KEY_MAP,
    PROJECTION,
    QUERY_MAP,
    FeatureMapConfig,
    LearnedMaps,
    Projection,
    build_feature_map,
    named_leaves,
)
from jsurgery.attention.kinds.candidates import learning
from jsurgery.attention.kinds.registry import check_rates, kind_of
from jsurgery.errors import InputError, shortened
from jsurgery.io.files import read_object
from jsurgery.io.safetensors import read_tensors, write_tensors
from jsurgery.rates import Rate

# The maps in a file, in the order of `LearnedMaps`, and which kinds learn them (`Kind.learns`).
SIDES = {QUERY_MAP: "feature_maps", KEY_MAP: "feature_maps", PROJECTION: "projection"}
INITIAL, TRAINED = "initial.safetensors", "feature_maps.safetensors"


def save_maps(path: epath.Path, maps: LearnedMaps, rates: Sequence[Rate], blocks: Sequence[int]) -> list[Any]:
    """Writes tensors named blocks.I.rate_R.phi_q.LEAF, one map for each rate and each of `blocks`.

    Returns the file's [size, sha256].
    """
    tensors, metadata = {}, {}
    for side, stacked in zip(SIDES, maps, strict=True):
        if stacked is None:
            continue
        learned = [rates[place] for place in learning(rates, SIDES[side])]
        for leaf_name, leaf in named_leaves(stacked).items():
            for of_block, block in zip(np.asarray(leaf), blocks, strict=True):
                for of_rate, rate in zip(of_block, learned, strict=True):
                    tensors[f"blocks.{block}.rate_{rate}.{side}.{leaf_name}"] = of_rate
    if (phi := maps.query) is not None:
        metadata = {"degree": str(phi.degree), "layers": str(len(phi.kernels)), "activation": phi.activation}
    return write_tensors(path, tensors, metadata=metadata)


def load_maps(path: epath.Path, plan: Sequence[Rate], config: FeatureMapConfig) -> LearnedMaps | None:
    """The maps of the blocks that `plan` converts, leaves [those with such a map, ...]; None if it converts none."""
    chosen = [(block, rate) for block, rate in enumerate(plan) if rate != 1]
    return _loaded(path, [[pair] for pair in chosen], config, lambda leaf: leaf[:, 0]) if chosen else None


def load_all_maps(path: epath.Path, rates: Sequence[Rate], blocks: int, config: FeatureMapConfig) -> LearnedMaps:
    """The maps of every block at every rate, leaves [blocks, rates with such a map, ...]."""
    return _loaded(path, [[(block, rate) for rate in rates] for block in range(blocks)], config, lambda leaf: leaf)


def _loaded(
    path: epath.Path,
    wanted: Sequence[Sequence[tuple[int, Rate]]],
    config: FeatureMapConfig,
    shaped: Callable[[np.ndarray], np.ndarray],
) -> LearnedMaps:
    """The maps of the (block, rate) in each row of `wanted`, stacked [rows, in a row, ...] and then `shaped`."""
    tensors = read_tensors(path)

    def stacked(side: str, leaf: str) -> jax.Array:
        rows = [[pair for pair in row if kind_of(pair[1]).learns == SIDES[side]] for row in wanted]
        names = [[f"blocks.{block}.rate_{rate}.{side}.{leaf}" for block, rate in row] for row in rows if row]
        if missing := [name for row in names for name in row if name not in tensors]:
            raise InputError(f"{path}: holds no {missing[0]}; was its rate distilled?")
        return jnp.asarray(shaped(np.stack([np.stack([tensors[name] for name in row]) for row in names])))

    learned = {kind_of(rate).learns for row in wanted for _, rate in row}
    maps = LearnedMaps(None, None)
    if "feature_maps" in learned:
        query, key = (build_feature_map(config, functools.partial(stacked, side)) for side in (QUERY_MAP, KEY_MAP))
        maps = LearnedMaps(query, key)
    if "projection" in learned:
        maps = maps._replace(projection=Projection(*(stacked(PROJECTION, leaf) for leaf in Projection._fields)))
    return maps


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
