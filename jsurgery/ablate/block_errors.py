"""errors: the error of every block at every rate before and after distillation, the paper's Fig. 4."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jsurgery.ablate.seed_run import SeedRun
from jsurgery.attention.kinds.registry import rate_name
from jsurgery.evaluate.statistics import mean_and_std


def block_errors(seeds: Sequence[SeedRun]) -> dict[str, Any]:
    """Relative L1 errors of the attention output on held-out traces, before and after distillation."""
    per_seed = [seed.errors(seed.config) for seed in seeds]
    per_seed = [errors | {"velocity_rms": np.sqrt(errors["velocity_errors"]).tolist()} for errors in per_seed]
    rates = per_seed[0]["rates"]
    over_seeds = lambda field, block, column: mean_and_std([errors[field][block][column] for errors in per_seed])
    rows = {
        f"block {block}": {
            **{rate_name(rate): over_seeds("errors", block, i) for i, rate in enumerate(rates)},
            **{f"{rate_name(rate)}, initial": over_seeds("initial_errors", block, i) for i, rate in enumerate(rates)},
            **{f"{rate_name(rate)}, velocity": over_seeds("velocity_rms", block, i) for i, rate in enumerate(rates)},
        }
        for block in range(seeds[0].layers)
    }
    blocks = list(range(seeds[0].layers))
    lines = {
        rate_name(rate): {"x": blocks, "y": [rows[f"block {block}"][rate_name(rate)][0] for block in blocks]}
        for rate in rates
    }
    return {
        "text": f"{len(seeds)} seeds; “initial” is calibrated, not trained; “velocity” is the relative RMS error of "
        "the network’s velocity with that one block converted. ± is the standard deviation over seeds.",
        "rows": rows,
        "charts": [{"title": "Relative L1 error of attention, by block", "lines": lines}],
        "per_seed": per_seed,
    }
