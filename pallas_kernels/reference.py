"""Hybrid attention in plain jnp, O(N^2) in time and memory. The other implementations are tested against it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.feature_map import FeatureMap

# Of Z nested prefixes: outputs [Z, B, N, H, D], log-sum-exps and largest scores [Z, B, N, H], all float32.
Zones = tuple[jax.Array, jax.Array, jax.Array]

# Added to the denominator of pure linear attention (num_softmax = 0), whose features may all be zero. A hybrid needs
# nothing of the kind, because its softmax mass n_S is at least 1.
EPSILON = 1e-6
SPARSE_EPSILON = 1e-5  # likewise, of the linear branch of sparse attention


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
    (o_S, n_S), (o_L, n_L) = _branches(q, k, v, query_map, key_map, num_softmax, key_valid, stabilizer)
    y_BxHxNxD = (o_S + o_L) / (n_S + n_L)[..., None]
    return y_BxHxNxD.swapaxes(1, 2).astype(v.dtype)


def softmax_share(
    q: jax.Array,
    k: jax.Array,
    query_map: FeatureMap | None,
    key_map: FeatureMap | None,
    *,
    num_softmax: int,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
) -> jax.Array:
    """The softmax branch's share of eq. 5's denominator, n_S / (n_S + n_L): float32 [B, N, H], in [0, 1].

    If it is near 1 everywhere, the linear branch has no effect. The arguments are those of `hybrid_attention`. Memory
    is O(N^2).
    """
    (_, n_S), (_, n_L) = _branches(q, k, k, query_map, key_map, num_softmax, key_valid, stabilizer)
    return (n_S / (n_S + n_L)).swapaxes(1, 2)


def chunked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap | None,
    key_map: FeatureMap | None,
    *,
    chunk: int,
    overlap: int,
    causal: bool,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
) -> jax.Array:
    """See `pallas_kernels.chunked_attention`: every pair of tokens, with masks that say which branch it is in."""
    token = jnp.arange(q.shape[1])
    first_N = token // chunk * chunk
    from_N, to_N = jnp.maximum(first_N - overlap, 0)[:, None], (first_N + chunk)[:, None]
    in_S_NxN = (token[None] >= from_N) & (token[None] < to_N)
    in_L_NxN = token[None] < from_N if causal else ~in_S_NxN
    valid_BxN = jnp.ones(k.shape[:2], bool) if key_valid is None else key_valid
    among = lambda mask_NxN: mask_NxN[None, None] & valid_BxN[:, None, None]
    f32 = jnp.float32
    s_BxHxNxN = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=f32) * q.shape[-1] ** -0.5
    s_BxHxNxN = jnp.where(among(in_S_NxN), s_BxHxNxN, -jnp.inf)
    stabilize = jnp.max if stabilizer == "max" else jax.nn.logsumexp
    weights_BxHxNxN = jnp.exp(s_BxHxNxN - stabilize(s_BxHxNxN, axis=-1, keepdims=True))
    if query_map is not None and key_map is not None:
        products_BxHxNxN = jnp.einsum("bnhf,bmhf->bhnm", query_map(q).astype(f32), key_map(k).astype(f32))
        weights_BxHxNxN += jnp.where(among(in_L_NxN), products_BxHxNxN, 0.0)
    y_BxHxNxD = jnp.einsum("bhnm,bmhd->bhnd", weights_BxHxNxN, v.astype(f32))
    y_BxHxNxD /= weights_BxHxNxN.sum(axis=-1, keepdims=True)
    return y_BxHxNxD.swapaxes(1, 2).astype(v.dtype)


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
    f32, query, key = jnp.float32, jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
    routed_BxHxIxJ = jax.nn.one_hot(lists, -(-k.shape[1] // block_k), dtype=bool).any(axis=-2)
    seen_BxHxNxM = routed_BxHxIxJ[:, :, query // block_q][..., key // block_k]
    s_BxHxNxM = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=f32) * q.shape[-1] ** -0.5
    weights_BxHxNxM = jax.nn.softmax(jnp.where(seen_BxHxNxM, s_BxHxNxM, -jnp.inf))
    phi_q, phi_k = (jax.nn.softmax(x.astype(f32)) for x in (q, k))
    linear_BxHxNxM = jnp.einsum("bnhd,bmhd->bhnm", phi_q, phi_k)
    linear_BxHxNxM /= SPARSE_EPSILON + linear_BxHxNxM.sum(axis=-1, keepdims=True)
    kernel, bias = projection
    sparse, linear = (jnp.einsum("bhnm,bmhd->bnhd", x, v.astype(f32)) for x in (weights_BxHxNxM, linear_BxHxNxM))
    return (sparse + linear @ kernel.astype(f32) + bias.astype(f32)[None, None, None]).astype(v.dtype)


def _branches(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap | None,
    key_map: FeatureMap | None,
    num_softmax: int,
    key_valid: jax.Array | None,
    stabilizer: str,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """(numerator [B, H, N, D], denominator [B, H, N]) of the softmax branch, and the same of the linear branch."""
    if key_valid is None:
        key_valid = jnp.ones(k.shape[:2], bool)
    f32 = jnp.float32
    v_BxNxHxD = v.astype(f32)
    o_S_BxHxNxD = o_L_BxHxNxD = jnp.zeros((), f32)
    n_S_BxHxN = n_L_BxHxN = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), f32)

    if num_softmax:
        s_BxHxNxS = jnp.einsum("bnhd,bshd->bhns", q, k[:, :num_softmax], preferred_element_type=f32)
        s_BxHxNxS *= q.shape[-1] ** -0.5
        s_BxHxNxS = jnp.where(key_valid[:, None, None, :num_softmax], s_BxHxNxS, -jnp.inf)
        if stabilizer == "max":
            c_BxHxNx1 = s_BxHxNxS.max(axis=-1, keepdims=True)
        else:
            c_BxHxNx1 = jax.nn.logsumexp(s_BxHxNxS, axis=-1, keepdims=True)
        weights_BxHxNxS = jnp.exp(s_BxHxNxS - c_BxHxNx1)
        o_S_BxHxNxD = jnp.einsum("bhns,bshd->bhnd", weights_BxHxNxS, v_BxNxHxD[:, :num_softmax])
        n_S_BxHxN = weights_BxHxNxS.sum(axis=-1)

    if num_softmax < k.shape[1]:
        assert query_map is not None and key_map is not None
        phi_q_BxNxHxF = query_map(q).astype(f32)
        phi_k_BxLxHxF = key_map(k[:, num_softmax:]).astype(f32)
        phi_k_BxLxHxF = jnp.where(key_valid[:, num_softmax:, None, None], phi_k_BxLxHxF, 0.0)
        weights_BxHxNxL = jnp.einsum("bnhf,blhf->bhnl", phi_q_BxNxHxF, phi_k_BxLxHxF)
        o_L_BxHxNxD = jnp.einsum("bhnl,blhd->bhnd", weights_BxHxNxL, v_BxNxHxD[:, num_softmax:])
        n_L_BxHxN = weights_BxHxNxL.sum(axis=-1) + (0.0 if num_softmax else EPSILON)
    return (o_S_BxHxNxD, n_S_BxHxN), (o_L_BxHxNxD, n_L_BxHxN)


def softmax_zones(
    q: jax.Array, k: jax.Array, v: jax.Array, bounds: Sequence[int], *, key_valid: jax.Array | None = None
) -> Zones:
    """See `pallas_kernels.softmax_zones`."""
    f32 = jnp.float32
    s_BxHxNxM = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=f32) * q.shape[-1] ** -0.5
    if key_valid is not None:
        s_BxHxNxM = jnp.where(key_valid[:, None, None], s_BxHxNxM, -jnp.inf)
    zones = []
    for bound in bounds:
        scores = s_BxHxNxM[..., :bound]
        output = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), v[:, :bound].astype(f32))
        statistics = jax.nn.logsumexp(scores, axis=-1), scores.max(axis=-1)
        zones.append((output, *(x.swapaxes(1, 2) for x in statistics)))
    return tuple(jnp.stack(parts) for parts in zip(*zones, strict=True))  # type: ignore[return-value]


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
    q, softmax, target = jax.lax.stop_gradient((q, softmax, target))
    (state_BxHxFxD, z_BxHxF), phi_BxNxHxF = state, query_map(q).astype(jnp.float32)
    y_BxNxHxD = jnp.einsum("bnhf,bhfd->bnhd", phi_BxNxHxF, state_BxHxFxD)
    n_L_BxNxH = jnp.einsum("bnhf,bhf->bnh", phi_BxNxHxF, z_BxHxF)
    if softmax is None:
        y_BxNxHxD /= (n_L_BxNxH + EPSILON)[..., None]
    else:
        o_S_BxNxHxD, n_S_BxNxH = softmax
        y_BxNxHxD = (n_S_BxNxH[..., None] * o_S_BxNxHxD + y_BxNxHxD) / (n_S_BxNxH + n_L_BxNxH)[..., None]
    gap_BxNxHxD = jnp.abs(y_BxNxHxD - target)
    if query_valid is not None:
        gap_BxNxHxD = jnp.where(query_valid[..., None, None], gap_BxNxHxD, 0.0)
    return gap_BxNxHxD.sum(axis=(0, 1, 3)), jax.lax.stop_gradient(n_L_BxNxH)
