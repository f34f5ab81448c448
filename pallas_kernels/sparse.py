"""Sparse-linear attention: softmax to the key blocks with the best pooled scores, and linear attention to all keys.

This is SLA in the form in which its authors ship it, the basis of TurboDiffusion.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.api import IMPLEMENTATIONS, call_first, kernels_for
from pallas_kernels.xla_sparse import block_sparse_lse, linear_attention

GROUP = 32  # blocks


def sparse_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    projection: tuple[jax.Array, jax.Array],
    *,
    share: float,
    block_q: int,
    block_k: int,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention to a share of the key blocks, plus a projection of linear attention to every key.

    With phi the softmax over a head's channels and S_i the keys of the blocks that `routing` gives query i's block,

        y_i = softmax_{j in S_i}(q_i k_j / sqrt(D)) v_j
              + Proj(phi(q_i) sum_j phi(k_j)^T v_j / (1e-5 + phi(q_i) . sum_j phi(k_j))).

    Gradients are those at a fixed routing, which has none.

    Args:
        q: queries [B, N, H, D], not yet scaled.
        k, v: keys and values [B, M, H, D].
        projection: kernel [D, D] and bias [D] of Proj(x) = x @ kernel + bias, which all heads share; zeros at the
            start of training.
        share: of the key blocks that a query block attends to by softmax, rounded down, but at least one block.
        block_q, block_k: tokens of a block of queries and of keys; the last ones may be shorter.
        implementation: "xla", "reference" (O(N^2) memory), "tpu" or "gpu"; None chooses as `linear_state` does.

    Returns:
        [B, N, H, D] in v's dtype.

    Raises:
        ValueError: shapes that do not fit, a share outside of 0 to 1, blocks without tokens, an unknown implementation.
        NotImplementedError: arguments that the implementation does not support.
    """
    _check(q, k, share, block_q, block_k)
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {k.shape}, found {v.shape}")
    width = q.shape[-1]
    if [jnp.shape(x) for x in projection] != [(width, width), (width,)]:
        shapes = " and ".join(str(jnp.shape(x)) for x in projection)
        raise ValueError(f"projection must be [{width}, {width}] and [{width}], found {shapes}")
    if implementation is not None and implementation not in (names := [x for x in IMPLEMENTATIONS if x != "stock"]):
        raise ValueError(f"implementation must be one of {', '.join(names)}, found {implementation!r}")
    names = kernels_for(q.dtype) if implementation is None else (implementation,)
    lists = routing(q, k, share, block_q, block_k)
    blocks = {"block_q": block_q, "block_k": block_k}
    return call_first(names, "sparse_linear_attention", q, k, v, projection, lists, **blocks)


def sparse_branch_lse(
    q: jax.Array, k: jax.Array, v: jax.Array, *, share: float, block_q: int, block_k: int
) -> jax.Array:
    """The log-sum-exp [B, N, H], float32, of each query's scores with the keys of its blocks. By XLA; no gradients.

    Args and errors as of `sparse_linear_attention`.
    """
    lists = routing(q, k, share, block_q, block_k)
    return block_sparse_lse(q, k, v, lists, (block_q, block_k)).swapaxes(1, 2)


def linear_to_all_keys(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The linear branch of `sparse_linear_attention` before its projection, [B, N, H, D] in float32, by XLA."""
    return linear_attention(q, k, v).swapaxes(1, 2)


def routing(q: jax.Array, k: jax.Array, share: float, block_q: int, block_k: int) -> jax.Array:
    """The key blocks that each query block attends to by softmax, int32 [B, H, query blocks, top-k], ascending.

    They have the largest products of pooled queries and pooled keys: means over a block's tokens, in float32, of q and
    of k minus the mean key. top-k = int(share * key blocks), at least 1.

    Args:
        q, k: [B, N, H, D] and [B, M, H, D].
        share, block_q, block_k: as in `sparse_linear_attention`.

    Raises:
        ValueError: as `sparse_linear_attention` does.
    """
    _check(q, k, share, block_q, block_k)
    batch, _, heads, width = q.shape
    sums_q, sums_k = (_block_sums(jax.lax.stop_gradient(x), size) for x, size in ((q, block_q), (k, block_k)))
    mean_key = sums_k.sum(axis=1, keepdims=True) / k.shape[1]
    pooled_q = sums_q / _counts(q.shape[1], block_q)
    pooled_k = sums_k / _counts(k.shape[1], block_k) - mean_key
    pooled_q, pooled_k = (x.reshape(batch, -1, heads, width) for x in (pooled_q, pooled_k))
    scores_BxHxIxJ = jnp.einsum("bihd,bjhd->bhij", pooled_q, pooled_k, precision=jax.lax.Precision.HIGHEST)
    count = max(1, int(share * pooled_k.shape[1]))
    return jnp.sort(jax.lax.top_k(scores_BxHxIxJ, count)[1], axis=-1)


def _block_sums(x_BxNxHxD: jax.Array, block: int) -> jax.Array:
    """Sums over blocks of tokens, float32 [B, blocks, H * D].

    They are products with ones, of `GROUP` blocks at a time: TPUs take far longer to add rows.
    """
    batch, length, heads, width = x_BxNxHxD.shape
    x_BxNxE, group = x_BxNxHxD.reshape(batch, length, heads * width), GROUP * block

    def sums(x_BxGxNxE: jax.Array) -> jax.Array:
        count = x_BxGxNxE.shape[2]
        of_block = jnp.arange(count)[None] // block == jnp.arange(-(-count // block))[:, None]
        options = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        sums = jnp.einsum("in,bgne->bgie", of_block.astype(x_BxGxNxE.dtype), x_BxGxNxE, **options)
        return sums.reshape(batch, -1, heads * width)

    whole = length // group * group
    parts = [sums(x_BxNxE[:, :whole].reshape(batch, -1, group, heads * width))] if whole else []
    parts += [sums(x_BxNxE[:, None, whole:])] if whole < length else []
    return jnp.concatenate(parts, axis=1)


def _counts(length: int, block: int) -> jax.Array:
    """Tokens of every block, [1, blocks, 1]."""
    return jnp.minimum(block, length - jnp.arange(0, length, block))[None, :, None]


def _check(q: jax.Array, k: jax.Array, share: float, block_q: int, block_k: int) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be [B, N, H, D], found shape {q.shape}")
    if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        batch, _, heads, width = q.shape
        raise ValueError(f"k must be [{batch}, M, {heads}, {width}] to fit q {q.shape}, found shape {k.shape}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in 0..1, found {share}")
    if min(block_q, block_k) < 1:
        raise ValueError(f"block_q and block_k must be at least 1 token, found {block_q} and {block_k}")
