"""Hybrid attention on GPUs, as Pallas kernels that Triton compiles.

Forward, a *state* kernel sums S and z over the suffix and computes phi_k itself. An *attention* kernel is flash
attention over the prefix; its last step reads the state out with phi_q. Backward, there are two flash kernels, one for
the queries and one for the prefix's keys and values. The backward of the linear branch is a chain of matrix products,
which XLA runs in chunks.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import tuning, xla
from pallas_kernels.feature_map import ACTIVATIONS, FeatureMap, PolynomialMap
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
    return _forward(options, q, k, v, maps, valid, residuals=False)[0]


def _attend_forward(options, q, k, v, maps, valid):
    y, saved, sums = _forward(options, q, k, v, maps, valid, residuals=True)
    return y, (q, k, v, maps, valid, y, saved, sums)


def _attend_backward(options, residuals, dy):
    q, k, v, maps, valid, y, saved, sums = residuals
    num_softmax = options.num_softmax
    dy = dy.astype(jnp.float32)
    if maps is None:
        delta = _head_dot(dy, y)
        dq, dk, dv = _softmax_backward(options, q, k, v, valid, dy.astype(v.dtype), saved["lse"], delta, None)
        return dq, dk, dv, None, None

    query_map, key_map = maps
    do = dy / saved["denominator"].swapaxes(1, 2)[..., None]  # the cotangent of both branches' numerators
    dn = -_head_dot(do, y)
    _, read_pullback = jax.vjp(xla.read_out, q, query_map, *sums)
    dq_L, d_query_map, *d_sums = read_pullback((do.swapaxes(1, 2), dn))
    k_L, v_L, valid_L = jax.tree.map(lambda x: x[:, num_softmax:], (k, v, valid))
    _, state_pullback = jax.vjp(partial(xla.linear_state, key_valid=valid_L), k_L, v_L, key_map)
    dk_L, dv_L, d_key_map = state_pullback(tuple(d_sums))
    if num_softmax == 0:
        return dq_L, dk_L, dv_L, (d_query_map, d_key_map), None

    mass = saved["mass"]
    dy_S = do * mass.swapaxes(1, 2)[..., None]
    delta = _head_dot(dy_S, saved["y_S"])
    tops = None
    if options.row_max:
        d_log_mass = delta + mass * dn
        delta, tops = delta - d_log_mass, (saved["top"], d_log_mass)
    dq_S, dk_S, dv_S = _softmax_backward(options, q, k, v, valid, dy_S.astype(v.dtype), saved["lse"], delta, tops)
    dk, dv = jnp.concatenate([dk_S, dk_L], axis=1), jnp.concatenate([dv_S, dv_L], axis=1)
    return dq_S + dq_L, dk, dv, (d_query_map, d_key_map), None


_attend.defvjp(_attend_forward, _attend_backward)


def _head_dot(x_BxNxHxD: jax.Array, y_BxNxHxD: jax.Array) -> jax.Array:
    """The dot products of x and y over channels, [B, H, N] in float32."""
    return jnp.einsum("bnhd,bnhd->bhn", x_BxNxHxD, y_BxNxHxD.astype(jnp.float32))


def _forward(options: Options, q, k, v, maps, valid, residuals: bool):
    """(y, what the backward needs besides if `residuals`, (S, z))."""
    batch, num_queries, heads, width = q.shape
    num_softmax = options.num_softmax
    query_map, sums, flops, read = None, None, 0, 0
    if maps is not None:
        query_map, key_map = (_in_dtype(feature_map, q.dtype) for feature_map in maps)
        sums = _state(options, k, v, key_map, valid)
        features = query_map.degree * width
        flops = 2 * batch * heads * num_queries * features * ((len(query_map.kernels) - 1) * features + 2 * width + 1)
        read = _nbytes((query_map, sums))

    per_row = jax.ShapeDtypeStruct((batch, heads, num_queries), jnp.float32)
    outs = {"y": jax.ShapeDtypeStruct(q.shape, v.dtype)}
    if residuals:
        outs |= {"lse": per_row} if num_softmax else {}
        outs |= {"denominator": per_row} if maps else {}
        if num_softmax and maps:
            outs |= {"y_S": outs["y"], "mass": per_row}
            outs |= {"top": jax.ShapeDtypeStruct(per_row.shape, jnp.int32)} if options.row_max else {}
    specs = {name: _spec(out, "bnhd" if name in ("y", "y_S") else "bhn") for name, out in outs.items()}

    pairs = batch * heads * num_queries * num_softmax
    arguments = (q, k, v, _mask(valid), query_map, None if sums is None else (sums[0].astype(q.dtype), sums[1]))
    found = _call(
        partial(_attention_kernel, options=options),
        (pl.cdiv(num_queries, options.blocks.query), heads, batch),
        arguments,
        _input_specs(*arguments),
        outs,
        specs,
        pl.CostEstimate(
            flops=flops + 4 * pairs * width,
            transcendentals=pairs,
            bytes_accessed=_nbytes((q, outs)) + (_nbytes((k, v)) * num_softmax) // k.shape[1] + read,
        ),
        options.interpret,
    )
    return found.pop("y"), found, sums


def _attention_kernel(q_ref, k_ref, v_ref, valid_ref, map_ref, sums_ref, outs, *, options: Options):
    """Flash attention of one block of queries over the prefix, followed by the read-out of the suffix's state."""
    num_queries, width = q_ref.shape
    rows, in_range = _range(pl.program_id(0), options.blocks.query, num_queries)
    q = _load_rows(q_ref, rows, in_range)
    o, n = jnp.zeros(q.shape, jnp.float32), jnp.zeros(in_range.shape, jnp.float32)

    def tile(number, carry):
        o, n, highest, top = carry
        keys, attended = _range(number, options.blocks.key, options.num_softmax)
        k, v = _load_rows(k_ref, keys, attended), _load_rows(v_ref, keys, attended)
        s = _scores(q, k, _attended(valid_ref, keys, attended))
        best = jnp.maximum(highest, s.max(axis=1))
        if "top" in outs:
            top = jnp.where(best > highest, number * options.blocks.key + jnp.argmax(s, axis=1).astype(jnp.int32), top)
        p, shrink = jnp.exp2(s - best[:, None]), jnp.exp2(highest - best)
        return o * shrink[:, None] + _dot(p.astype(v.dtype), v), n * shrink + p.sum(axis=1), best, top

    if options.num_softmax:
        start = o, n, jnp.full_like(n, MASKED), jnp.zeros(n.shape, jnp.int32)
        o, n, highest, top = lax.fori_loop(0, pl.cdiv(options.num_softmax, options.blocks.key), tile, start)
        per_row = {"lse": highest + jnp.log2(n), "top": top}
        if "y_S" in outs:
            _store_rows(outs["y_S"], rows, in_range, o / n[:, None])
        if map_ref is not None and not options.row_max:
            o, n = o / n[:, None], jnp.ones_like(n)
        per_row["mass"] = n
    else:
        per_row, n = {}, n + EPSILON

    if map_ref is not None:
        state_ref, z_ref = sums_ref
        hidden = _hidden(map_ref, q)
        for slot in range(map_ref.degree):
            columns = pl.ds(slot * width, width)
            phi = _power(map_ref, hidden, slot)
            o += _dot(phi.astype(q.dtype), state_ref[columns, :])
            n += (phi * z_ref[columns][None]).sum(axis=1)
    per_row["denominator"] = n
    _store_rows(outs["y"], rows, in_range, o / n[:, None])
    for name in per_row.keys() & outs.keys():
        triton.store(outs[name].at[rows], per_row[name], mask=in_range)


def _state(options: Options, k, v, key_map: PolynomialMap, valid) -> tuple[jax.Array, jax.Array]:
    """S [B, H, F, D] and z [B, H, F] of the suffix, float32."""
    batch, num_keys, heads, width = k.shape
    degree, length = key_map.degree, num_keys - options.num_softmax
    features = degree * width
    # S of all powers does not fit the registers, so every power has its own program, which computes all hidden layers.
    hidden = degree * sum(kernel[0].size for kernel in key_map.kernels[:-1])
    last = key_map.kernels[-1][0].size
    if (hidden + last) // degree * k.dtype.itemsize > STATE_WEIGHTS:
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
    arguments = k, v, _mask(valid), key_map
    state, z = _call(
        partial(_state_kernel, options=options),
        (chunks * degree, heads, batch),
        arguments,
        _input_specs(*arguments),
        parts,
        specs,
        pl.CostEstimate(
            flops=2 * batch * heads * length * (hidden + last + features * width + features),
            transcendentals=0,
            bytes_accessed=degree * (_nbytes((k, v)) * length) // num_keys + _nbytes((key_map, parts)),
        ),
        options.interpret,
    )
    state = state.reshape(batch, heads, chunks, features, width).sum(axis=2)
    return state, z.reshape(batch, heads, chunks, features).sum(axis=2)


def _state_kernel(k_ref, v_ref, valid_ref, map_ref, state_ref, z_ref, *, options: Options):
    """phi_p^T v and phi_p summed over one chunk of the suffix, for one power p."""
    (num_keys, width), block = k_ref.shape, options.blocks.key
    chunk, slot = pl.program_id(0) // map_ref.degree, pl.program_id(0) % map_ref.degree
    first = options.num_softmax + chunk * STATE_CHUNK

    def tile(number, sums):
        keys, attended = _range(number, block, num_keys, first)
        k, v = _load_rows(k_ref, keys, attended), _load_rows(v_ref, keys, attended)
        attended = _attended(valid_ref, keys, attended)
        phi = jnp.where(attended[:, None], _power(map_ref, _hidden(map_ref, k), slot), 0.0)
        return sums[0] + _dot(phi.astype(v.dtype), v, trans_a=True), sums[1] + phi.sum(axis=0)

    start = jnp.zeros((width, width), jnp.float32), jnp.zeros((width,), jnp.float32)
    state_ref[...], z_ref[...] = lax.fori_loop(0, STATE_CHUNK // block, tile, start)


def _softmax_backward(options: Options, q, k, v, valid, dy, lse, delta, tops):
    """Cotangents of q and of the prefix of k and v. `dy` is the cotangent of the softmax branch's output.

    `tops` are, for every query, the key with the largest score and the cotangent of log n_S, which goes to that score;
    None if c_i has no gradient of its own.
    """
    batch, num_queries, heads, width = q.shape
    num_softmax, block = options.num_softmax, options.blocks.backward
    per_row = (lse, delta, tops)
    arguments = (q, k, v, _mask(valid), dy, per_row)
    in_specs = (*_input_specs(q, k, v, arguments[3]), _spec(dy, "bnhd"), _specs(per_row, "bhn"))
    dq = jax.ShapeDtypeStruct(q.shape, q.dtype)
    dk = dv = jax.ShapeDtypeStruct((batch, num_softmax, heads, width), k.dtype)
    pairs = batch * heads * num_queries * num_softmax
    moved = _nbytes((q, dy, per_row)) + _nbytes((dk, dv))

    def call(kernel: Callable, length: int, outs, matmuls: int):
        return _call(
            partial(kernel, options=options),
            (pl.cdiv(length, block), heads, batch),
            arguments,
            in_specs,
            outs,
            _specs(outs, "bnhd"),
            pl.CostEstimate(
                flops=2 * matmuls * pairs * width, transcendentals=pairs, bytes_accessed=moved + _nbytes(outs)
            ),
            options.interpret,
        )

    (dq,) = call(_query_gradient_kernel, num_queries, (dq,), 3)
    return dq, *call(_key_gradient_kernel, num_softmax, (dk, dv), 4)


def _query_gradient_kernel(q_ref, k_ref, v_ref, valid_ref, dy_ref, per_row_ref, dq_ref, *, options: Options):
    (num_queries, width), block = q_ref.shape, options.blocks.backward
    rows, in_range = _range(pl.program_id(0), block, num_queries)
    q, dy, per_row = _load_queries(q_ref, dy_ref, per_row_ref, rows, in_range)

    def tile(number, dq):
        keys, attended = _range(number, block, options.num_softmax)
        k, v = _load_rows(k_ref, keys, attended), _load_rows(v_ref, keys, attended)
        attended = _attended(valid_ref, keys, attended)
        _, ds = _tile_gradient(q, k, v, dy, per_row, attended, number * block)
        return dq + _dot(ds.astype(k.dtype), k)

    dq = lax.fori_loop(0, pl.cdiv(options.num_softmax, block), tile, jnp.zeros(q.shape, jnp.float32))
    _store_rows(dq_ref, rows, in_range, dq * width**-0.5)


def _key_gradient_kernel(q_ref, k_ref, v_ref, valid_ref, dy_ref, per_row_ref, dk_ref, dv_ref, *, options: Options):
    (num_queries, width), block = q_ref.shape, options.blocks.backward
    number = pl.program_id(0)
    keys, in_range = _range(number, block, options.num_softmax)
    k, v = _load_rows(k_ref, keys, in_range), _load_rows(v_ref, keys, in_range)
    attended = _attended(valid_ref, keys, in_range)

    def tile(queries, sums):
        rows, exist = _range(queries, block, num_queries)
        q, dy, per_row = _load_queries(q_ref, dy_ref, per_row_ref, rows, exist)
        p, ds = _tile_gradient(q, k, v, dy, per_row, attended, number * block)
        dk = sums[0] + _dot(ds.astype(q.dtype), q, trans_a=True)
        return dk, sums[1] + _dot(p.astype(dy.dtype), dy, trans_a=True)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, pl.cdiv(num_queries, block), tile, (zeros, zeros))
    _store_rows(dk_ref, keys, in_range, dk * width**-0.5)
    _store_rows(dv_ref, keys, in_range, dv)


def _tile_gradient(q, k, v, dy, per_row, attended, first_key):
    """Softmax weights and the scores' cotangent of one tile. Queries past the end are zero; so is their cotangent."""
    lse, delta, tops = per_row
    p = jnp.exp2(_scores(q, k, attended) - lse[:, None])
    ds = p * (_dot(dy, v, trans_b=True) - delta[:, None])
    if tops is not None:
        top, d_log_mass = tops
        is_top = lax.broadcasted_iota(jnp.int32, p.shape, 1) + first_key == top[:, None]
        ds -= jnp.where(is_top, d_log_mass[:, None], 0.0)
    return p, ds


def _scores(q, k, attended):
    """Scores in units of log 2, for exp2."""
    s = _dot(q, k, trans_b=True) * (q.shape[1] ** -0.5 * LOG2_E)
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
    products = [_dot(tile, kernel[pl.ds(row * width, width), columns]) for row, tile in enumerate(tiles)]
    return ACTIVATIONS[map_ref.activation](sum(products[1:], products[0]) + bias[columns][None])


def _dot(a, b, **transposed) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, precision=precision, **transposed)


def _range(number, block: int, length: int, first=0):
    """The slice of block `number`, counted from token `first` on, and which of its tokens come before `length`."""
    start = first + number * block
    return pl.ds(start, block), start + lax.iota(jnp.int32, block) < length


def _load_rows(ref, rows, in_range):
    return triton.load(ref.at[rows, :], mask=in_range[:, None], other=0.0)


def _store_rows(ref, rows, in_range, values):
    triton.store(ref.at[rows, :], values.astype(ref.dtype), mask=in_range[:, None])


def _load_queries(q_ref, dy_ref, per_row_ref, rows, in_range):
    load = lambda ref: triton.load(ref.at[rows], mask=in_range, other=0)
    return _load_rows(q_ref, rows, in_range), _load_rows(dy_ref, rows, in_range), jax.tree.map(load, per_row_ref)


def _attended(valid_ref, keys, in_range):
    """Which keys of a block are in range and valid."""
    if valid_ref is None:
        return in_range
    return in_range & (triton.load(valid_ref.at[keys], mask=in_range, other=0) != 0)


def _mask(valid: jax.Array | None) -> jax.Array | None:
    return None if valid is None else valid.astype(jnp.int32)


def _in_dtype(feature_map: PolynomialMap, dtype) -> PolynomialMap:
    """A map whose kernels have the dtype of the products. Biases and scales stay in float32."""
    kernels = tuple(kernel.astype(dtype) for kernel in feature_map.kernels)
    return PolynomialMap(kernels, feature_map.biases, feature_map.log_scale, feature_map.degree, feature_map.activation)


def _input_specs(*arguments):
    """Block specs of q, k, v [B, N, H, D], key_valid, a map and (S, z), each recognised by its rank or type."""
    axes = {2: "bn", 4: "bnhd"}

    def specs(argument):
        if isinstance(argument, PolynomialMap):
            return jax.tree.map(lambda leaf: _spec(leaf, "h" + "." * (leaf.ndim - 1)), argument)
        if isinstance(argument, tuple):
            return _spec(argument[0], "bh.."), _spec(argument[1], "bh.")
        return None if argument is None else _spec(argument, axes[argument.ndim])

    return tuple(specs(argument) for argument in arguments)


def _spec(x, axes: str) -> pl.BlockSpec:
    """The block spec for all of one head of one batch entry."""
    block = tuple(None if axis in "bh" else size for axis, size in zip(axes, x.shape, strict=True))
    return pl.BlockSpec(block, lambda i, h, b: tuple({"b": b, "h": h}.get(axis, 0) for axis in axes))


def _specs(tree, axes: str):
    return jax.tree.map(lambda x: _spec(x, axes), tree)


def _nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _call(kernel, grid, arguments, in_specs, outs, out_specs, cost: pl.CostEstimate, interpret: bool):
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
