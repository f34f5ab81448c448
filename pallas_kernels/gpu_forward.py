"""Forward of hybrid attention on GPUs: a kernel for the linear keys' state, and flash attention that reads it out.

The *state* kernel sums S and z over the suffix and computes phi_k itself. The *attention* kernel is flash attention
over the prefix; its last step reads the state out with phi_q.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import log, xla
from pallas_kernels.feature_map import ACTIVATIONS, PolynomialMap
from pallas_kernels.reference import EPSILON

WIDTHS = (16, 32, 64, 128)
# Tokens that one program of the state kernel sums over: few enough that the programs occupy a GPU, and enough that
# there are few partial sums.
STATE_CHUNK = 2048
# Bytes of weights that a program of the state kernel may read. Triton keeps them in shared memory (227 KB on Hopper),
# beside tiles of k and v.
STATE_WEIGHTS = 2**17
# The score of a masked key. It is finite, so that a tile of masked keys alone gives no NaN. The first valid key then
# scales the weights of such a tile to zero.
MASKED = -1e30
LOG2_E = math.log2(math.e)


class BlockSizes(NamedTuple):
    """Tokens of a tile, all powers of two.

    Attributes:
        query: queries, forward.
        key: keys, forward and for the state.
        backward: queries and keys, backward.
    """

    query: int
    key: int
    backward: int


BLOCK_SIZES = {jnp.dtype(jnp.bfloat16): BlockSizes(128, 64, 64), jnp.dtype(jnp.float32): BlockSizes(32, 32, 32)}


class Options(NamedTuple):
    """The static arguments of one call."""

    num_softmax: int
    row_max: bool
    blocks: BlockSizes
    interpret: bool


def attend(
    options: Options, q, k, v, valid, query_map: PolynomialMap | None, state, *, residuals: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """y [B, N, H, D] of softmax over the prefix and of `state`, (S, z), if there is one; and what the backward needs.

    The latter is empty without `residuals`. Where no key keeps softmax, k, v and valid are not read.
    """
    batch, num_queries, heads, width = q.shape
    num_softmax = options.num_softmax
    moved, flops = nbytes(q), 4 * batch * heads * num_queries * num_softmax * width
    if num_softmax:
        moved += nbytes((k, v)) * num_softmax // k.shape[1]
    else:
        k = v = valid = None
    if query_map is not None:
        query_map, state = _in_dtype(query_map, q.dtype), (state[0].astype(q.dtype), state[1])
        features = query_map.degree * width
        per_query = features * ((len(query_map.kernels) - 1) * features + 2 * width + 1)
        moved, flops = moved + nbytes((query_map, state)), flops + 2 * batch * heads * num_queries * per_query

    per_row = jax.ShapeDtypeStruct((batch, heads, num_queries), jnp.float32)
    outs = {"y": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    if residuals:
        outs |= {"lse": per_row} if num_softmax else {}
        outs |= {"denominator": per_row} if query_map is not None else {}
        if num_softmax and query_map is not None:
            outs |= {"y_S": outs["y"], "mass": per_row}
            outs |= {"top": jax.ShapeDtypeStruct(per_row.shape, jnp.int32)} if options.row_max else {}

    arguments = q, k, v, as_mask(valid), query_map, state
    found = call_kernel(
        partial(attention_kernel, options=options),
        (pl.cdiv(num_queries, options.blocks.query), heads, batch),
        arguments,
        input_specs(*arguments),
        outs,
        {name: head_spec(out, "bnhd" if name in ("y", "y_S") else "bhn") for name, out in outs.items()},
        pl.CostEstimate(
            flops=flops,
            transcendentals=batch * heads * num_queries * num_softmax,
            bytes_accessed=moved + nbytes(outs),
        ),
        options.interpret,
    )
    return found.pop("y"), found


def attention_kernel(q_ref, k_ref, v_ref, valid_ref, map_ref, state_refs, outs, *, options: Options):
    """Flash attention of one block of queries over the prefix, followed by the read-out of the suffix's state."""
    num_queries, width = q_ref.shape
    rows, in_range = block_range(pl.program_id(0), options.blocks.query, num_queries)
    q = load_rows(q_ref, rows, in_range)
    o, n = jnp.zeros(q.shape, jnp.float32), jnp.zeros(in_range.shape, jnp.float32)

    def tile(number, carry):
        o, n, highest, top = carry
        keys, attended = block_range(number, options.blocks.key, options.num_softmax)
        k, v = load_rows(k_ref, keys, attended), load_rows(v_ref, keys, attended)
        s = scores(q, k, attended_keys(valid_ref, keys, attended))
        o, n, best = add_tile(s, v, o, n, highest)
        if "top" in outs:
            top = jnp.where(best > highest, number * options.blocks.key + jnp.argmax(s, axis=1).astype(jnp.int32), top)
        return o, n, best, top

    if options.num_softmax:
        start = o, n, jnp.full_like(n, MASKED), jnp.zeros(n.shape, jnp.int32)
        o, n, highest, top = lax.fori_loop(0, pl.cdiv(options.num_softmax, options.blocks.key), tile, start)
        per_row = {"lse": highest + jnp.log2(n), "top": top}
        if "y_S" in outs:
            store_rows(outs["y_S"], rows, in_range, o / n[:, None])
        if map_ref is not None and not options.row_max:
            o, n = o / n[:, None], jnp.ones_like(n)
        per_row["mass"] = n
    else:
        per_row, n = {}, n + EPSILON

    if map_ref is not None:
        state_ref, z_ref = state_refs
        hidden = _hidden(map_ref, q)
        for slot in range(map_ref.degree):
            columns = pl.ds(slot * width, width)
            phi = _power(map_ref, hidden, slot)
            o += dot(phi.astype(q.dtype), state_ref[columns, :])
            n += (phi * z_ref[columns][None]).sum(axis=1)
    per_row["denominator"] = n
    store_rows(outs["y"], rows, in_range, o / n[:, None])
    for name in per_row.keys() & outs.keys():
        triton.store(outs[name].at[rows], per_row[name], mask=in_range)


def add_tile(s, v, o, n, highest):
    """Weighted values, sum of weights and largest score of every query after one more tile of scores."""
    best = jnp.maximum(highest, s.max(axis=1))
    p, shrink = jnp.exp2(s - best[:, None]), jnp.exp2(highest - best)
    return o * shrink[:, None] + dot(p.astype(v.dtype), v), n * shrink + p.sum(axis=1), best


def summarize(options: Options, k, v, valid, key_map: PolynomialMap) -> tuple[jax.Array, jax.Array]:
    """S [B, H, F, D] and z [B, H, F] of the suffix, float32. XLA computes those of a large map and of no keys."""
    batch, num_keys, heads, width = k.shape
    degree, length = key_map.degree, num_keys - options.num_softmax
    features = degree * width
    # S of all powers does not fit the registers, so every power has its own program, which computes all hidden layers.
    hidden = degree * sum(kernel[0].size for kernel in key_map.kernels[:-1])
    last = key_map.kernels[-1][0].size
    weights = (hidden + last) // degree * k.dtype.itemsize
    if weights > STATE_WEIGHTS:
        log.once(
            f"'xla' in place of a kernel: implementation 'gpu': that of the linear state holds {STATE_WEIGHTS // 1024} "
            f"KiB of a feature map's weights, found {weights // 1024} KiB per head and power"
        )
    if weights > STATE_WEIGHTS or length == 0:
        k_L, v_L, valid_L = jax.tree.map(lambda x: x[:, options.num_softmax :], (k, v, valid))
        return xla.linear_state(k_L, v_L, key_map, key_valid=valid_L)

    chunks = pl.cdiv(length, STATE_CHUNK)
    parts = (
        jax.ShapeDtypeStruct((batch, heads, chunks * degree, width, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, chunks * degree, width), jnp.float32),
    )
    specs = (
        pl.BlockSpec((None, None, None, width, width), lambda i, h, b: (b, h, i, 0, 0)),
        pl.BlockSpec((None, None, None, width), lambda i, h, b: (b, h, i, 0)),
    )
    arguments = k, v, as_mask(valid), _in_dtype(key_map, k.dtype)
    state, z = call_kernel(
        partial(state_kernel, options=options),
        (chunks * degree, heads, batch),
        arguments,
        input_specs(*arguments),
        parts,
        specs,
        pl.CostEstimate(
            flops=2 * batch * heads * length * (hidden + last + features * width + features),
            transcendentals=0,
            bytes_accessed=degree * (nbytes((k, v)) * length) // num_keys + nbytes((arguments[3], parts)),
        ),
        options.interpret,
    )
    state = state.reshape(batch, heads, chunks, features, width).sum(axis=2)
    return state, z.reshape(batch, heads, chunks, features).sum(axis=2)


def state_kernel(k_ref, v_ref, valid_ref, map_ref, state_ref, z_ref, *, options: Options):
    """phi_p^T v and phi_p summed over one chunk of the suffix, for one power p."""
    (num_keys, width), block = k_ref.shape, options.blocks.key
    chunk, slot = pl.program_id(0) // map_ref.degree, pl.program_id(0) % map_ref.degree
    first = options.num_softmax + chunk * STATE_CHUNK

    def tile(number, sums):
        keys, attended = block_range(number, block, num_keys, first)
        k, v = load_rows(k_ref, keys, attended), load_rows(v_ref, keys, attended)
        attended = attended_keys(valid_ref, keys, attended)
        phi = jnp.where(attended[:, None], _power(map_ref, _hidden(map_ref, k), slot), 0.0)
        return sums[0] + dot(phi.astype(v.dtype), v, trans_a=True), sums[1] + phi.sum(axis=0)

    start = jnp.zeros((width, width), jnp.float32), jnp.zeros((width,), jnp.float32)
    state_ref[...], z_ref[...] = lax.fori_loop(0, STATE_CHUNK // block, tile, start)


def scores(q, k, attended):
    """Scores in units of log 2, for exp2."""
    s = dot(q, k, trans_b=True) * (q.shape[1] ** -0.5 * LOG2_E)
    return jnp.where(attended[None, :], s, MASKED)


def _hidden(map_ref: PolynomialMap, x) -> list[jax.Array]:
    """The input of phi's last layer, in tiles as wide as the head, since sizes in Triton are powers of two."""
    tiles = [x]
    for layer in range(len(map_ref.kernels) - 1):
        tiles = [_layer(map_ref, layer, tiles, slot).astype(x.dtype) for slot in range(map_ref.degree)]
    return tiles


def _power(map_ref: PolynomialMap, hidden: list[jax.Array], slot) -> jax.Array:
    """Columns [slot * D, (slot + 1) * D] of phi, psi^(slot + 1); float32."""
    psi = _layer(map_ref, len(map_ref.kernels) - 1, hidden, slot)
    scale = jnp.exp(map_ref.log_scale[...])
    if isinstance(slot, int):
        return psi ** (slot + 1) * scale
    return lax.fori_loop(0, slot, lambda _, power: power * psi, psi) * scale


def _layer(map_ref: PolynomialMap, layer: int, tiles: list[jax.Array], slot) -> jax.Array:
    """Columns [slot * D, (slot + 1) * D] of a layer's output, for its input in tiles."""
    kernel, bias, width = map_ref.kernels[layer], map_ref.biases[layer], tiles[0].shape[1]
    columns = pl.ds(slot * width, width)
    products = [dot(tile, kernel[pl.ds(row * width, width), columns]) for row, tile in enumerate(tiles)]
    return ACTIVATIONS[map_ref.activation](sum(products[1:], products[0]) + bias[columns][None])


def dot(a, b, **transposed) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, precision=precision, **transposed)


def block_range(number, block: int, length: int, first=0):
    """The slice of block `number`, counted from token `first` on, and which of its tokens come before `length`."""
    start = first + number * block
    return pl.ds(start, block), start + lax.iota(jnp.int32, block) < length


def load_rows(ref, rows, in_range):
    return triton.load(ref.at[rows, :], mask=in_range[:, None], other=0.0)


def store_rows(ref, rows, in_range, values):
    triton.store(ref.at[rows, :], values.astype(ref.dtype), mask=in_range[:, None])


def attended_keys(valid_ref, keys, in_range):
    """Which keys of a block are in range and valid."""
    if valid_ref is None:
        return in_range
    return in_range & (triton.load(valid_ref.at[keys], mask=in_range, other=0) != 0)


def as_mask(valid: jax.Array | None) -> jax.Array | None:
    return None if valid is None else valid.astype(jnp.int32)


def _in_dtype(feature_map: PolynomialMap, dtype) -> PolynomialMap:
    """A map whose kernels have the dtype of the products. Biases and scales stay in float32."""
    kernels = tuple(kernel.astype(dtype) for kernel in feature_map.kernels)
    return PolynomialMap(kernels, feature_map.biases, feature_map.log_scale, feature_map.degree, feature_map.activation)


def input_specs(*arguments):
    """Block specs of q, k, v [B, N, H, D], key_valid, a map and (S, z), each recognised by its rank or type."""
    axes = {2: "bn", 4: "bnhd"}

    def specs(argument):
        if isinstance(argument, PolynomialMap):
            return jax.tree.map(lambda leaf: head_spec(leaf, "h" + "." * (leaf.ndim - 1)), argument)
        if isinstance(argument, tuple):
            return head_spec(argument[0], "bh.."), head_spec(argument[1], "bh.")
        return None if argument is None else head_spec(argument, axes[argument.ndim])

    return tuple(specs(argument) for argument in arguments)


def head_spec(x, axes: str) -> pl.BlockSpec:
    """The block spec for all of one head of one batch entry."""
    block = tuple(None if axis in "bh" else size for axis, size in zip(axes, x.shape, strict=True))
    return pl.BlockSpec(block, lambda i, h, b: tuple({"b": b, "h": h}.get(axis, 0) for axis in axes))


def head_specs(tree, axes: str):
    return jax.tree.map(lambda x: head_spec(x, axes), tree)


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def call_kernel(kernel, grid, arguments, in_specs, outs, out_specs, cost: pl.CostEstimate, interpret: bool):
    width = arguments[0].shape[-1]
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_shape=outs,
        out_specs=out_specs,
        cost_estimate=cost,
        compiler_params=triton.CompilerParams(num_warps=8 if width > 64 else 4, num_stages=2),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(*arguments)
