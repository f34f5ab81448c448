"""Loops over heads and over chunks of tokens, in which XLA computes attention.

On CPU a loop cuts each head out of the tokens in its turn: a tile of scores that fits the cache is several times faster
there than one batched product.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# The number of scores, or of features, in a head's tile; and the fewest tokens of a tile, however many keys there are.
TILE = 2**19
MIN_TOKENS = 256
CACHE = 4 * TILE  # numbers of all heads that a CPU's cache holds: a loop over heads is slower then

dot = partial(jnp.dot, preferred_element_type=jnp.float32)

# The axes over which `over` runs, by the kind of input: batch and head, or the head alone. None: the input has none.
TOKENS, MASK, ROWS = (0, 2), (0, None), (0, 1)  # [B, N, H, ...], [B, N], [B, H, ...]
HEAD_OF_TOKENS, HEAD_OF_MASK, HEAD_OF_ROWS, HEAD_OF_MAP = (2,), (None,), (1,), (0,)


def over(function: Callable, axes: Sequence[tuple[int | None, ...]], *inputs, numbers: int):
    """Runs `function` over the given axes of each input's leaves, which become the first axes of the results.

    On CPU it is a loop in float32, unless all `numbers`, its scores or features, fit the cache. Then, and
    elsewhere, it is a batched call. `axes` has a tuple for each input, all of one length.
    """
    batched, depth = function, len(axes[0])
    for level in reversed(range(depth)):
        # The outer vmaps have removed `level` axes by then, all of which came before this one.
        left = tuple(None if (axis := each[level]) is None else axis - level for each in axes)
        batched = jax.vmap(batched, in_axes=left)
    batched = jax.jit(batched, inline=True)  # traced once, for its shapes and for both platforms
    expected = jax.eval_shape(batched, *inputs)
    lead = jax.tree.leaves(expected)[0].shape[:depth]

    def looped(*inputs):
        def one(number):
            index = jnp.unravel_index(number, lead)

            def cut(x, axes):
                chosen = {axis: i for axis, i in zip(axes, index, strict=True) if axis is not None}
                starts = [chosen.get(axis, 0) for axis in range(x.ndim)]
                sizes = [1 if axis in chosen else size for axis, size in enumerate(x.shape)]
                return _float32(lax.dynamic_slice(x, starts, sizes).squeeze(tuple(chosen)))

            return function(*(jax.tree.map(partial(cut, axes=a), x) for x, a in zip(inputs, axes, strict=True)))

        outs = lax.map(one, jnp.arange(math.prod(lead)))
        return jax.tree.map(lambda x, e: x.reshape(e.shape).astype(e.dtype), outs, expected)

    def together(*inputs):
        outs = batched(*jax.tree.map(_float32, inputs))
        return jax.tree.map(lambda x, e: x.astype(e.dtype), outs, expected)

    return lax.platform_dependent(*inputs, cpu=together if numbers <= CACHE else looped, default=batched)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def over_chunks(
    chunk: Callable, carry, rows: tuple[jax.Array, ...], numbers_per_row: int, fewest_rows: int | None = None
):
    """`lax.scan` of `chunk` over equal pieces of rows [N, ...], padded with zeros (False) at the end.

    `numbers_per_row` is how many scores or features a row has; it determines the length of a piece, which is at least
    `fewest_rows`, or else `MIN_TOKENS`.
    """
    length = rows[0].shape[0]
    chunks = max(1, -(-length // max(fewest_rows or MIN_TOKENS, TILE // numbers_per_row)))
    if chunks == 1:
        return chunk(carry, rows)
    size = -(-length // chunks)

    def split(x):
        padding = [(0, chunks * size - length)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape((chunks, size, *x.shape[1:]))

    carry, outs = lax.scan(chunk, carry, jax.tree.map(split, rows))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], outs)


def over_examples(function: Callable, in_axes: tuple[int, ...], out_axes: Any, *inputs: jax.Array):
    """`jax.vmap` over examples. A single one has no batch axis within: XLA for CPUs then makes no transposed copies."""
    if inputs[0].shape[in_axes[0]] > 1:
        return jax.vmap(function, in_axes, out_axes)(*inputs)
    outs = function(*(x.squeeze(axis) for x, axis in zip(inputs, in_axes, strict=True)))
    return jax.tree.map(jnp.expand_dims, outs, out_axes)


def swap(tree):
    """Every leaf with its first two axes exchanged."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)


def as_tokens(x_HxNxBxD: jax.Array) -> jax.Array:
    """[B, N, H, D]."""
    return x_HxNxBxD.transpose(2, 1, 0, 3)
