"""The search for a kernel's best block sizes."""

import dataclasses
import importlib
import math
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jsurgery.bench.attention import PASSES
from jsurgery.bench.attention_cycles import check_estimates, estimated
from jsurgery.bench.attention_programs import AttentionShape, arguments, at_rate, program
from jsurgery.bench.timing import timed
from jsurgery.errors import InputError
from jsurgery.rates import Rate, rate_name
from pallas_kernels import tuning


def tune_attention(
    *,
    rates: tuple[Rate, ...],
    tokens: int,
    heads: int,
    head_dim: int,
    stabilizer: str,
    runs: int,
    chip: str | None = None,
) -> None:
    """Looks for the best block sizes of each rate in bfloat16 and keeps them in tuned.json.

    They are measured on this accelerator, or with the name of a TPU, which need not be here, taken from the compiler's
    static estimates; an entry says which.
    """
    backend = "tpu" if chip else jax.default_backend()
    if backend not in ("gpu", "tpu"):
        raise InputError(f"--tune: expected a TPU or GPU, or --estimate=CHIP, found {backend} alone")
    if chip is not None:
        check_estimates(chip)
    kernels = importlib.import_module(f"pallas_kernels.{backend}")
    size = AttentionShape(tokens, heads, head_dim, "bfloat16", stabilizer)
    name, source = (chip, "static estimate") if chip else (tuning.current_chip(), "measured")
    for rate in rates:
        num_softmax = size.num_softmax(rate)

        def cost(blocks: dict[str, int], passes: str, rate=rate) -> float:
            try:
                attend = at_rate(kernels.hybrid_attention, size, rate, block_sizes=kernels.BlockSizes(**blocks))
                if chip is not None:
                    return estimated(chip, size, rate, attend, passes)["cycles"]
                run = program(attend, arguments(size, rate), passes)["run"]
                run()
                return statistics.median(timed(run) for _ in range(runs))
            except (ValueError, RuntimeError):  # blocks that do not divide, or do not fit
                return math.inf

        if backend == "tpu":
            start = dataclasses.asdict(kernels.blocks_for(name, tokens, num_softmax))
        else:
            start = kernels.BLOCK_SIZES[jnp.dtype(size.dtype)]._asdict()
        blocks = search(start, cost)
        tuning.save(name, tokens, num_softmax, blocks, source)
        print(f"{name} {rate_name(rate)}: {blocks}, {source}", flush=True)
    print(tuning.PATH)


def search(blocks: dict[str, int], seconds: Callable[[dict[str, int], str], float]) -> dict[str, int]:
    """The sizes at which neither half nor double of any one is 2 % faster; those of the backward are timed in it."""
    for name in blocks:
        passes = PASSES[name.startswith("backward")]
        best = seconds(blocks, passes)
        for change in (lambda size: 2 * size, lambda size: size // 2):
            while (size := change(blocks[name])) and (found := seconds(blocks | {name: size}, passes)) < 0.98 * best:
                blocks, best = blocks | {name: size}, found
    return blocks
