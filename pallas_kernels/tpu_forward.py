"""Forward of hybrid attention on TPU: a kernel for the state of the linear keys, and flash attention that reads it out.

`summarize` runs over the suffix of K and V, computes phi itself, and returns S = sum phi(k)^T v and z = sum phi(k).
`attend` runs over the prefix. In the last key step of each query block it computes phi(q), reads S and z, and combines
the branches, so that neither branch's output is written to memory. Row maxima and sums are replicated over lanes, where
broadcasting them is free.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_traffic import block_traffic
from pallas_kernels.feature_map import ACTIVATIONS, PolynomialMap
from pallas_kernels.reference import EPSILON

LANES = 128
# The score of a masked key. It is finite, so that a row of masked keys alone gives no NaN. The first valid key then
# scales the weights of such keys to zero.
MASKED = -1e30
LOG2_E = 1.4426950408889634
VMEM_LIMIT = 60 * 2**20
# Mosaic has no expm1, which jax.nn.elu needs.
KERNEL_ACTIVATIONS = ACTIVATIONS | {"elu1": lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))}
# The activations' derivatives as functions of their outputs, so that their inputs need not be kept.
SLOPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": lambda y: jnp.where(y > 0, 1.0, 0.0),
    "softplus": lambda y: 1.0 - jnp.exp(-y),
    "exp": lambda y: y,
    "sigmoid": lambda y: y * (1.0 - y),
    "elu1": lambda y: jnp.minimum(y, 1.0),
}


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tokens per block, all multiples of 128.

    Attributes:
        query: queries of a forward step.
        key: softmax keys of a forward step.
        key_chunk: softmax keys of one tile of scores within a step.
        state: linear keys of a step.
        backward_query: queries of a backward step of the softmax branch.
        backward_key: softmax keys of a backward step.
        backward_chunk: softmax keys of one tile of scores within a backward step.
        backward_state: tokens of a backward step of a feature map.
    """

    query: int = 2048
    key: int = 4096
    key_chunk: int = 512
    state: int = 2048
    backward_query: int = 1024
    backward_key: int = 4096
    backward_chunk: int = 1024
    backward_state: int = 2048

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (size := getattr(self, field.name)) <= 0 or size % LANES:
                raise ValueError(f"block size {field.name} must be a positive multiple of {LANES}, found {size}")

    def fit(self, num_queries: int, num_keys: int, num_softmax: int) -> "BlockSizes":
        """The sizes, each limited to the length of what it divides, rounded up to whole lanes."""
        longest = {
            "query": num_queries,
            "key": num_softmax,
            "key_chunk": num_softmax,
            "state": num_keys,
            "backward_query": num_queries,
            "backward_key": num_softmax,
            "backward_chunk": num_softmax,
            "backward_state": max(num_queries, num_keys),
        }
        rounded = {name: max(-(-length // LANES), 1) * LANES for name, length in longest.items()}
        return BlockSizes(**{name: min(getattr(self, name), length) for name, length in rounded.items()})


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static arguments of one call of hybrid attention."""

    batch: int
    num_queries: int
    num_keys: int
    num_softmax: int
    heads: int
    width: int
    dtype: Any
    stabilizer: str
    masked: bool
    degree: int
    activation: str
    blocks: BlockSizes
    interpret: Any

    @property
    def num_linear(self) -> int:
        return self.num_keys - self.num_softmax

    @property
    def packed(self) -> bool:
        """Whether a head's width is a whole number of lanes, so that a block can be cut out of [B, N, H*D]."""
        return self.width % LANES == 0

    def pack(self, x_BxNxHxD: jax.Array) -> jax.Array:
        """x in the kernels' layout: [B, N, H*D] if `packed`, else [B, H, N, D]."""
        if self.packed:
            return x_BxNxHxD.reshape(*x_BxNxHxD.shape[:2], -1)
        return x_BxNxHxD.swapaxes(1, 2)

    def unpack(self, x: jax.Array) -> jax.Array:
        """[B, N, H, D] from the kernels' layout."""
        if self.packed:
            return x.reshape(*x.shape[:2], self.heads, self.width)
        return x.swapaxes(1, 2)

    def packed_shape(self, length: int) -> tuple[int, ...]:
        if self.packed:
            return self.batch, length, self.heads * self.width
        return self.batch, self.heads, length, self.width

    def tokens(self, size: int, index) -> pl.BlockSpec:
        """The block spec for `size` tokens of one head of a packed array.

        `index` maps the grid's indices after (B, H) to the number of a block.
        """
        if self.packed:
            return pl.BlockSpec((None, size, self.width), lambda b, h, *g: (b, index(*g), h))
        return pl.BlockSpec((None, None, size, self.width), lambda b, h, *g: (b, h, index(*g), 0))

    def dot(self, a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
        """A product of operands in the problem's dtype, accumulated in float32; float32 operands in full precision."""
        precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else lax.Precision.DEFAULT
        a, b = a.astype(self.dtype), b.astype(self.dtype)
        if self.interpret:  # The CPU has no product of bfloat16 into float32; this gives the same result.
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return lax.dot_general(
            a,
            b,
            (((contract[0],), (contract[1],)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def call(self, kernel, name: str, grid: tuple[int, ...], parallel: int, flops: int, exps: int, **options):
        """`pl.pallas_call` over (B, H, *grid). Steps along the first `parallel` axes of `grid` may run in any order.

        flops and exps are those of one head. HBM traffic is that of the blocks; see `block_traffic`.
        """
        per_call, whole_grid = self.batch * self.heads, (self.batch, self.heads, *grid)

        def run(*operands):
            specs = [*options["in_specs"], *jax.tree.leaves(options["out_specs"])]
            traffic = block_traffic(whole_grid, specs, [*operands, *jax.tree.leaves(options["out_shape"])])
            return pl.pallas_call(
                kernel,
                grid=whole_grid,
                name=name,
                interpret=self.interpret,
                cost_estimate=pl.CostEstimate(
                    flops=per_call * flops, transcendentals=per_call * exps, bytes_accessed=traffic
                ),
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=[pltpu.PARALLEL] * (2 + parallel) + [pltpu.ARBITRARY] * (len(grid) - parallel),
                    vmem_limit_bytes=VMEM_LIMIT,
                ),
                **options,
            )(*operands)

        return run


def take(refs: Iterator[Any], count: int, present: bool = True) -> Any:
    """A kernel's next `count` references, or `count` times None if it has no references of this kind."""
    return [next(refs) if present else None for _ in range(count)]


def whole(*shape: int, per_batch: bool = False) -> pl.BlockSpec:
    """The block spec for all of one head's part of [H, *shape], or with `per_batch` of [B, H, *shape]."""
    zeros = (0,) * len(shape)
    if per_batch:
        return pl.BlockSpec((None, None, *shape), lambda b, h, *g: (b, h, *zeros))
    return pl.BlockSpec((None, *shape), lambda b, h, *g: (h, *zeros))


def row(size: int, index) -> pl.BlockSpec:
    """The block spec for `size` tokens of key_valid, [B, 1, M]."""
    return pl.BlockSpec((None, 1, size), lambda b, h, *g: (b, 0, index(*g)))


def map_flops(phi: PolynomialMap) -> int:
    """FLOPs of one head's map per token."""
    return sum(2 * kernel.shape[1] * kernel.shape[2] for kernel in phi.kernels)


def columns(phi: PolynomialMap, dtype: Any) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """phi's kernels [H, d_out, d_in] and biases [H, d_out, 1], for tokens along lanes."""
    arrays = [kernel.swapaxes(1, 2).astype(dtype) for kernel in phi.kernels] + [bias[..., None] for bias in phi.biases]
    return arrays, [whole(*array.shape[1:]) for array in arrays]


def rows(phi: PolynomialMap, dtype: Any) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """phi's kernels [H, d_in, d_out] and biases [H, 1, d_out], for tokens along sublanes."""
    arrays = [kernel.astype(dtype) for kernel in phi.kernels] + [bias[:, None] for bias in phi.biases]
    return arrays, [whole(*array.shape[1:]) for array in arrays]


def powers(psi: jax.Array, degree: int, axis: int) -> jax.Array:
    """[psi_1, psi_2^2, ..., psi_P^P] of the P = degree slices of psi along `axis`."""
    slices = jnp.split(psi, degree, axis)
    return jnp.concatenate([lax.integer_pow(x, p) for p, x in enumerate(slices, start=1)], axis)


def hidden_columns(problem: Problem, x_TxD: jax.Array, weights) -> list[jax.Array]:
    """The outputs [d_out, T] of all of phi's layers for tokens [T, D], in float32."""
    layers = len(weights) // 2
    after = []
    for layer, (kernel, bias) in enumerate(zip(weights[:layers], weights[layers:], strict=True)):
        h = problem.dot(kernel[...], after[-1]) if layer else problem.dot(kernel[...], x_TxD, (1, 1))
        after.append(KERNEL_ACTIVATIONS[problem.activation](h + bias[...]))
    return after


def features_rows(problem: Problem, x_TxD: jax.Array, weights) -> jax.Array:
    """phi [T, F] of tokens [T, D], without its scale."""
    layers = len(weights) // 2
    h = x_TxD
    for kernel, bias in zip(weights[:layers], weights[layers:], strict=True):
        h = KERNEL_ACTIVATIONS[problem.activation](problem.dot(h, kernel[...]) + bias[...])
    return powers(h, problem.degree, 1)


def lane_sums(x: jax.Array) -> jax.Array:
    """[X, T] -> [X, 128]: sums over whole groups of lanes."""
    return functools.reduce(jnp.add, jnp.split(x, x.shape[1] // LANES, axis=1))


def within(start, size: int, low: int, high: int, axis: int) -> jax.Array:
    """Which of the tokens from `start` to `start + size` lie in low .. high, along `axis` of a two-dimensional mask."""
    token = start + lax.broadcasted_iota(jnp.int32, (1, size) if axis else (size, 1), axis)
    return (token >= low) & (token < high)


def add_tile(
    problem: Problem, s_QxS: jax.Array, v_SxD: jax.Array, peak: jax.Array, total: jax.Array, o_QxD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest score, sum of weights (each [Q, 128]) and weighted values after one more tile of scores in log 2."""
    peak_next = jnp.maximum(peak, s_QxS.max(axis=1, keepdims=True))
    p_QxS = jnp.exp2(s_QxS - jnp.concatenate([peak_next] * (s_QxS.shape[1] // LANES), axis=1))
    decay = jnp.exp2(peak - peak_next)
    o_QxD = decay[:, : problem.width] * o_QxD + problem.dot(p_QxS, v_SxD)
    return peak_next, decay * total + lane_sums(p_QxS), o_QxD


def run_with_tail(body: Callable[[int], None], step, steps: int, keys: int, tail: int) -> None:
    """Calls `body` with the number of keys of this step: `tail` in the last step, `keys` in the others.

    If the two are equal or there is only one step, the kernel contains `body` once.
    """
    if tail == keys or steps == 1:
        body(tail)
        return
    pl.when(step < steps - 1)(lambda: body(keys))
    pl.when(step == steps - 1)(lambda: body(tail))


def summarize(problem: Problem, key_map: PolynomialMap, k, v, valid) -> tuple[jax.Array, jax.Array]:
    """S [B, H, F, D] and z [B, H, F] of the linear keys, float32, without phi's scale; k and v are packed."""
    size = problem.blocks.state
    first = problem.num_softmax // size
    steps = pl.cdiv(problem.num_keys, size) - first
    weights, weight_specs = columns(key_map, problem.dtype)
    features = key_map.biases[-1].shape[-1]
    ragged = problem.num_softmax % size or problem.num_keys % size

    def kernel(k_ref, v_ref, *refs):
        *inputs, state_ref, z_ref = refs
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            state_ref[...] = jnp.zeros_like(state_ref)
            z_ref[...] = jnp.zeros_like(z_ref)

        psi_FxT = hidden_columns(problem, k_ref[...], inputs[: len(weights)])[-1]
        phi_FxT = powers(psi_FxT, problem.degree, 0)
        v_TxD = v_ref[...]
        if ragged:
            start = (first + step) * size
            phi_FxT = jnp.where(within(start, size, problem.num_softmax, problem.num_keys, 1), phi_FxT, 0.0)
            v_TxD = jnp.where(within(start, size, 0, problem.num_keys, 0), v_TxD, 0)
        if problem.masked:
            phi_FxT = jnp.where(inputs[-1][...] > 0, phi_FxT, 0.0)
        state_ref[...] += problem.dot(phi_FxT, v_TxD)
        z_ref[...] += lane_sums(phi_FxT)

    block = lambda step: first + step
    masks = [valid] if problem.masked else []
    state, z = problem.call(
        kernel,
        "hybrid_state",
        (steps,),
        parallel=0,
        flops=problem.num_linear * (map_flops(key_map) + 2 * features * problem.width),
        exps=0,
        in_specs=[
            problem.tokens(size, block),
            problem.tokens(size, block),
            *weight_specs,
            *(row(size, block) for _ in masks),
        ],
        out_specs=[whole(features, problem.width, per_batch=True), whole(features, LANES, per_batch=True)],
        out_shape=[
            jax.ShapeDtypeStruct((problem.batch, problem.heads, features, problem.width), jnp.float32),
            jax.ShapeDtypeStruct((problem.batch, problem.heads, features, LANES), jnp.float32),
        ],
    )(k, v, *weights, *masks)
    return state, z.sum(axis=-1)


def attend(
    problem: Problem, query_map: PolynomialMap | None, q, k, v, valid, state, z, *, with_stats: bool
) -> tuple[jax.Array, jax.Array | None]:
    """y, packed, and with_stats what the backward needs: base and shift of every query, float32 [B, H, 2, N].

    With scores s in units of log 2, the weight of key j for query i is exp2(s_ij - shift_i), and exp2(shift - base) is
    eq. 5's denominator. base is c_i in a hybrid. In full softmax and pure linear attention its value does not matter.
    """
    queries, keys, chunk = problem.blocks.query, problem.blocks.key, problem.blocks.key_chunk
    key_steps = pl.cdiv(problem.num_softmax, keys)
    tail = problem.num_softmax - (key_steps - 1) * keys
    scale = problem.width**-0.5 * LOG2_E
    linear, softmax = query_map is not None, problem.num_softmax > 0
    features = 0 if query_map is None else query_map.biases[-1].shape[-1]

    def kernel(*refs):
        refs = iter(refs)
        (q_ref,) = take(refs, 1)
        k_ref, v_ref = take(refs, 2, softmax)
        (valid_ref,) = take(refs, 1, softmax and problem.masked)
        weight_refs = take(refs, len(weights))
        state_ref, z_ref = take(refs, 2, linear)
        (y_ref,) = take(refs, 1)
        (stats_ref,) = take(refs, 1, with_stats)
        max_ref, sum_ref, out_ref = take(refs, 3, softmax)
        step = pl.program_id(3)
        first, last = key_steps < 2 or step == 0, key_steps < 2 or step == key_steps - 1

        def attend_to(count):
            q_QxD = q_ref[...]
            peak, total, o = max_ref[...], sum_ref[...], out_ref[...]
            for start in range(0, count, chunk):
                size = min(chunk, keys - start)
                piece = pl.ds(start, size)
                s = problem.dot(q_QxD, k_ref[piece, :], (1, 1)) * scale
                v_SxD = v_ref[piece, :]
                if start + size > count:
                    s = jnp.where(within(start, size, 0, count, 1), s, MASKED)
                    v_SxD = jnp.where(within(start, size, 0, count, 0), v_SxD, 0)
                if problem.masked:
                    s = jnp.where(valid_ref[:, piece] > 0, s, MASKED)
                peak, total, o = add_tile(problem, s, v_SxD, peak, total, o)
            max_ref[...], sum_ref[...], out_ref[...] = peak, total, o

        if softmax:

            @pl.when(first)
            def _():
                max_ref[...] = jnp.full_like(max_ref, MASKED)
                sum_ref[...] = jnp.zeros_like(sum_ref)
                out_ref[...] = jnp.zeros_like(out_ref)

            run_with_tail(attend_to, step, key_steps, keys, tail)

        @pl.when(last)
        def _():
            num, den = jnp.zeros((queries, problem.width), jnp.float32), jnp.full((queries, 1), EPSILON)
            base = jnp.zeros((queries, LANES), jnp.float32)
            if softmax:
                num, den, base = out_ref[...], sum_ref[...].sum(axis=1, keepdims=True), max_ref[...]
                if problem.stabilizer == "lse" and linear:
                    num, den, base = num / den, jnp.ones_like(den), base + jnp.log2(den)
            if linear:
                phi_QxF = features_rows(problem, q_ref[...], weight_refs)
                num += problem.dot(phi_QxF, state_ref[...])
                den += (phi_QxF * z_ref[...]).sum(axis=1, keepdims=True)
            y_ref[...] = (num / den).astype(y_ref.dtype)
            if with_stats:
                first_lane = lax.broadcasted_iota(jnp.int32, base.shape, 1) == 0
                stats_ref[...] = jnp.where(first_lane, base, base + jnp.log2(den)).T[:2]

    weights, weight_specs = rows(query_map, problem.dtype) if query_map is not None else ([], [])
    operands, specs = [q], [problem.tokens(queries, lambda i, j: i)]
    if softmax:
        operands += [k, v]
        specs += [problem.tokens(keys, lambda i, j: j)] * 2
        if problem.masked:
            operands.append(valid)
            specs.append(row(keys, lambda i, j: j))
    operands, specs = operands + weights, specs + weight_specs
    if linear:
        operands += [state.astype(problem.dtype), z[:, :, None]]
        specs += [whole(features, problem.width, per_batch=True), whole(1, features, per_batch=True)]
    out_specs = [problem.tokens(queries, lambda i, j: i)]
    out_shape = [jax.ShapeDtypeStruct(problem.packed_shape(problem.num_queries), problem.dtype)]
    if with_stats:
        out_specs.append(pl.BlockSpec((None, None, 2, queries), lambda b, h, i, j: (b, h, 0, i)))
        out_shape.append(jax.ShapeDtypeStruct((problem.batch, problem.heads, 2, problem.num_queries), jnp.float32))
    per_query = 4 * problem.num_softmax * problem.width
    if query_map is not None:
        per_query += map_flops(query_map) + 2 * features * (problem.width + 1)
    lanes = pltpu.VMEM((queries, LANES), jnp.float32)
    y, *stats = problem.call(
        kernel,
        "hybrid_attend",
        (pl.cdiv(problem.num_queries, queries), max(key_steps, 1)),
        parallel=1,
        flops=problem.num_queries * per_query,
        exps=problem.num_queries * problem.num_softmax,
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[lanes, lanes, pltpu.VMEM((queries, problem.width), jnp.float32)] if softmax else [],
    )(*operands)
    return y, stats[0] if stats else None
