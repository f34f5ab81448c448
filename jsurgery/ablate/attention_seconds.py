"""What every kind of attention costs on this machine: all kinds take turns, so that a slow moment slows all of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from jsurgery.ablate.measurement_file import MeasurementFile
from jsurgery.ablate.seed_run import SeedRun
from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.attention.kinds.candidates import maps_of
from jsurgery.diffusion import velocities_per_step
from jsurgery.io.files import write_json
from jsurgery.rates import Rate
from jsurgery.runtime.machine import describe_machine
from jsurgery.runtime.progress import say
from jsurgery.runtime.timing import alternate
from jsurgery.surgery.distillation.saved_maps import TRAINED, load_all_maps
from jsurgery.surgery.plan import BlockCosts
from jsurgery.wan.video_size import latent_grid

ROUNDS = 100
COSTS = "costs.json"  # in the workdir: a file for `config.plan.costs`
FIELDS = ("model", "video", "hybrid", "sampler.guidance")  # what the times depend on, beside the machine


def attention_seconds(seed: SeedRun, workdir: epath.Path) -> dict[str, Any]:
    """The times of one block's attention of every kind, measured once for all seeds.

    {"machine", "rounds", "kinds", "ms": the median of each, "low", "high": quartiles}. They lie beside the measurements
    of the seeds in machine.jsonl, and the medians also in costs.json of the workdir.
    """
    path, stage = (
        seed.measurements.path.with_name("machine.jsonl"),
        seed.stage("attention_seconds", seed.config, FIELDS),
    )
    if not MeasurementFile(path).read(stage):
        measured = measure(seed)
        if not MeasurementFile(path).read(stage):  # another shard may have been faster, and all must plan alike
            MeasurementFile(path).add(stage, {"seconds.json": measured})
    found = MeasurementFile(path).read(stage)["seconds.json"]
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / COSTS, {"unit": "ms", "rates": found["kinds"], "blocks": [found["ms"]]})
    return found


def measured_costs(found: dict[str, Any], layers: int) -> BlockCosts:
    return BlockCosts("ms", tuple(found["kinds"]), np.tile(np.array(found["ms"]), (layers, 1)))


def measure(seed: SeedRun) -> dict[str, Any]:
    kinds: list[Rate] = [1, *seed.config.hybrid.rates]
    say(f"families: timing the attention of {len(kinds)} kinds, {ROUNDS} rounds")
    times_KxR = 1e3 * np.array(alternate([attention_of(seed, kind) for kind in kinds], ROUNDS, "families: attention"))
    low, median, high = np.quantile(times_KxR, (0.25, 0.5, 0.75), axis=1).tolist()
    return {
        "machine": describe_machine(),
        "rounds": ROUNDS,
        "kinds": kinds,
        "ms": median,
        "low": low,
        "high": high,
    }


def attention_of(seed: SeedRun, kind: Rate) -> Callable[[], Any]:
    """A call of one block's attention on random queries, keys and values, as sampling with guidance has them.

    Tokens lie in the order that the kind needs; what it takes to reorder them in a mix with other kinds is left out.
    """
    config, model, layers = seed.config, seed.run.teacher, seed.layers
    video = config.video
    grid = model.config.token_grid(latent_grid(video.frames, video.height, video.width, model.config.strides))
    heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
    shape = velocities_per_step(config.sampler.guidance), int(np.prod(grid)), heads, dim
    q, k, v = (jax.random.normal(jax.random.key(number), shape, model.dtype) for number in range(3))
    plan, maps = (kind, *[1] * (layers - 1)), None
    if kind != 1:
        file, phi = seed.distilled(config) / TRAINED, FeatureMapConfig.of(config)
        of_blocks = load_all_maps(file, [kind], layers, phi)
        maps = jax.tree.map(lambda leaf: leaf[0], maps_of(of_blocks, [kind], 0, axis=1))
    hybrid = HybridConfig.of(config, plan)
    options = {"rate": kind, "grid": grid, "order": hybrid.token_order(grid), "stabilizer": hybrid.stabilizer}
    attend = jax.jit(functools.partial(model.attend, **options))
    return lambda: jax.block_until_ready(attend(q, k, v, maps))
