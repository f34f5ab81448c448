"""The public functions of hybrid attention, and the choice of an implementation for them."""

import importlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import log
from pallas_kernels.feature_map import FeatureMap
from pallas_kernels.reference import Zones

IMPLEMENTATIONS = ("xla", "reference", "tpu", "gpu", "stock")  # each the name of a module in this package
STABILIZERS = ("max", "lse")


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
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention on the first `num_softmax` keys, linear attention on the rest: Attention Surgery, eq. 5.

    With s_ij = q_i k_j / sqrt(D), S the first `num_softmax` keys and L the others,

        n_S,i = sum_{j in S} exp(s_ij - c_i),  n_L,i = phi_q(q_i) . sum_{j in L} phi_k(k_j),
        y_i = (sum_{j in S} exp(s_ij - c_i) v_j + phi_q(q_i) . sum_{j in L} phi_k(k_j)^T v_j) / (n_S,i + n_L,i).

    The linear terms carry no exp(-c_i), so c_i is part of the model, and gradients pass through it.

    Args:
        q: queries [B, N, H, D], in prefix order, not yet scaled.
        k: keys [B, M, H, D].
        v: values [B, M, H, D].
        query_map: phi_q; None where num_softmax = M.
        key_map: phi_k; None where num_softmax = M.
        num_softmax: the number of keys that keep softmax, 0 to M. M is full softmax attention; 0 is pure linear
            attention, whose denominator is n_L + `EPSILON`.
        key_valid: bool [B, M], False at padding. Unless num_softmax is 0, every batch entry needs a valid softmax key.
        stabilizer: c_i: "max", the largest s_ij over the valid softmax keys (the paper), or "lse", their log-sum-exp,
            with which n_S = 1.
        implementation: "xla" (any backend), "reference" (O(N^2) memory), "tpu" and "gpu" (Pallas kernels), "stock" (the
            softmax branch by cuDNN on GPU and by jax's flash attention on TPU; only for "lse"). None chooses the first
            of the platform's kernels that supports the arguments; on GPU, "stock" is tried before "gpu". It chooses
            "xla" on CPU, in float32 on GPU, and where XLA has to partition the arrays over several devices, since XLA
            cannot partition a kernel (`sharded_self_attention` does it instead). If none of the platform's kernels
            supports the arguments, a warning on the log says why. The platform is that of the enclosing `shard_map` or
            else of the default device. To lower a program for another platform, name the implementation.

    Returns:
        [B, N, H, D] in v's dtype.

    Raises:
        ValueError: shapes that do not fit, a missing map, an unknown stabilizer or implementation.
        NotImplementedError: arguments that the implementation does not support; the message says which, and why.
    """
    _check(q, k, v, query_map, key_map, num_softmax, key_valid, stabilizer)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, found {implementation!r}")
    platform, whole = _place()
    names = _candidates(platform, whole, q.dtype) if implementation is None else (implementation,)
    options = {"num_softmax": num_softmax, "key_valid": key_valid, "stabilizer": stabilizer}
    return call_first(names, "hybrid_attention", q, k, v, query_map, key_map, **options)


def linear_state(
    k: jax.Array,
    v: jax.Array,
    key_map: FeatureMap,
    *,
    start: int = 0,
    key_valid: jax.Array | None = None,
    token_gradients: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """The linear branch's state of keys and values [B, M, H, D]: S [B, H, F, D] and z [B, H, F], float32.

    S = sum_j phi_k(k_j)^T v_j and z = sum_j phi_k(k_j), over the keys from `start` on; F is the number of phi_k's
    features. The state of a union of disjoint sets of keys is the sum of their states. Without `token_gradients`, the
    gradients of k and v are not computed, and are zero. The implementation is chosen as in `hybrid_attention`, but
    "stock" is not tried.
    """
    options = {"start": start, "key_valid": key_valid, "token_gradients": token_gradients}
    return call_first(kernels_for(k.dtype), "linear_state", k, v, key_map, **options)


def attend_with_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap,
    state: tuple[jax.Array, jax.Array],
    *,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
) -> jax.Array:
    """`hybrid_attention` with softmax keys and values [B, S, H, D] and the `linear_state` of all linear keys."""
    options = {"key_valid": key_valid, "stabilizer": stabilizer}
    return call_first(kernels_for(q.dtype), "attend_with_state", q, k, v, query_map, state, **options)


def softmax_zones(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: Sequence[int],
    *,
    key_valid: jax.Array | None = None,
    implementation: str | None = None,
) -> Zones:
    """Softmax attention to every one of the nested prefixes k[:, :bound], from one pass over the keys.

    Args:
        q: queries [B, N, H, D], not yet scaled.
        k, v: keys and values [B, M, H, D].
        bounds: the lengths of Z prefixes, ascending, each at least 1 and at most M.
        key_valid: bool [B, M], False at padding. Every batch entry needs a valid key in the shortest prefix.
        implementation: "xla", "reference", "tpu" or "gpu"; None chooses as `linear_state` does.

    Returns:
        (outputs [Z, B, N, H, D], log-sum-exps [Z, B, N, H], largest scores [Z, B, N, H]), float32. Scores are
        q k / sqrt(D).

    Raises:
        ValueError: bounds that do not ascend from 1 to M.
        NotImplementedError: arguments that the implementation does not support, and gradients of "tpu" and "gpu".
    """
    if list(bounds) != sorted(set(bounds)) or not bounds or not 0 < bounds[0] <= bounds[-1] <= k.shape[1]:
        raise ValueError(f"bounds must ascend from at least 1 to at most {k.shape[1]}, found {tuple(bounds)}")
    names = kernels_for(q.dtype) if implementation is None else (implementation,)
    return call_first(names, "softmax_zones", q, k, v, tuple(bounds), key_valid=key_valid)


def hybrid_error(
    q: jax.Array,
    query_map: FeatureMap,
    state: tuple[jax.Array, jax.Array],
    softmax: tuple[jax.Array, jax.Array] | None,
    target: jax.Array,
    *,
    query_valid: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """How far eq. 5, y = (n_S o_S + phi_q S) / (n_S + phi_q z), is from a target.

    Gradients are those of `query_map` and `state` alone. They are computed together with the errors, in one pass over
    the queries.

    Args:
        q: queries [B, N, H, D], as phi_q sees them.
        state: S and z, the `linear_state` of all linear keys.
        softmax: (o_S [B, N, H, D], n_S [B, N, H]), float32: the softmax branch's output and its mass in units of the
            stabiliser. None for pure linear attention, whose denominator is n_L + `EPSILON`.
        target: [B, N, H, D].
        query_valid: bool [B, N], False at queries that are left out.
        implementation: "xla", "reference" or "tpu"; None chooses as `linear_state` does.

    Returns:
        errors [H], the sums of |y - target| over batch, queries and channels, and n_L = phi_q z [B, N, H], which has
        no gradient. Both are float32.

    Raises:
        NotImplementedError: arguments that the implementation does not support.
    """
    names = kernels_for(q.dtype) if implementation is None else (implementation,)
    names = tuple(name for name in names if name != "gpu")  # XLA's products and chunks do on GPUs
    return call_first(names, "hybrid_error", q, query_map, state, softmax, target, query_valid=query_valid)


def kernels_for(dtype: Any) -> tuple[str, ...]:
    """The implementations of all but `hybrid_attention` to try, in this order."""
    return tuple(name for name in _candidates(*_place(), dtype) if name != "stock")


def _place() -> tuple[str, bool]:
    """The platform, "cpu", "gpu" or "tpu", and whether each device holds all of the arrays that this code sees."""
    mesh = jax.sharding.get_abstract_mesh()
    mapped = not mesh.empty and mesh.are_all_axes_manual
    device = mesh.abstract_device if mapped else None
    device = device or jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    name = device if isinstance(device, str) else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name), mapped or jax.device_count() == 1


def _candidates(platform: str, whole: bool, dtype: Any) -> tuple[str, ...]:
    """The implementations of `hybrid_attention` to try, in this order."""
    if not whole:
        return ("xla",)
    if platform == "gpu" and dtype != jnp.float32:  # cuDNN has no float32, and Triton no tensor cores for it
        return "stock", "gpu", "xla"
    return ("tpu", "xla") if platform == "tpu" else ("xla",)


def call_first(names: tuple[str, ...], function: str, *arguments: Any, **options: Any) -> Any:
    """Calls `function` of the first implementation that supports the arguments.

    If none does, the NotImplementedError of the last implementation is raised. Where only "xla" is left, the log says
    why, once for each reason.
    """
    refused = []
    for name, following in zip_longest(names, names[1:]):
        more = {"platform": _place()[0]} if name == "stock" else {}
        try:
            return getattr(importlib.import_module(f"pallas_kernels.{name}"), function)(*arguments, **options, **more)
        except NotImplementedError as error:
            if following is None:
                raise
            refused.append(str(error))
            if following == "xla":
                log.once(f"'xla' in place of a kernel: {'; '.join(refused)}")


def _check(q, k, v, query_map, key_map, num_softmax, key_valid, stabilizer):
    if q.ndim != 4:
        raise ValueError(f"q must be [B, N, H, D], found shape {q.shape}")
    if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        batch, _, heads, width = q.shape
        raise ValueError(f"k must be [{batch}, M, {heads}, {width}] to fit q {q.shape}, found shape {k.shape}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {k.shape}, found {v.shape}")
    if not 0 <= num_softmax <= k.shape[1]:
        raise ValueError(f"num_softmax must lie in 0..{k.shape[1]}, the number of keys, found {num_softmax}")
    if num_softmax < k.shape[1] and (query_map is None or key_map is None):
        linear = k.shape[1] - num_softmax
        raise ValueError(f"{linear} of {k.shape[1]} keys are linear and need a query_map and a key_map, found None")
    for name, feature_map in (("query_map", query_map), ("key_map", key_map)):
        for leaf in jax.tree.leaves(feature_map):
            if jnp.shape(leaf)[:1] != (q.shape[2],):
                raise ValueError(f"{name}'s arrays must be [{q.shape[2]} heads, ...], found shape {jnp.shape(leaf)}")
    if key_valid is not None and (key_valid.shape != k.shape[:2] or key_valid.dtype != bool):
        raise ValueError(f"key_valid must be bool {k.shape[:2]}, found {key_valid.dtype} {key_valid.shape}")
    if stabilizer not in STABILIZERS:
        raise ValueError(f"stabilizer must be one of {', '.join(STABILIZERS)}, found {stabilizer!r}")
