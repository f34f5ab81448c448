"""bench attention --tune: the search for the block sizes at which our kernels are fastest."""

import dataclasses
import importlib
import math
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jsurgery.attention.kinds.registry import rate_name
from jsurgery.bench.attention import PASSES
from jsurgery.bench.attention_cycles import check_estimates, estimated
from jsurgery.bench.attention_programs import AttentionShape, arguments, at_rate, program
from jsurgery.errors import InputError
from jsurgery.rates import Rate
from jsurgery.runtime.timing import timed
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
    """Searches the best block sizes of each rate in bfloat16 and saves them in the user's cache (`tuning.PATH`).

    They are timed on this accelerator (medians of `runs`). With the name of a TPU as `chip` the compiler's static
    estimates decide, and no TPU is needed. Each entry says which of both it is. Raises InputError without either.
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
                return statistics.median(timed(run)[0] for _ in range(runs))
            except (ValueError, RuntimeError):  # block sizes that do not divide the tokens or do not fit
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
    """Doubles and halves one block size at a time as long as that is at least 2 % faster.

    `seconds(blocks, passes)` is the cost. Sizes whose names begin with "backward" are judged by forward + backward.
    """
    for name in blocks:
        passes = PASSES[name.startswith("backward")]
        best = seconds(blocks, passes)
        for change in (lambda size: 2 * size, lambda size: size // 2):
            while (size := change(blocks[name])) and (cost := seconds(blocks | {name: size}, passes)) < 0.98 * best:
                blocks, best = blocks | {name: size}, cost
    return blocks
