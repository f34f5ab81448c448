"""Hybrid attention of tokens that are spread over a mesh, with batch, sequence and heads on different axes.

A device holds a piece of the sequence: its queries, keys and values. There are two ways to reach the other pieces:
"gather" brings the softmax keys of all pieces, N / R, to every device, and sums the state of the linear branch over
the devices. "all_to_all" exchanges sequence for heads, so that a device holds every token of some of the heads. It
moves less data if the sequence has more than 2 R pieces.
"""

from collections.abc import Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.api import attend_with_state, hybrid_attention, linear_state
from pallas_kernels.feature_map import FeatureMap

EXCHANGES = ("gather", "all_to_all")


def sharded_self_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap | None,
    key_map: FeatureMap | None,
    *,
    sharding: NamedSharding,
    num_softmax: int,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
    exchange: str = "gather",
) -> jax.Array:
    """`hybrid_attention` of tokens [B, N, H, D] over a mesh; each piece of the sequence is in its own prefix order.

    Args:
        query_map: phi_q; None, together with `key_map`, for softmax attention to the softmax keys alone.
        sharding: of q, k and v: mesh axes of the batch, a mesh axis of the tokens or None, mesh axes of the heads.
        num_softmax: the number of tokens of each piece that keep softmax, the first ones.
        key_valid: bool [N], False at padding. Unless num_softmax is 0, some piece must have a valid softmax key.
        exchange: "gather" or "all_to_all". The latter needs a number of pieces that divides a device's heads.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, found {exchange!r}")
    batch, axis, heads = (*sharding.spec, None, None, None)[:3]
    tokens = P(batch, axis, heads)
    if axis is None or sharding.mesh.shape[axis] == 1:
        local = partial(_whole, num_softmax=num_softmax, stabilizer=stabilizer)
    else:
        local = {"gather": _by_gathering, "all_to_all": _by_heads}[exchange]
        local = partial(local, axis=axis, num_softmax=num_softmax, stabilizer=stabilizer)
    specs = (tokens, tokens, tokens, P(heads), P(heads), P(axis))
    attention = jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=tokens, check_vma=False)
    return attention(q, k, v, query_map, key_map, key_valid)


def sharded_cross_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, sharding: NamedSharding) -> jax.Array:
    """Softmax attention of tokens [B, N, H, D], split by `sharding`, to keys [B, M, H, D], each device having all M."""
    batch, axis, heads = (*sharding.spec, None, None, None)[:3]
    tokens, keys = P(batch, axis, heads), P(batch, None, heads)

    def local(q, k, v):
        return hybrid_attention(q, k, v, None, None, num_softmax=k.shape[1])

    specs = (tokens, keys, keys)
    attention = jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=tokens, check_vma=False)
    return attention(q, k, v)


def tokens_for_heads(x: jax.Array, axis: Hashable) -> jax.Array:
    """From a piece of the sequence [B, N, H, ...] to all tokens of some heads, piece after piece."""
    return lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)


def heads_for_tokens(x: jax.Array, axis: Hashable) -> jax.Array:
    """The inverse of `tokens_for_heads`."""
    return lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)


def own_heads(tree: Any, axis: Hashable) -> Any:
    """The heads, on the first axis of every leaf, whose tokens `tokens_for_heads` gives this device."""

    def own(leaf: jax.Array) -> jax.Array:
        count = leaf.shape[0] // lax.axis_size(axis)
        return lax.dynamic_slice_in_dim(leaf, lax.axis_index(axis) * count, count)

    return jax.tree.map(own, tree)


def _whole(q, k, v, query_map, key_map, valid, *, num_softmax, stabilizer):
    """Attention on a device that holds all keys, in prefix order."""
    valid = None if valid is None else jnp.broadcast_to(valid, k.shape[:2])
    if key_map is None:
        k, v, valid = jax.tree.map(lambda x: x[:, :num_softmax], (k, v, valid))
    options = {"num_softmax": num_softmax, "key_valid": valid, "stabilizer": stabilizer}
    return hybrid_attention(q, k, v, query_map, key_map, **options)


def _by_gathering(q, k, v, query_map, key_map, valid, *, axis, num_softmax, stabilizer):
    """A device's part of the exchange "gather"."""
    valid = None if valid is None else jnp.broadcast_to(valid, k.shape[:2])
    gather = lambda x: lax.all_gather(x[:, :num_softmax], axis, axis=1, tiled=True)
    k_S, v_S, valid_S = jax.tree.map(gather, (k, v, valid))
    if key_map is None:
        return hybrid_attention(q, k_S, v_S, None, None, num_softmax=k_S.shape[1], key_valid=valid_S)
    k_L, v_L, valid_L = jax.tree.map(lambda x: x[:, num_softmax:], (k, v, valid))
    state = lax.psum(linear_state(k_L, v_L, key_map, key_valid=valid_L), axis)
    return attend_with_state(q, k_S, v_S, query_map, state, key_valid=valid_S, stabilizer=stabilizer)


def _by_heads(q, k, v, query_map, key_map, valid, *, axis, num_softmax, stabilizer):
    """A device's part of the exchange "all_to_all"."""
    pieces, length = lax.axis_size(axis), k.shape[1]
    q, k, v = (tokens_for_heads(x, axis) for x in (q, k, v))

    def softmax_first(x):
        """x [B, pieces * length, ...], which is piece after piece, with the softmax tokens of all pieces in front."""
        by_piece = x.reshape(x.shape[0], pieces, length, *x.shape[2:])
        parts = by_piece[:, :, :num_softmax], by_piece[:, :, num_softmax:]
        return jnp.concatenate([part.reshape(x.shape[0], -1, *x.shape[2:]) for part in parts], axis=1)

    if valid is not None:
        valid = softmax_first(lax.all_gather(valid, axis, tiled=True)[None])[0]
    query_map, key_map = own_heads((query_map, key_map), axis)
    options = {"num_softmax": pieces * num_softmax, "stabilizer": stabilizer}
    y = _whole(q, softmax_first(k), softmax_first(v), query_map, key_map, valid, **options)
    return heads_for_tokens(y, axis)
