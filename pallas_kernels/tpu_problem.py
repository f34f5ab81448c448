"""What the kernels on TPU have in common: the static arguments of a call, its blocks, and masks of tokens."""

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

LANES = 128
# The score of a masked key. It is finite, so that a row of masked keys alone gives no NaN. The first valid key then
# scales the weights of such keys to zero.
MASKED = -1e30
LOG2_E = 1.4426950408889634
VMEM_LIMIT = 60 * 2**20


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
        value_columns: those of the product with the values. If they are more than a head's width, on a chip whose
            matrix unit has so many, the sum of the weights is one of them, at no cost.
    """

    query: int = 2048
    key: int = 4096
    key_chunk: int = 512
    state: int = 2048
    backward_query: int = 1024
    backward_key: int = 4096
    backward_chunk: int = 1024
    backward_state: int = 2048
    value_columns: int = LANES

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
            "value_columns": self.value_columns,
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

    def weigh(self, p_QxS: jax.Array, v_SxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weighted values [Q, D], and the sums of weights, of which a query's is that over 128 lanes: [Q, 128]."""
        if self.width % LANES or self.width + LANES > self.blocks.value_columns:
            return self.dot(p_QxS, v_SxD), lane_sums(p_QxS)
        first_lane = lax.broadcasted_iota(jnp.int32, (v_SxD.shape[0], LANES), 1) == 0
        ones_SxL = jnp.where(first_lane, 1.0, 0.0).astype(v_SxD.dtype)
        both = self.dot(p_QxS, jnp.concatenate([v_SxD, ones_SxL], axis=1))
        return both[:, : self.width], both[:, self.width :]

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


def lane_sums(x: jax.Array) -> jax.Array:
    """[X, T] -> [X, 128]: sums over whole groups of lanes."""
    return functools.reduce(jnp.add, jnp.split(x, x.shape[1] // LANES, axis=1))


def within(start, size: int, low: Any, high: Any, axis: int) -> jax.Array:
    """Which of the tokens from `start` to `start + size` lie in low .. high, along `axis` of a two-dimensional mask."""
    token = start + lax.broadcasted_iota(jnp.int32, (1, size) if axis else (size, 1), axis)
    return (token >= low) & (token < high)


def zero_at(first, refs) -> None:
    """Fills references with zeros in a step for which `first` is true."""

    @pl.when(first)
    def _():
        for ref in refs:
            ref[...] = jnp.zeros_like(ref)


def query_numbers(count: int, size: int, index) -> pl.BlockSpec:
    """The block spec for `count` numbers of each of `size` queries, [B, H, count, N]."""
    return pl.BlockSpec((None, None, count, size), lambda b, h, *g: (b, h, 0, index(*g)))


def run_with_tail(body: Callable[[int], None], step, steps: int, keys: int, tail: int) -> None:
    """Calls `body` with the number of keys of this step: `tail` in the last step, `keys` in the others.

    If the two are equal or there is only one step, the kernel contains `body` once.
    """
    if tail == keys or steps == 1:
        body(tail)
        return
    pl.when(step < steps - 1)(lambda: body(keys))
    pl.when(step == steps - 1)(lambda: body(tail))
