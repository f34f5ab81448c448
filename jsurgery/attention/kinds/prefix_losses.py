"""How softmax, R-hybrids and linear attention are distilled, whose softmax keys are a prefix of the token order.

The losses and statistics of one block, computed from the queries, keys and values that pass through it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jsurgery.attention.feature_maps import FeatureMapPair
from jsurgery.attention.rope import apply_rope
from jsurgery.attention.token_shards import SoftmaxBranch, TokenShards
from jsurgery.rates import Rate
from pallas_kernels import EPSILON, hybrid_error, linear_state, softmax_zones

QUERIES_AT_ONCE = 512  # in the attention loss


def nested_softmax(
    q: jax.Array, k: jax.Array, v: jax.Array, tokens: TokenShards, rates: Sequence[Rate]
) -> tuple[dict[Rate, SoftmaxBranch], SoftmaxBranch]:
    """The softmax branch of every rate that is a number, and full softmax, from one pass over the keys.

    q, k, v [B, N, H, D] are this device's tokens. Keys and values are gathered: that moves less than the partial
    results of every zone would.
    """
    wanted = {rate: tokens.order.num_softmax(rate) for rate in rates if isinstance(rate, int)}
    sizes = sorted({*wanted.values(), k.shape[1]})
    keys, values, valid = tokens.gathered(k, sizes), tokens.gathered(v, sizes), tokens.gathered_valid(sizes)
    key_valid = None if valid is None else jnp.broadcast_to(valid, keys.shape[:2])
    zones = softmax_zones(q, keys, values, [tokens.pieces * size for size in sizes], key_valid=key_valid)
    found = {size: SoftmaxBranch(*(x[number] for x in zones)) for number, size in enumerate(sizes)}
    return {rate: found[size] for rate, size in wanted.items()}, found[sizes[-1]]


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """One block's attention in a forward of the teacher, seen by one rate.

    q, k, v [B, N, H, D]; `full` softmax over all keys; and `branch`, the softmax over the softmax keys of the rate
    (None for "linear").
    """

    rate: Rate
    q: jax.Array
    k: jax.Array
    v: jax.Array
    branch: SoftmaxBranch | None
    full: SoftmaxBranch
    tokens: TokenShards
    stabilizer: str
    inverse_rope: tuple[jax.Array, jax.Array] | None = None  # cos, -sin [N, D/2], if phi sees q, k before RoPE

    @property
    def start(self) -> int:
        """The position of the first linear key."""
        return self.tokens.order.num_softmax(self.rate)

    @property
    def inputs(self) -> tuple[jax.Array, jax.Array]:
        """The queries and the keys as phi sees them."""
        if self.inverse_rope is None:
            return self.q, self.k
        return apply_rope(self.q, *self.inverse_rope), apply_rope(self.k, *self.inverse_rope)

    @property
    def shift(self) -> jax.Array:
        """c_i of eq. 5, [B, N, H], with which the masses of both branches are compared; for "linear" the full
        log-sum-exp."""
        if self.branch is None:
            return self.full.lse
        return self.branch.largest if self.stabilizer == "max" else self.branch.lse

    @property
    def softmax(self) -> tuple[jax.Array, jax.Array] | None:
        """The softmax branch's output and n_S [B, N, H]."""
        return None if self.branch is None else (self.branch.output, jnp.exp(self.branch.lse - self.shift))


def error_and_mass(maps: FeatureMapPair, at: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    """Of eq. 5: the sum [H] of its absolute differences to full softmax, and n_L [B, N, H]. No gradient of n_L."""
    (query_map, key_map), (q, k), valid = maps, at.inputs, at.tokens.valid_rows(len(at.q))
    state = linear_state(k, at.v, key_map, start=at.start, key_valid=valid, token_gradients=False)
    return hybrid_error(q, query_map, at.tokens.total(state), at.softmax, at.full.output, query_valid=valid)


def value_loss(maps: FeatureMapPair, at: AttentionInputs) -> jax.Array:
    """Eq. 7, [H]: the mean absolute difference between hybrid and teacher attention."""
    batch, _, _, width = at.q.shape
    examples = batch * at.tokens.batch_pieces
    return error_and_mass(maps, at)[0] / (examples * at.tokens.order.num_tokens * width)


def attention_loss(maps: FeatureMapPair, at: AttentionInputs) -> jax.Array:
    """Eq. 6 over the linear keys, [H]: log(1 + sum_j (exp(s_ij - c_i) - phi_q(q_i) phi_k(k_j))^2), averaged over
    queries.

    The average is inside the logarithm. c_i is the stabiliser's (for "linear": the full log-sum-exp), so that the
    features learn the mass that eq. 5 asks for. A linear key may still score far above all softmax keys: a factor
    exp(2 top) is taken out of the sum. Expanded as sum E^2 - 2 sum phi_q . (E phi_k) + tr(Gram_q Gram_k): the squared
    difference is never formed, and E, which has no gradient, for `QUERIES_AT_ONCE` queries at a time.
    """
    tokens, (query_map, key_map) = at.tokens, maps
    q, k = at.inputs
    sizes = [at.start, k.shape[1]]
    skip = tokens.pieces * at.start
    linear = lambda x: tokens.gathered(x, sizes)[:, skip:]
    valid = tokens.gathered_valid(sizes)
    inside_M = (
        jnp.ones(tokens.pieces * (at.k.shape[1] - at.start), bool) if valid is None else jnp.asarray(valid[skip:])
    )
    phi_q_BxNxHxF = tokens.masked(query_map(q.astype(jnp.float32)))
    phi_k_BxNxHxF = tokens.masked(key_map(k.astype(jnp.float32)))
    # If the largest score is above the shift, it is a linear key's.
    top_BxH = jnp.maximum(tokens.masked(at.full.largest - at.shift).max(axis=1), 0.0)
    if tokens.axis is not None:
        top_BxH = jax.lax.pmax(top_BxH, tokens.axis)

    def head(q_NxD, k_MxD, shift_N, top, phi_q_NxF, phi_k_MxF, own_k_LxF):
        @jax.checkpoint
        def chunk(total, rows):
            q_CxD, shift_C, phi_q_CxF, inside_C = rows
            s_CxM = q_CxD @ k_MxD.T * q_CxD.shape[-1] ** -0.5 - shift_C[:, None] - top
            e_CxM = jnp.where(inside_C[:, None] & inside_M[None], jnp.exp(s_CxM), 0.0)
            return total + jnp.sum(e_CxM**2) - 2 * jnp.sum(phi_q_CxF * (e_CxM @ phi_k_MxF)), None

        inside_N = jnp.ones(len(q_NxD), bool) if tokens.valid is None else tokens.valid
        size = min(QUERIES_AT_ONCE, len(q_NxD))
        padding = -len(q_NxD) % size
        pieces = lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])
        rows = jax.tree.map(pieces, (q_NxD, shift_N, phi_q_NxF, inside_N))
        own, _ = jax.lax.scan(chunk, jnp.zeros(()), rows)
        grams = jnp.sum(tokens.total(phi_q_NxF.T @ phi_q_NxF) * tokens.total(own_k_LxF.T @ own_k_LxF))
        squares = tokens.total(own) + grams
        return 2 * top + jnp.log1p(jnp.expm1(-2 * top) + squares / tokens.order.num_tokens)

    phi_k_BxNxHxF *= jnp.exp(-top_BxH)[:, None, :, None]
    of_head = jax.vmap(head)  # over the batch
    heads_first = lambda x: jnp.moveaxis(x, -1 if x.ndim < 4 else 2, 0)
    by_head = (
        at.q.astype(jnp.float32), linear(at.k).astype(jnp.float32), at.shift, top_BxH, phi_q_BxNxHxF,
        linear(phi_k_BxNxHxF), phi_k_BxNxHxF[:, at.start :],
    )  # fmt: skip
    losses_HxB = jax.lax.map(lambda inputs: of_head(*inputs), jax.tree.map(heads_first, by_head))
    # Every device along the sequence axis computes the same loss and contributes an equal share of it.
    return losses_HxB.mean(axis=1) / (tokens.pieces * tokens.batch_pieces)


LOSSES = {"value": value_loss, "attention": attention_loss}


def attention_statistics(maps: FeatureMapPair, at: AttentionInputs) -> dict[str, jax.Array]:
    """Statistics of one block, each [H].

    error, size: sums of the absolute error and of the absolute output. share, teacher_share: the part of the attention
    mass that falls on the softmax keys, in the hybrid and in the teacher. mass, teacher_mass: the mass of the linear
    keys, likewise, in units of the stabiliser.
    """
    tokens, branch, full = at.tokens, at.branch, at.full
    error_H, n_L_BxNxH = error_and_mass(maps, at)
    if at.softmax is None or branch is None:
        n_S_BxNxH = jnp.zeros_like(n_L_BxNxH)
        teacher_mass_BxNxH = n_L_BxNxH  # y is a ratio in which the scale of n_L cancels
        teacher_share_BxNxH = jnp.zeros_like(n_L_BxNxH)
    else:
        n_S_BxNxH = at.softmax[1]
        teacher_share_BxNxH = jnp.exp(branch.lse - full.lse)
        # exp(lse) over the linear keys, in units of the stabiliser.
        teacher_mass_BxNxH = jnp.exp(full.lse - at.shift) - jnp.exp(branch.lse - at.shift)
    return {
        "error": error_H,
        "size": jnp.sum(tokens.masked(jnp.abs(full.output)), axis=(0, 1, 3)),
        "share": tokens.mean(n_S_BxNxH / (n_S_BxNxH + n_L_BxNxH + EPSILON)),
        "teacher_share": tokens.mean(teacher_share_BxNxH),
        "mass": tokens.mean(n_L_BxNxH),
        "teacher_mass": tokens.mean(teacher_mass_BxNxH),
    }
