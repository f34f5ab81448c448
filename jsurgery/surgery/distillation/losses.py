"""Losses and statistics of one block's attention, computed from the queries, keys and values that pass through it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsurgery.attention.token_order import TokenOrder
from jsurgery.rates import Rate
from jsurgery.surgery.distillation.saved_maps import FeatureMapPair
from jsurgery.wan.rope import apply_rope
from pallas_kernels import EPSILON, hybrid_error, linear_state, softmax_zones

QUERIES_AT_ONCE = 512  # in the attention loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxBranch:
    """Softmax over a set of keys: output [B, N, H, D], log-sum-exp and largest score [B, N, H], float32."""

    output: jax.Array
    lse: jax.Array
    largest: jax.Array


@dataclasses.dataclass(frozen=True)
class TokenShards:
    """How tokens in the order `order` are sharded: along the mesh axis `axis`, or not at all if it is None.

    q, k and v are the tokens of one device. Sums over them are partial, and `total` adds up the partial sums of all
    devices. The batch is divided into `batch_pieces`.
    """

    order: TokenOrder
    axis: str | None = None
    batch_pieces: int = 1

    @property
    def pieces(self) -> int:
        """The number of devices that the tokens are on."""
        return 1 if self.axis is None else self.order.shards

    @property
    def valid(self) -> jax.Array | None:
        """bool [N], False at the padding of this device's tokens."""
        if self.axis is None or self.order.valid is None:
            return None
        return jnp.asarray(self.order.valid).reshape(self.order.shards, -1)[jax.lax.axis_index(self.axis)]

    def own(self, x_PxF: np.ndarray) -> jax.Array:
        """This device's tokens [N, F] of an array over all tokens."""
        if self.axis is None:
            return jnp.asarray(x_PxF)
        return jnp.asarray(x_PxF).reshape(self.order.shards, -1, x_PxF.shape[-1])[jax.lax.axis_index(self.axis)]

    def valid_rows(self, batch: int) -> jax.Array | None:
        """`valid`, for every example: [B, N]."""
        return None if self.valid is None else jnp.broadcast_to(self.valid, (batch, len(self.valid)))

    def masked(self, x_BxNx: jax.Array) -> jax.Array:
        """x [B, N, ...] with zeros at padding."""
        valid = self.valid
        return x_BxNx if valid is None else jnp.where(valid.reshape(1, -1, *[1] * (x_BxNx.ndim - 2)), x_BxNx, 0)

    def total(self, x: Any) -> Any:
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def gathered(self, x_BxNx: jax.Array, sizes: Sequence[int]) -> jax.Array:
        """The tokens of all devices, zone by zone. On every device, zone z is the tokens sizes[z - 1] to sizes[z]."""
        if self.axis is None:
            return x_BxNx
        zones = [x_BxNx[:, start:stop] for start, stop in zip((0, *sizes), sizes, strict=False) if start < stop]
        return jnp.concatenate([jax.lax.all_gather(zone, self.axis, axis=1, tiled=True) for zone in zones], axis=1)

    def gathered_valid(self, sizes: Sequence[int]) -> np.ndarray | None:
        """bool [M], False at the padding of `gathered`."""
        if self.axis is None or self.order.valid is None:
            return None
        valid = self.order.valid.reshape(self.order.shards, -1)
        return np.concatenate(
            [valid[:, start:stop].reshape(-1) for start, stop in zip((0, *sizes), sizes, strict=False)]
        )

    def mean(self, x_BxNxH: jax.Array) -> jax.Array:
        """[H]: this device's contribution to the mean over the batch and all tokens."""
        return self.masked(x_BxNxH).sum(axis=(0, 1)) / (x_BxNxH.shape[0] * self.batch_pieces * self.order.num_tokens)


def nested_softmax(
    q: jax.Array, k: jax.Array, v: jax.Array, tokens: TokenShards, rates: Sequence[Rate]
) -> tuple[dict[Rate, SoftmaxBranch], SoftmaxBranch]:
    """The softmax branch of every rate but "linear", and full softmax, from one pass over the keys.

    q, k, v [B, N, H, D] are this device's tokens. Keys and values are gathered: that moves less than the partial
    results of every zone would.
    """
    wanted = {rate: tokens.order.num_softmax(rate) for rate in rates if rate != "linear"}
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
