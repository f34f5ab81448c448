"""The maps of several candidate kinds of each block: what one of them has learned, and all of them together."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsurgery.attention.feature_maps import LearnedMaps, Projection
from jsurgery.attention.kinds.registry import kind_of
from jsurgery.rates import Rate


def learning(rates: Sequence[Rate], what: str) -> list[int]:
    """The places of the kinds among `rates` that learn "feature_maps" or a "projection"."""
    return [place for place, rate in enumerate(rates) if kind_of(rate).learns == what]


def maps_of(maps: LearnedMaps, rates: Sequence[Rate], place: int, axis: int = 0) -> Any:
    """What the kind `rates[place]` has learned: a pair of feature maps, or a projection. Kinds are on this axis."""
    what = kind_of(rates[place]).learns
    index = (*[slice(None)] * axis, learning(rates, what).index(place))
    return jax.tree.map(lambda leaf: leaf[index], maps.projection if what == "projection" else maps.pair)


def together(of_kinds: Sequence[Any], rates: Sequence[Rate]) -> LearnedMaps:
    """The inverse of `maps_of`, from what each of the kinds `rates` has."""
    stack = lambda *leaves: jnp.stack(leaves)
    found = {
        what: jax.tree.map(stack, *(of_kinds[place] for place in places))
        for what in ("feature_maps", "projection")
        if (places := learning(rates, what))
    }
    query, key = found.get("feature_maps", (None, None))
    return LearnedMaps(query, key, found.get("projection"))


def of_every_block(maps: Any, blocks: Sequence[int], num_blocks: int) -> Any:
    """Maps of all blocks, from those of `blocks`. The others get those of another block, and do not read them: a scan
    needs some for each."""
    slots = np.searchsorted(blocks, np.arange(num_blocks)).clip(max=len(blocks) - 1)
    return jax.tree.map(lambda leaf: leaf[slots], maps)


def for_every_head(maps: LearnedMaps, heads: int) -> LearnedMaps:
    """The same maps, with a copy of the projections for each head, [blocks, kinds, heads, ...], as feature maps are."""
    if maps.projection is None:
        return maps
    copies = lambda leaf: jnp.broadcast_to(leaf[:, :, None], (*leaf.shape[:2], heads, *leaf.shape[2:]))
    return maps._replace(projection=jax.tree.map(copies, maps.projection))


def for_all_heads(gradients: LearnedMaps) -> LearnedMaps:
    """The gradients of maps from those of `for_every_head`: sums over the copies."""
    if gradients.projection is None:
        return gradients
    return gradients._replace(projection=Projection(*(leaf.sum(axis=2) for leaf in gradients.projection)))
