"""Hybrid attention on GPUs: the public functions around the Pallas kernels, which Triton compiles, and gradients.

The kernels themselves are in `gpu_forward`, `gpu_backward`, `gpu_sparse` and `gpu_zones`. The backward of the linear
branch is a chain of matrix products, which XLA runs in chunks.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_sparse, gpu_zones, tuning, xla, xla_sparse
from pallas_kernels.chunk_windows import Kernels, attend_to_chunks
from pallas_kernels.feature_map import FeatureMap, PolynomialMap
from pallas_kernels.gpu_backward import head_dot, softmax_backward
from pallas_kernels.gpu_forward import BLOCK_SIZES, WIDTHS, BlockSizes, Options, attend, summarize
from pallas_kernels.reference import Zones


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
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Eq. 5 of Attention Surgery; see `pallas_kernels.hybrid_attention`.

    If several keys share the largest score, the first one gets c_i's gradient. Products of float32 are computed in full
    float32: they are slow, and take a minute to compile.

    Args:
        block_sizes: None for the sizes that `tuning` has for this chip in bfloat16, or else the defaults.
        interpret: runs on any backend, slowly.

    Raises:
        NotImplementedError: widths, dtypes or maps that the kernels do not support.
        ValueError: a query_map and a key_map of different degrees.
    """
    linear = num_softmax < k.shape[1]
    _check({"q": q, "k": k, "v": v}, {"query_map": query_map, "key_map": key_map} if linear else {})
    options = _options(k, num_softmax, stabilizer, block_sizes, interpret)
    if not linear:
        return _attend(options, q, k, v, None, None, key_valid)
    state: Any = _state(options, k, v, key_map, key_valid)
    _check_state(q, query_map, state)
    return _attend(options, q, k, v, query_map, state, key_valid)


def linear_state(
    k: jax.Array,
    v: jax.Array,
    key_map: FeatureMap,
    *,
    start: int = 0,
    key_valid: jax.Array | None = None,
    token_gradients: bool = True,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """S [B, H, F, D] and z [B, H, F]; see `pallas_kernels.linear_state`. Arguments and errors: `hybrid_attention`."""
    _check({"k": k, "v": v}, {"key_map": key_map})
    if not token_gradients:  # XLA then leaves out what it would compute for them
        k, v = jax.lax.stop_gradient((k, v))
    return _state(_options(k, start, "lse", block_sizes, interpret), k, v, key_map, key_valid)


def attend_with_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_map: FeatureMap,
    state: tuple[jax.Array, jax.Array],
    *,
    key_valid: jax.Array | None = None,
    stabilizer: str = "max",
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Eq. 5 with softmax keys and the state of the linear keys; see `pallas_kernels.attend_with_state`.

    Raises:
        NotImplementedError: widths, dtypes or maps that the kernels do not support.
        ValueError: a state whose shapes are not those of query_map's features.
    """
    _check({"q": q, "k": k, "v": v}, {"query_map": query_map})
    _check_state(q, query_map, state)
    options = _options(k, k.shape[1], stabilizer, block_sizes, interpret)
    return _attend(options, q, k, v, query_map, state, key_valid)


def softmax_zones(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: Sequence[int],
    *,
    key_valid: jax.Array | None = None,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> Zones:
    """See `pallas_kernels.softmax_zones`; it has no gradients here. Arguments and errors: `hybrid_attention`."""
    _check({"q": q, "k": k, "v": v}, {})
    return _zones(_options(k, bounds[-1], "lse", block_sizes, interpret), tuple(bounds), q, k, v, key_valid)


def chunked_attention(*arguments: Any, block_sizes: BlockSizes | None = None, interpret: bool = False, **options: Any):
    """See `pallas_kernels.chunked_attention`. Arguments and errors: `hybrid_attention`."""
    own: Any = {"block_sizes": block_sizes, "interpret": interpret}
    functions: Any = (partial(f, **own) for f in (hybrid_attention, linear_state, attend_with_state))
    return attend_to_chunks(Kernels(*functions), *arguments, **options)


def sparse_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    projection: tuple[jax.Array, jax.Array],
    lists: jax.Array,
    *,
    block_q: int,
    block_k: int,
    interpret: bool = False,
) -> jax.Array:
    """See `pallas_kernels.sparse_linear_attention`; `lists` is the routing. XLA computes the linear branch.

    Raises:
        NotImplementedError: blocks that are no power of two from 16 to 128, and widths and dtypes as in
            `hybrid_attention`.
    """
    _check({"q": q, "k": k, "v": v}, {})
    if not {block_q, block_k} <= {16, 32, 64, 128}:
        raise NotImplementedError(
            f"implementation 'gpu': blocks must be of 16, 32, 64 or 128 tokens, found {block_q} and {block_k}"
        )
    y: jax.Array = gpu_sparse.sparse_softmax(gpu_sparse.Routed(block_q, block_k, interpret), q, k, v, lists)
    return xla_sparse.add_linear(y.swapaxes(1, 2).astype(jnp.float32), q, k, v, projection)


def _check(arrays: dict[str, jax.Array], maps: dict[str, FeatureMap | None]) -> None:
    width, dtypes = arrays["k"].shape[-1], [x.dtype for x in arrays.values()]
    if width not in WIDTHS:
        raise NotImplementedError(
            f"implementation 'gpu': the kernels take heads of {', '.join(map(str, WIDTHS))} channels, found {width}"
        )
    if len(set(dtypes)) > 1 or dtypes[0] not in BLOCK_SIZES:
        raise NotImplementedError(
            f"implementation 'gpu': {', '.join(arrays)} must be all bfloat16 or all float32, found "
            f"{', '.join(map(str, dtypes))}"
        )
    for name, feature_map in maps.items():
        if not isinstance(feature_map, PolynomialMap):
            raise NotImplementedError(
                f"implementation 'gpu': {name} is a {type(feature_map).__name__}; "
                "the kernels compute PolynomialMap alone"
            )


def _check_state(q: jax.Array, query_map: Any, state: tuple[jax.Array, jax.Array]) -> None:
    """Raises ValueError where the attention kernel would read beyond the ends of S and z, or leave out a part."""
    batch, _, heads, width = q.shape
    features = query_map.degree * width
    expected, found = [(batch, heads, features, width), (batch, heads, features)], [x.shape for x in state]
    if found != expected:
        raise ValueError(f"state must be S and z of query_map's {features} features, {expected}, found {found}")


def _options(k: jax.Array, num_softmax: int, stabilizer: str, blocks: BlockSizes | None, interpret: bool) -> Options:
    if blocks is None:
        blocks = BLOCK_SIZES[k.dtype]
        if k.dtype == jnp.bfloat16:
            blocks = blocks._replace(**tuning.lookup(tuning.current_chip(), k.shape[1], num_softmax))
    return Options(num_softmax, stabilizer == "max", blocks, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _state(options: Options, k, v, key_map, valid):
    """S and z of the suffix of k and v."""
    return summarize(options, k, v, valid, key_map)


def _state_forward(options, k, v, key_map, valid):
    return _state(options, k, v, key_map, valid), (k, v, key_map, valid)


def _state_backward(options, residuals, cotangents):
    *arrays, key_map, valid = residuals
    k_L, v_L, valid_L = jax.tree.map(lambda x: x[:, options.num_softmax :], (*arrays, valid))
    _, pullback = jax.vjp(partial(xla.linear_state, key_valid=valid_L), k_L, v_L, key_map)
    *gradients, d_map = pullback(cotangents)
    return *(jnp.pad(x, ((0, 0), (options.num_softmax, 0), (0, 0), (0, 0))) for x in gradients), d_map, None


_state.defvjp(_state_forward, _state_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, q, k, v, query_map, state, valid):
    """y of softmax over the prefix of k and v, and of the state, where there is one."""
    return attend(options, q, k, v, valid, query_map, state, residuals=False)[0]


def _attend_forward(options, q, k, v, query_map, state, valid):
    y, saved = attend(options, q, k, v, valid, query_map, state, residuals=True)
    return y, (q, k, v, query_map, state, valid, y, saved)


def _attend_backward(options, residuals, dy):
    q, k, v, query_map, state, valid, y, saved = residuals
    dy = dy.astype(jnp.float32)
    if query_map is None:
        dq, dk, dv = softmax_backward(options, q, k, v, valid, dy.astype(v.dtype), saved["lse"], head_dot(dy, y), None)
        return dq, dk, dv, None, None, None

    do = dy / saved["denominator"].swapaxes(1, 2)[..., None]  # the cotangent of both branches' numerators
    dn = -head_dot(do, y)
    _, pullback = jax.vjp(xla.read_out, q, query_map, *state)
    dq, d_map, *d_state = pullback((do.swapaxes(1, 2), dn))
    if options.num_softmax == 0:
        return dq, None, None, d_map, tuple(d_state), None

    mass = saved["mass"]
    dy_S = do * mass.swapaxes(1, 2)[..., None]
    delta = head_dot(dy_S, saved["y_S"])
    tops = None
    if options.row_max:
        d_log_mass = delta + mass * dn
        delta, tops = delta - d_log_mass, (saved["top"], d_log_mass)
    dq_S, *gradients = softmax_backward(options, q, k, v, valid, dy_S.astype(v.dtype), saved["lse"], delta, tops)
    rest = k.shape[1] - options.num_softmax
    dk, dv = (jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0))) for x in gradients)
    return dq + dq_S, dk, dv, d_map, tuple(d_state), None


_attend.defvjp(_attend_forward, _attend_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _zones(options: Options, bounds: tuple[int, ...], q, k, v, valid) -> Zones:
    return gpu_zones.softmax_zones(options, bounds, q, k, v, valid)


def _no_gradients(*_: Any) -> Any:
    raise NotImplementedError("implementation 'gpu': softmax_zones has no gradients; 'xla' has")


_zones.defvjp(_no_gradients, _no_gradients)
