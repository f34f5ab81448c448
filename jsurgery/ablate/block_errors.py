"""errors: what distillation leaves of every block's error at every rate, the paper's Fig. 4."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jsurgery.ablate.seed_run import SeedRun
from jsurgery.evaluate.statistics import mean_and_std
from jsurgery.rates import rate_name
from jsurgery.surgery.distillation.saved_maps import read_errors


def block_errors(seeds: Sequence[SeedRun]) -> dict[str, Any]:
    """Relative L1 errors of the attention output on held-out traces, before and after distillation."""
    found = [read_errors(seed.errors(seed.config).folder) for seed in seeds]
    for of_seed in found:
        of_seed["velocity_rms"] = np.sqrt(of_seed["velocity_errors"]).tolist()
    rates = found[0]["rates"]
    over_seeds = lambda field, block, column: mean_and_std([seed[field][block][column] for seed in found])
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
        "per_seed": found,
    }
