"""Losses and statistics of one attention head, computed from the queries, keys and values that pass through it."""

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
from pallas_kernels.reference import EPSILON


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxBranch:
    """Softmax over a set of keys: output [B, N, H, D], log-sum-exp [B, N, H] and largest score [B, N, H]."""

    output: jax.Array
    lse: jax.Array
    largest: jax.Array

    def merge(self, other: "SoftmaxBranch") -> "SoftmaxBranch":
        """Softmax over the union of two disjoint sets of keys."""
        lse = jnp.logaddexp(self.lse, other.lse)
        mine, theirs = jnp.exp(self.lse - lse)[..., None], jnp.exp(other.lse - lse)[..., None]
        return SoftmaxBranch(mine * self.output + theirs * other.output, lse, jnp.maximum(self.largest, other.largest))


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

    def masked(self, x: jax.Array, start: int = 0) -> jax.Array:
        """x [..., N - start, F], of the tokens from `start` on, with zeros at padding."""
        return x if self.valid is None else jnp.where(self.valid[start:, None], x, 0)

    def total(self, x: Any) -> Any:
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def zone(self, x_NxF: jax.Array, start: int, stop: int) -> jax.Array:
        """Tokens `start` to `stop` of every device, gathered."""
        own = x_NxF[start:stop]
        return own if self.axis is None else jax.lax.all_gather(own, self.axis, tiled=True)

    def zone_valid(self, start: int, stop: int) -> np.ndarray | None:
        """bool, False at the padding of `zone`."""
        if self.order.valid is None:
            return None
        return self.order.valid.reshape(self.order.shards, -1)[:, start:stop].reshape(-1)

    def mean(self, x_BxN: jax.Array) -> jax.Array:
        """This device's contribution to the mean over the batch and all tokens."""
        return jnp.sum(self.masked(x_BxN[..., None])) / (x_BxN.shape[0] * self.batch_pieces * self.order.num_tokens)


def softmax_over(
    q_NxD: jax.Array, k_MxD: jax.Array, v_MxD: jax.Array, valid_M: np.ndarray | None = None
) -> SoftmaxBranch:
    """One head of one example: output [N, D], the rest [N]."""
    s_NxM = q_NxD @ k_MxD.T * q_NxD.shape[-1] ** -0.5
    if valid_M is not None:
        s_NxM = jnp.where(valid_M, s_NxM, jnp.finfo(s_NxM.dtype).min)
    largest_N = s_NxM.max(axis=-1)
    p_NxM = jnp.exp(s_NxM - largest_N[:, None])
    mass_N = p_NxM.sum(axis=-1)
    return SoftmaxBranch(p_NxM @ v_MxD / mass_N[:, None], largest_N + jnp.log(mass_N), largest_N)


def nested_softmax(
    q_NxD, k_NxD, v_NxD, tokens: TokenShards, rates: Sequence[Rate]
) -> tuple[dict[Rate, SoftmaxBranch], SoftmaxBranch]:
    """The softmax branch of every rate but "linear", and full softmax. Rates are nested: each key is visited once."""
    sizes = {rate: tokens.order.num_softmax(rate) for rate in rates if rate != "linear"}

    def zone(start: int, stop: int) -> SoftmaxBranch:
        keys, values = (tokens.zone(x, start, stop) for x in (k_NxD, v_NxD))
        return softmax_over(q_NxD, keys, values, tokens.zone_valid(start, stop))

    branches, merged, start = {}, None, 0
    for rate, size in sorted(sizes.items(), key=lambda item: item[1]):
        merged = zone(start, size) if merged is None else merged.merge(zone(start, size))
        branches[rate], start = merged, size
    rest = zone(start, len(k_NxD))
    return branches, rest if merged is None else merged.merge(rest)


@dataclasses.dataclass(frozen=True)
class HeadActivations:
    """One head of one block in a forward of the teacher: q, k, v [B, N, D], `full` softmax over all keys, and `branch`,
    the softmax over the softmax keys of the rate (None for "linear")."""

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
        """The queries, and the linear keys, as phi sees them."""
        q, k = self.q, self.k
        if (angles := self.inverse_rope) is not None:
            q, k = (apply_rope(x[:, :, None], *angles)[:, :, 0] for x in (q, k))
        return q, k[:, self.start :]

    def features(self, maps: FeatureMapPair) -> tuple[jax.Array, jax.Array]:
        """phi_q [B, N, F] of the queries and phi_k [B, M, F] of the linear keys, zero at padding."""
        phi_q, phi_k = (phi(x[:, :, None])[:, :, 0] for phi, x in zip(maps, self.inputs, strict=True))
        return self.tokens.masked(phi_q), self.tokens.masked(phi_k, self.start)


def hybrid_output(maps: FeatureMapPair, at: HeadActivations) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eq. 5 of one head, given its softmax branch: y [B, N, D], n_S [B, N], n_L [B, N]."""
    phi_q_BxNxF, phi_k_BxMxF = at.features(maps)
    state = phi_k_BxMxF.swapaxes(1, 2) @ at.v[:, at.start :], phi_k_BxMxF.sum(axis=1)
    state_BxFxD, z_BxF = at.tokens.total(state)
    o_L_BxNxD, n_L_BxN = phi_q_BxNxF @ state_BxFxD, jnp.einsum("bnf,bf->bn", phi_q_BxNxF, z_BxF)
    branch = at.branch
    if branch is None:
        return o_L_BxNxD / (n_L_BxN + EPSILON)[..., None], jnp.zeros_like(n_L_BxN), n_L_BxN
    n_S_BxN = jnp.exp(branch.lse - branch.largest) if at.stabilizer == "max" else jnp.ones_like(branch.lse)
    y = (n_S_BxN[..., None] * branch.output + o_L_BxNxD) / (n_S_BxN + n_L_BxN)[..., None]
    return y, n_S_BxN, n_L_BxN


def value_loss(maps: FeatureMapPair, at: HeadActivations) -> jax.Array:
    """Eq. 7: the mean absolute difference between hybrid and teacher attention."""
    return at.tokens.mean(jnp.abs(hybrid_output(maps, at)[0] - at.full.output).mean(axis=-1))


def attention_loss(maps: FeatureMapPair, at: HeadActivations) -> jax.Array:
    """Eq. 6 over the linear keys: log(1 + sum_j (exp(s_ij - c_i) - phi_q(q_i) phi_k(k_j))^2), averaged over queries.

    The average is inside the logarithm. c_i is the stabiliser's (for "linear": the full log-sum-exp), so that the
    features learn the mass that eq. 5 asks for. A linear key may still score far above all softmax keys: a factor
    exp(2 top) is taken out of the sum. Expanded as sum E^2 - 2 sum phi_q . (E phi_k) + tr(Gram_q Gram_k): the squared
    difference is never formed, and E has no gradient.
    """
    tokens, branch = at.tokens, at.branch
    shift = at.full.lse if branch is None else branch.largest if at.stabilizer == "max" else branch.lse
    valid_M = tokens.zone_valid(at.start, at.k.shape[1])

    @jax.checkpoint
    def example(q_NxD, k_NxD, shift_N, phi_q_NxF, phi_k_MxF):
        k_MxD = tokens.zone(k_NxD, at.start, len(k_NxD))
        s_NxM = q_NxD @ k_MxD.T * q_NxD.shape[-1] ** -0.5 - shift_N[:, None]
        if valid_M is not None:
            s_NxM = jnp.where(valid_M, s_NxM, -jnp.inf)
        top = jnp.maximum(tokens.masked(s_NxM).max(), 0.0)
        if tokens.axis is not None:
            top = jax.lax.pmax(top, tokens.axis)
        e_NxM, phi_k_MxF = tokens.masked(jnp.exp(s_NxM - top)), phi_k_MxF * jnp.exp(-top)
        grams = jnp.sum(tokens.total(phi_q_NxF.T @ phi_q_NxF) * tokens.total(phi_k_MxF.T @ phi_k_MxF))
        learned_NxF = e_NxM @ tokens.zone(phi_k_MxF, 0, len(phi_k_MxF))
        own = jnp.sum(e_NxM**2) - 2 * jnp.sum(phi_q_NxF * learned_NxF)
        squares = tokens.total(own) + grams
        return 2 * top + jnp.log1p(jnp.expm1(-2 * top) + squares / tokens.order.num_tokens)

    # Every device along the sequence axis computes the same loss and contributes an equal share of it.
    losses_B = jax.vmap(example)(at.q, at.k, shift, *at.features(maps))
    return jnp.mean(losses_B) / (tokens.order.shards * tokens.batch_pieces)


LOSSES = {"value": value_loss, "attention": attention_loss}


def head_statistics(maps: FeatureMapPair, at: HeadActivations) -> dict[str, jax.Array]:
    """Statistics of one head.

    error, size: sums of the absolute error and of the absolute output. share, teacher_share: the part of the attention
    mass that falls on the softmax keys, in the hybrid and in the teacher. mass, teacher_mass: the mass of the linear
    keys, likewise, in units of the stabiliser.
    """
    tokens, branch, full = at.tokens, at.branch, at.full
    y, n_S_BxN, n_L_BxN = hybrid_output(maps, at)
    if branch is None:
        teacher_mass_BxN = n_L_BxN  # y is a ratio in which the scale of n_L cancels
        teacher_share_BxN = jnp.zeros_like(n_L_BxN)
    else:
        teacher_share_BxN = jnp.exp(branch.lse - full.lse)
        # exp(lse) over the linear keys, in units of the stabiliser.
        shift = branch.largest if at.stabilizer == "max" else branch.lse
        teacher_mass_BxN = jnp.exp(full.lse - shift) - jnp.exp(branch.lse - shift)
    return {
        "error": jnp.sum(tokens.masked(jnp.abs(y - full.output))),
        "size": jnp.sum(tokens.masked(jnp.abs(full.output))),
        "share": tokens.mean(n_S_BxN / (n_S_BxN + n_L_BxN + EPSILON)),
        "teacher_share": tokens.mean(teacher_share_BxN),
        "mass": tokens.mean(n_L_BxN),
        "teacher_mass": tokens.mean(teacher_mass_BxN),
    }
