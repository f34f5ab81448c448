"""Attention in chunks with a recurrent state, for a whole video or chunk by chunk: ReHyAt (arXiv 2601.04342)."""

import jax
import jax.numpy as jnp

from pallas_kernels.api import (
    IMPLEMENTATIONS,
    STABILIZERS,
    attend_with_state,
    call_first,
    hybrid_attention,
    kernels_for,
    linear_state,
)
from pallas_kernels.chunk_windows import State, has_linear_keys
from pallas_kernels.feature_map import FeatureMap


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
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention to a query's own chunk and the tokens just before it, linear attention to the other keys.

    Eq. 5 of Attention Surgery (`hybrid_attention`), in which queries of chunk t, tokens t*chunk to (t + 1)*chunk, have

        S_t = [max(t*chunk - overlap, 0), min((t + 1)*chunk, N)),
        L_t = [0, max(t*chunk - overlap, 0)) if causal, and all keys outside S_t otherwise.

    The number of chunks changes neither the size of the program nor the time to compile it.

    Args:
        q, k, v: queries, keys and values [B, N, H, D], frame after frame; q is not yet scaled.
        query_map, key_map: phi_q and phi_k; None where no chunk has linear keys.
        chunk: tokens of a chunk, the latent frames of a chunk (Tc) times the tokens of a frame. The last chunk may be
            shorter.
        overlap: tokens before a chunk that its queries see by softmax, To frames.
        causal: whether the linear keys are only those before the window.
        key_valid: bool [B, N], False at padding. Every chunk needs a valid key in its window.
        stabilizer: as in `hybrid_attention`.
        implementation: "xla", "reference" (O(N^2) memory), "tpu" or "gpu"; None chooses as `linear_state` does.

    Returns:
        [B, N, H, D] in v's dtype.

    Raises:
        ValueError: shapes that do not fit, a chunk below 1, an overlap below 0, a missing map, an unknown stabilizer or
            implementation.
        NotImplementedError: arguments that the implementation does not support.
    """
    _check(q, k, v, chunk, overlap, key_valid, stabilizer)
    if (query_map is None or key_map is None) and has_linear_keys(q.shape[1], chunk, overlap, causal):
        raise ValueError(f"chunks of {chunk} of {q.shape[1]} tokens have linear keys, which need two maps, found None")
    if implementation is not None and implementation not in (names := [x for x in IMPLEMENTATIONS if x != "stock"]):
        raise ValueError(f"implementation must be one of {', '.join(names)}, found {implementation!r}")
    options = {"chunk": chunk, "overlap": overlap, "causal": causal, "key_valid": key_valid, "stabilizer": stabilizer}
    names = kernels_for(q.dtype) if implementation is None else (implementation,)
    return call_first(names, "chunked_attention", q, k, v, query_map, key_map, **options)


def chunk_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    overlap_k: jax.Array,
    overlap_v: jax.Array,
    state: State | None,
    query_map: FeatureMap,
    key_map: FeatureMap,
    *,
    overlap: int,
    stabilizer: str = "max",
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], State | None]:
    """The next chunk of causal `chunked_attention`: the loop over chunks gives its result, but for rounding.

    Args:
        q, k, v: the chunk, [B, C, H, D].
        overlap_k, overlap_v: keys and values of the window before it, [B, O, H, D]: at first no tokens (O = 0), later
            those that the last step returned.
        state: the `linear_state` of the keys that have left the window; None before any has.
        query_map, key_map: phi_q and phi_k.
        overlap: tokens that the next chunk will see by softmax; O grows to it.
        stabilizer: as in `hybrid_attention`.

    Returns:
        y [B, C, H, D], the next (overlap_k, overlap_v), and the next state. Keys enter the state as they leave the
        window, and so only once.

    Raises:
        ValueError: shapes that do not fit, an overlap below 0, an unknown stabilizer.
    """
    _check(q, k, v, q.shape[1], overlap, None, stabilizer)
    if overlap_k.shape != overlap_v.shape or overlap_k.ndim != 4 or overlap_k.shape[1] > overlap:
        shapes = f"{overlap_k.shape} and {overlap_v.shape}"
        raise ValueError(f"overlap_k and overlap_v must hold the same {overlap} tokens or fewer, found {shapes}")
    keys, values = (jnp.concatenate(pair, axis=1) for pair in ((overlap_k, k), (overlap_v, v)))
    if state is None:
        y = hybrid_attention(q, keys, values, None, None, num_softmax=keys.shape[1])
    else:
        y = attend_with_state(q, keys, values, query_map, state, stabilizer=stabilizer)
    leaving = max(keys.shape[1] - overlap, 0)
    if leaving:
        left = linear_state(keys[:, :leaving], values[:, :leaving], key_map)
        state = left if state is None else (state[0] + left[0], state[1] + left[1])
    return y, (keys[:, leaving:], values[:, leaving:]), state


def _check(q, k, v, chunk, overlap, key_valid, stabilizer) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k and v must be [B, N, H, D] of one shape, found {q.shape}, {k.shape} and {v.shape}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, found {chunk}")
    if overlap < 0:
        raise ValueError(f"overlap must be at least 0 tokens, found {overlap}")
    if key_valid is not None and (key_valid.shape != k.shape[:2] or key_valid.dtype != bool):
        raise ValueError(f"key_valid must be bool {k.shape[:2]}, found {key_valid.dtype} {key_valid.shape}")
    if stabilizer not in STABILIZERS:
        raise ValueError(f"stabilizer must be one of {', '.join(STABILIZERS)}, found {stabilizer!r}")
