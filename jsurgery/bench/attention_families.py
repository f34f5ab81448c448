"""Attention in chunks and sparse-linear attention as contenders of `bench attention`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jsurgery.attention.kinds.sparse import PUBLISHED_BLOCKS
from jsurgery.bench.attention_programs import AttentionShape, arguments, program
from jsurgery.errors import InputError
from pallas_kernels.chunked import chunked_attention
from pallas_kernels.sparse import sparse_linear_attention


def families(
    size: AttentionShape, chunked: tuple[int, int] | None, sparse: float | None, implementation: str | None, passes: str
) -> list[dict[str, Any]]:
    """{"name", "rate", "forward_flops", "memory_bytes", "run"} of causal chunks and of sparse-linear attention.

    `chunked` is (tokens of a chunk, tokens of the overlap); `sparse` the share of key blocks with softmax. None leaves
    out either. Raises InputError where the implementation does not support it.
    """
    contenders = []
    if chunked is not None:
        chunk, overlap = chunked
        options = {"chunk": chunk, "overlap": overlap, "causal": True, "stabilizer": size.stabilizer}
        attend = partial(chunked_attention, **options, implementation=implementation)
        inputs, flops = arguments(size, "linear"), chunked_flops(size, chunk, overlap)
        contenders.append((f"chunks {chunk}+{overlap}", attend, inputs, flops))
    if sparse is not None:
        blocks = dict(zip(("block_q", "block_k"), PUBLISHED_BLOCKS, strict=True))
        attend = partial(sparse_linear_attention, share=sparse, **blocks, implementation=implementation)
        width, dtype = size.head_dim, jnp.float32
        kernel = jax.random.normal(jax.random.key(1), (width, width), dtype) * width**-0.5
        inputs = *arguments(size, 1)[:3], (kernel, jnp.zeros(width, dtype))
        contenders.append((f"sparse {sparse:g}", attend, inputs, sparse_flops(size, sparse)))
    try:
        return [
            {"name": name, "rate": None, "forward_flops": flops, **program(attend, inputs, passes)}
            for name, attend, inputs, flops in contenders
        ]
    except NotImplementedError as error:
        raise InputError(f"--implementation={implementation}: {error}") from None


def chunked_flops(size: AttentionShape, chunk: int, overlap: int) -> int:
    """FLOPs of a forward: scores and values of every window, and the linear branch with its feature maps."""
    starts = range(0, size.tokens, chunk)
    pairs = sum(min(chunk, size.tokens - t) * (min(t + chunk, size.tokens) - max(t - overlap, 0)) for t in starts)
    return 4 * pairs * size.heads * size.head_dim + size.flops("linear")


def sparse_flops(size: AttentionShape, share: float) -> int:
    """FLOPs of a forward: scores and values of the chosen blocks; the linear branch's state and its read-out."""
    block_k = PUBLISHED_BLOCKS[1]
    chosen = max(1, int(share * -(-size.tokens // block_k))) * block_k
    return 4 * size.tokens * size.heads * size.head_dim * (min(chosen, size.tokens) + size.head_dim)
