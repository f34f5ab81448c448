"""Hybrid attention built on the softmax kernels that JAX ships; only for stabilizer "lse".

With c = LSE, the softmax branch is plain attention over the prefix, y_S, and y = (y_S + phi_q S) / (1 + phi_q z).
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import xla
from pallas_kernels.feature_map import FeatureMap

CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)
# Tokens that the TPU kernel fetches at a time: the fastest sizes that fit every TPU. Its default, 128, is far slower.
QUERY_BLOCK, KEY_BLOCK = 1024, 2048


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
    platform: str = "cpu",
) -> jax.Array:
    """Eq. 5 of Attention Surgery; see `pallas_kernels.hybrid_attention`.

    Args:
        platform: "gpu" takes cuDNN if the dtype allows it, "tpu" takes `flash_attention` of `jax.experimental.pallas`.
            Every other platform, and float32 on GPU, takes `jax.nn.dot_product_attention`, with all scores in memory.

    Raises:
        NotImplementedError: stabilizer "max" in a hybrid, or key_valid beside softmax keys.
    """
    if stabilizer == "max" and 0 < num_softmax < k.shape[1]:
        raise NotImplementedError(
            "implementation 'stock': stock attention returns no row maximum, which stabilizer 'max' of a hybrid needs; "
            "take stabilizer 'lse' or another implementation"
        )
    if key_valid is not None and num_softmax:
        raise NotImplementedError(
            "implementation 'stock': stock attention does not mask keys; take another for key_valid"
        )
    prefix = k[:, :num_softmax], v[:, :num_softmax]
    if num_softmax == k.shape[1]:
        return _softmax(q, *prefix, platform)
    if num_softmax == 0:
        return xla.hybrid_attention(q, k, v, query_map, key_map, num_softmax=0, key_valid=key_valid)
    assert query_map is not None and key_map is not None
    state = xla.linear_state(k[:, num_softmax:], v[:, num_softmax:], key_map)
    o_BxHxNxD, n_BxHxN = xla.read_out(q, query_map, *state)
    y_S_BxNxHxD = _softmax(q, *prefix, platform).astype(jnp.float32)
    y_BxNxHxD = (y_S_BxNxHxD + o_BxHxNxD.swapaxes(1, 2)) / (1 + n_BxHxN.swapaxes(1, 2)[..., None])
    return y_BxNxHxD.astype(v.dtype)


def _softmax(q: jax.Array, k: jax.Array, v: jax.Array, platform: str) -> jax.Array:
    """Softmax attention to every key: [B, N, H, D]."""
    if platform == "tpu":
        return _flash(q, k, v)
    return jax.nn.dot_product_attention(
        q, k, v, implementation="cudnn" if platform == "gpu" and q.dtype in CUDNN_DTYPES else None
    )


def _flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """jax's kernel for TPU. Lengths are padded to whole blocks, and padding is a separate segment, which is masked."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    q_BxHxTxD, q_block = _whole_blocks(q, QUERY_BLOCK)
    (k_BxHxSxD, k_block), (v_BxHxSxD, _) = (_whole_blocks(x, KEY_BLOCK) for x in (k, v))
    segments = None
    if q_BxHxTxD.shape[2] > q.shape[1] or k_BxHxSxD.shape[2] > k.shape[1]:
        padding = lambda padded, length: jnp.broadcast_to(
            (jnp.arange(padded.shape[2]) >= length).astype(jnp.int32), (padded.shape[0], padded.shape[2])
        )
        segments = flash.SegmentIds(padding(q_BxHxTxD, q.shape[1]), padding(k_BxHxSxD, k.shape[1]))
    q_inner, k_inner = math.gcd(q_block, 512), math.gcd(k_block, 1024)
    blocks = flash.BlockSizes(
        block_b=1,
        block_q=q_block,
        **dict.fromkeys(("block_q_major_dkv", "block_q_dkv", "block_q_dq"), q_inner),
        **dict.fromkeys(("block_k_major", "block_k_major_dkv", "block_k_major_dq"), k_block),
        **dict.fromkeys(("block_k", "block_k_dkv", "block_k_dq"), k_inner),
    )
    y_BxHxTxD = flash.flash_attention(
        q_BxHxTxD, k_BxHxSxD, v_BxHxSxD, segment_ids=segments, sm_scale=q.shape[-1] ** -0.5, block_sizes=blocks
    )
    return y_BxHxTxD[:, :, : q.shape[1]].swapaxes(1, 2)


def _whole_blocks(x_BxNxHxD: jax.Array, largest: int) -> tuple[jax.Array, int]:
    """x as [B, H, T, D], padded so that T is a whole number of blocks, and the size of a block, at most `largest`."""
    length = x_BxNxHxD.shape[1]
    block = min(largest, -(-length // 128) * 128)
    padding = -length % block
    return jnp.pad(x_BxNxHxD.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0))), block
