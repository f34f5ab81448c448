"""Hybrid attention on GPUs: the public functions around the Pallas kernels, which Triton compiles, and gradients.

The kernels themselves are in `gpu_forward` and `gpu_backward`. The backward of the linear branch is a chain of matrix
products, which XLA runs in chunks.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import tuning, xla
from pallas_kernels.feature_map import FeatureMap, PolynomialMap
from pallas_kernels.gpu_backward import head_dot, softmax_backward
from pallas_kernels.gpu_forward import BLOCK_SIZES, WIDTHS, BlockSizes, Options, attend


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
    """
    _check(q, k, v, query_map, key_map, num_softmax)
    maps = None if num_softmax == k.shape[1] else (query_map, key_map)
    if block_sizes is None:
        block_sizes = BLOCK_SIZES[q.dtype]
        if q.dtype == jnp.bfloat16:
            block_sizes = block_sizes._replace(**tuning.lookup(tuning.current_chip(), k.shape[1], num_softmax))
    return _attend(Options(num_softmax, stabilizer == "max", block_sizes, interpret), q, k, v, maps, key_valid)


def _check(q, k, v, query_map, key_map, num_softmax: int) -> None:
    if q.shape[-1] not in WIDTHS:
        raise NotImplementedError(
            f"implementation 'gpu': the kernels take heads of {', '.join(map(str, WIDTHS))} channels, "
            f"found {q.shape[-1]}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in BLOCK_SIZES:
        raise NotImplementedError(
            "implementation 'gpu': q, k and v must be all bfloat16 or all float32, found "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    for name, feature_map in (("query_map", query_map), ("key_map", key_map)):
        if num_softmax < k.shape[1] and not isinstance(feature_map, PolynomialMap):
            raise NotImplementedError(
                f"implementation 'gpu': {name} is a {type(feature_map).__name__}; "
                "the kernels compute PolynomialMap alone"
            )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, q, k, v, maps, valid):
    return attend(options, q, k, v, maps, valid, residuals=False)[0]


def _attend_forward(options, q, k, v, maps, valid):
    y, saved, sums = attend(options, q, k, v, maps, valid, residuals=True)
    return y, (q, k, v, maps, valid, y, saved, sums)


def _attend_backward(options, residuals, dy):
    q, k, v, maps, valid, y, saved, sums = residuals
    num_softmax = options.num_softmax
    dy = dy.astype(jnp.float32)
    if maps is None:
        delta = head_dot(dy, y)
        dq, dk, dv = softmax_backward(options, q, k, v, valid, dy.astype(v.dtype), saved["lse"], delta, None)
        return dq, dk, dv, None, None

    query_map, key_map = maps
    do = dy / saved["denominator"].swapaxes(1, 2)[..., None]  # the cotangent of both branches' numerators
    dn = -head_dot(do, y)
    _, read_pullback = jax.vjp(xla.read_out, q, query_map, *sums)
    dq_L, d_query_map, *d_sums = read_pullback((do.swapaxes(1, 2), dn))
    k_L, v_L, valid_L = jax.tree.map(lambda x: x[:, num_softmax:], (k, v, valid))
    _, state_pullback = jax.vjp(partial(xla.linear_state, key_valid=valid_L), k_L, v_L, key_map)
    dk_L, dv_L, d_key_map = state_pullback(tuple(d_sums))
    if num_softmax == 0:
        return dq_L, dk_L, dv_L, (d_query_map, d_key_map), None

    mass = saved["mass"]
    dy_S = do * mass.swapaxes(1, 2)[..., None]
    delta = head_dot(dy_S, saved["y_S"])
    tops = None
    if options.row_max:
        d_log_mass = delta + mass * dn
        delta, tops = delta - d_log_mass, (saved["top"], d_log_mass)
    dq_S, dk_S, dv_S = softmax_backward(options, q, k, v, valid, dy_S.astype(v.dtype), saved["lse"], delta, tops)
    dk, dv = jnp.concatenate([dk_S, dk_L], axis=1), jnp.concatenate([dv_S, dv_L], axis=1)
    return dq_S + dq_L, dk, dv, (d_query_map, d_key_map), None


_attend.defvjp(_attend_forward, _attend_backward)
