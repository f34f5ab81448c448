"""Hybrid attention in chunks of tokens, for any backend: differentiable, with neither N x N scores nor all features
in memory.

Each branch has its own backward pass, which keeps inputs, outputs and log-sum-exps and recomputes the rest.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chunk_windows import Kernels, attend_to_chunks
from pallas_kernels.feature_map import FeatureMap
from pallas_kernels.reference import EPSILON, Zones
from pallas_kernels.xla_error import errors_and_mass
from pallas_kernels.xla_linear import read_out, summarize
from pallas_kernels.xla_loops import MASK, TOKENS, over
from pallas_kernels.xla_softmax import num_scores, softmax, zones_head
from pallas_kernels.xla_sparse import add_linear, block_sparse_softmax


def hybrid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap | None,
    key_map: FeatureMap | None,
    *,
    num_softmax: int,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
) -> jax.Array:
    """Eq. 5 of Attention Surgery; see `pallas_kernels.hybrid_attention`."""
    k_S, v_S, valid_S = jax.tree.map(lambda x: x[:, :num_softmax], (k, v, key_valid))
    k_L, v_L, valid_L = jax.tree.map(lambda x: x[:, num_softmax:], (k, v, key_valid))
    state = None
    if num_softmax < k.shape[1]:
        assert key_map is not None
        state = linear_state(k_L, v_L, key_map, key_valid=valid_L)
    return attend_with_state(q, k_S, v_S, query_map, state, key_valid=valid_S, stabilizer=stabilizer)


def linear_state(
    k: jax.Array,
    v: jax.Array,
    key_map: FeatureMap,
    *,
    start: int = 0,
    key_valid: jax.Array | None = None,
    token_gradients: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """S [B, H, F, D] and z [B, H, F]; see `pallas_kernels.linear_state`."""
    k, v, key_valid = jax.tree.map(lambda x: x[:, start:], (k, v, key_valid))
    if not token_gradients:
        k, v = lax.stop_gradient((k, v))
    return summarize(k, v, key_map, jnp.ones(k.shape[:2], bool) if key_valid is None else key_valid)


def attend_with_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap | None,
    state: tuple[jax.Array, jax.Array] | None,
    *,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
) -> jax.Array:
    """See `pallas_kernels.attend_with_state`. `query_map` and `state` are None if there are no linear keys."""
    if state is None:
        y_BxHxNxD = softmax(q, k, v, key_valid, False)[0]
    else:
        assert query_map is not None
        o_L_BxHxNxD, n_L_BxHxN = read_out(q, query_map, *state)
        if k.shape[1] == 0:
            y_BxHxNxD = o_L_BxHxNxD / (n_L_BxHxN + EPSILON)[..., None]
        else:
            y_S_BxHxNxD, n_S_BxHxN = softmax(q, k, v, key_valid, stabilizer == "max")
            numerator_BxHxNxD = n_S_BxHxN[..., None] * y_S_BxHxNxD + o_L_BxHxNxD
            y_BxHxNxD = numerator_BxHxNxD / (n_S_BxHxN + n_L_BxHxN)[..., None]
    return y_BxHxNxD.swapaxes(1, 2).astype(v.dtype)


def softmax_zones(
    q: jax.Array, k: jax.Array, v: jax.Array, bounds: Sequence[int], *, key_valid: jax.Array | None = None
) -> Zones:
    """See `pallas_kernels.softmax_zones`. The scores of a chunk of queries are computed once, for all prefixes."""
    k, v, key_valid = jax.tree.map(lambda x: x[:, : bounds[-1]], (k, v, key_valid))
    head = partial(zones_head, bounds=tuple(bounds))
    axes = TOKENS, TOKENS, TOKENS, MASK
    y_BxHxNxZxD, lse_BxHxNxZ, top_BxHxNxZ = over(head, axes, q, k, v, key_valid, numbers=num_scores(q, k))
    statistics = (x.transpose(3, 0, 2, 1) for x in (lse_BxHxNxZ, top_BxHxNxZ))
    return y_BxHxNxZxD.transpose(3, 0, 2, 1, 4), *statistics


def hybrid_error(
    q: jax.Array,
    query_map: FeatureMap,
    state: tuple[jax.Array, jax.Array],
    softmax: tuple[jax.Array, jax.Array] | None,
    target: jax.Array,
    *,
    query_valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.hybrid_error`."""
    errors_H, n_L_HxNxB = errors_and_mass(query_map, state, q, softmax, target, query_valid)
    return errors_H, n_L_HxNxB.transpose(2, 1, 0)


def chunked_attention(*arguments: Any, **options: Any) -> jax.Array:
    """See `pallas_kernels.chunked_attention`."""
    return attend_to_chunks(Kernels(hybrid_attention, linear_state, attend_with_state), *arguments, **options)


def sparse_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    projection: tuple[jax.Array, jax.Array],
    lists: jax.Array,
    *,
    block_q: int,
    block_k: int,
) -> jax.Array:
    """See `pallas_kernels.sparse_linear_attention`; `lists` is the routing, [B, H, query blocks, top-k]."""
    return add_linear(block_sparse_softmax(q, k, v, lists, (block_q, block_k)), q, k, v, projection)
