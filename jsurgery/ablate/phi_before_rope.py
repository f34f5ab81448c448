"""rope: is φ better on queries and keys before RoPE, or after RoPE as in the models?"""

from collections.abc import Sequence
from typing import Any

from jsurgery.ablate.seed_run import SeedRun
from jsurgery.attention.kinds.registry import rate_name
from jsurgery.evaluate.statistics import mean_and_std, paired_difference

SIDES = {"after": "after RoPE", "before": "before RoPE"}


def phi_and_rope(seeds: Sequence[SeedRun]) -> dict[str, Any]:
    """Relative L1 errors of the attention output after distillation, with φ after RoPE and with φ before it."""
    per_seed = [{side: errors_of(seed, side) for side in SIDES} for seed in seeds]
    rates = per_seed[0]["after"]["rates"]

    def by_block(side: str, column: int) -> list[list[float]]:
        return [[row[column] for row in errors[side]["errors"]] for errors in per_seed]

    rows = {
        text: {
            f"error {rate_name(rate)}": mean_and_std([sum(errors) / len(errors) for errors in by_block(side, i)])
            for i, rate in enumerate(rates)
        }
        for side, text in SIDES.items()
    }
    differences = {
        f"error {rate_name(rate)}": paired_difference(by_block("before", i), by_block("after", i))
        for i, rate in enumerate(rates)
    }
    return {
        "text": f"{len(seeds)} seeds; means over blocks, ± is the standard deviation over seeds. Softmax keeps RoPE on "
        "both sides. Errors of attention alone: kernels give both branches the same queries and keys, so that no "
        "model has φ before RoPE.",
        "rows": rows,
        "contrasts": {"before − after": differences},
        "plotted": [f"error {rate_name(rate)}" for rate in rates],
        "per_seed": per_seed,
    }


def errors_of(seed: SeedRun, side: str) -> dict[str, Any]:
    inputs = {} if side == "after" else {"rope": side}
    return seed.errors(seed.config, **inputs)
