"""Kinds that compute on all tokens of a head in raster order, whatever the order of the network is."""

import abc
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jsurgery.attention.kinds.base import AttentionSize, Kind, TokenPlace
from pallas_kernels.sharded import heads_for_tokens, own_heads, tokens_for_heads


class RasterKind(Kind):
    """A kind that permutes q, k, v and y inside its attention, and over a mesh exchanges sequence for heads."""

    @abc.abstractmethod
    def attend_in_raster_order(
        self, q: jax.Array, k: jax.Array, v: jax.Array, maps: Any, place: TokenPlace
    ) -> jax.Array:
        """The attention [B, N, H, D] of all tokens of some heads, in raster order on one device; `maps` are theirs."""

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, maps: Any, place: TokenPlace) -> jax.Array:
        order, maps_of_heads = place.order, self.learns == "feature_maps"

        def whole(q, k, v, maps):
            """Attention on a device that holds all tokens of its heads."""
            if order is not None:
                q, k, v = (x[:, order.inverse] for x in (q, k, v))
            y = self.attend_in_raster_order(q, k, v, maps, place)
            return y if order is None else y[:, order.permutation]

        if place.sharding is None:
            return whole(q, k, v, maps)
        mesh = place.sharding.mesh
        batch, axis, heads = (*place.sharding.spec, None, None, None)[:3]

        def local(q, k, v, maps):
            if axis is None or mesh.shape[axis] == 1:
                return whole(q, k, v, maps)
            q, k, v = (tokens_for_heads(x, axis) for x in (q, k, v))
            return heads_for_tokens(whole(q, k, v, own_heads(maps, axis) if maps_of_heads else maps), axis)

        tokens = P(batch, axis, heads)
        specs = {"in_specs": (tokens, tokens, tokens, P(heads if maps_of_heads else None)), "out_specs": tokens}
        return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(q, k, v, maps)

    def core_values(self, size: AttentionSize) -> int:
        """As of any kind, and the permutation of q, k, v and y, which are read and written once more."""
        return super().core_values(size) + 8 * size.tokens * size.heads * size.head_dim
