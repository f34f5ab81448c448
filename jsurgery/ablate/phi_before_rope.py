"""rope: does φ do better with queries and keys before RoPE turns them, or after, as the models have it?"""

from collections.abc import Sequence
from typing import Any

from jsurgery.ablate.seed_run import SeedRun
from jsurgery.evaluate.statistics import mean_and_std, paired_difference
from jsurgery.rates import rate_name
from jsurgery.surgery.distillation.saved_maps import read_errors

SIDES = {"after": "after RoPE", "before": "before RoPE"}


def phi_and_rope(seeds: Sequence[SeedRun]) -> dict[str, Any]:
    """Relative L1 errors of the attention output after distillation, φ on either side of RoPE."""
    found = [{side: errors_of(seed, side) for side in SIDES} for seed in seeds]
    rates = found[0]["after"]["rates"]

    def by_block(side: str, column: int) -> list[list[float]]:
        return [[row[column] for row in seed[side]["errors"]] for seed in found]

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
        "per_seed": found,
    }


def errors_of(seed: SeedRun, side: str) -> dict[str, Any]:
    inputs = {} if side == "after" else {"rope": side}
    return read_errors(seed.errors(seed.config, **inputs).folder)
