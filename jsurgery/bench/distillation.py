"""bench distill: one step that distils every block at every rate, beside steps for one block and one rate each."""

import dataclasses
import platform
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from jsurgery.io.files import write_json
from jsurgery.io.results import check_report, processor
from jsurgery.rates import rate_chain
from jsurgery.runtime.progress import say
from jsurgery.runtime.timing import timed
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.surgery.distillation.update import initial_maps, make_optimizer, make_update
from jsurgery.wan.checkpoint import load_transformer
from jsurgery.wan.cost import Workload, distillation_flops, model_flops, workload
from jsurgery.wan.model_folder import model_path, transformer_folder
from jsurgery.wan.model_sizes import find_sizes
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.video_size import check_size, latent_grid


def bench_distill(config: ConfigDict, config_name: str, *, runs: int, report: str | None = None) -> None:
    """Prints FLOPs by the cost model and, if `config.model.path` names a model, seconds on this machine.

    "One pass" distils all blocks at all rates in a step. "Naive" runs the teacher once for each pair of a block and a
    rate. Its time is measured on the last block, at every rate, and multiplied by the number of blocks. A naive step
    that stopped the teacher after its own block would save up to half of that.
    """
    check_report(report)
    network = find_sizes(config, config_name).transformer
    flops = counts(dataclasses.replace(workload(config, network), config=network), config.hybrid.rates)
    result: dict[str, Any] = {"rates": list(config.hybrid.rates), "blocks": network.num_layers, "flops": flops}
    print(
        f"{network.num_layers} blocks x {len(result['rates'])} rates, FLOPs of an example by the cost model: one pass "
        f"{flops['one_pass']:.3g}, {flops['over_forward']:.3f} forwards of the teacher; "
        f"one block and rate at a time {flops['naive']:.3g}, {flops['saving']:.1f} times as many"
    )
    if config.model.path:
        video = config.video
        check_size(network, video.frames, video.height, video.width)
        folder = transformer_folder(model_path(config.model.path))
        teacher = load_transformer(folder, np.dtype(config.model.dtype))
        result["seconds"] = seconds = measure_seconds(config, teacher, runs)
        result["machine"] = {"name": platform.node(), "processor": processor(), "device": jax.devices()[0].device_kind}
        print(
            f"measured, medians of {runs}: forward {seconds['forward']:.3f} s, one pass {seconds['one_pass']:.3f} s, "
            f"{seconds['over_forward']:.2f} forwards; naive {seconds['naive']:.1f} s, {seconds['saving']:.1f} times"
        )
        print(f"{platform.node()}: {processor()}")
    if report is not None:
        write_json(epath.Path(report), result)


def counts(work: Workload, rates: tuple) -> dict[str, float]:
    """FLOPs of one example: of the teacher's forward, of one pass, and of the naive way."""
    forward = model_flops(work, (1,) * work.config.num_layers)
    one_pass = distillation_flops(work, rates)
    naive = work.config.num_layers * len(rates) * forward + one_pass - forward  # the attention branches cost the same
    return with_ratios(forward, one_pass, naive)


def with_ratios(forward: float, one_pass: float, naive: float) -> dict[str, float]:
    return {
        "forward": forward,
        "one_pass": one_pass,
        "naive": naive,
        "over_forward": one_pass / forward,
        "saving": naive / one_pass,
    }


def measure_seconds(config: ConfigDict, teacher: WanTransformer, runs: int) -> dict[str, float]:
    """Medians of `runs` seconds: of the teacher's forward, of one pass, and of the naive way (see `bench_distill`)."""
    network, video, size = teacher.config, config.video, config.distill.batch
    rng = np.random.default_rng(0)
    grid = latent_grid(video.frames, video.height, video.width, network.strides)
    shapes = {"latents": (size, *grid, network.in_channels), "text": (size, config.text_length, network.text_dim)}
    batch = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    batch |= {"timestep": np.full(size, 500, np.float32)}
    spec, optimizer = DistillSpec.of(config), make_optimizer(config)
    graph, params = nnx.split(teacher)
    maps = initial_maps(config, teacher)
    inputs = batch["latents"], batch["timestep"], batch["text"]
    run = jax.jit(lambda params: nnx.merge(graph, params)(*inputs))
    forward = median_seconds(lambda: np.asarray(run(params)), runs)

    def step(chosen: DistillSpec, chosen_maps: Any, name: str) -> float:
        say(f"bench: {name}")
        update = make_update(optimizer, graph, chosen)
        # On the host: a step donates its state, so each run copies these to the device.
        state = {"maps": jax.tree.map(np.asarray, chosen_maps)}
        state |= {"opt_state": jax.tree.map(np.asarray, optimizer.init(chosen_maps))}
        return median_seconds(lambda: np.asarray(update(state, params, batch)[1]), runs)

    one_pass = step(spec, maps, "all blocks at all rates")
    naive, last = 0.0, network.num_layers - 1
    for index, rate in enumerate(spec.rates):
        single = dataclasses.replace(spec, blocks=(last,), rates=(rate,), chain=rate_chain((rate,)))
        single_maps = jax.tree.map(lambda leaf, index=index: leaf[last:, index : index + 1], maps)
        naive += network.num_layers * step(single, single_maps, f"block {last} at rate {rate}")
    return with_ratios(forward, one_pass, naive)


def median_seconds(work: Callable[[], np.ndarray], runs: int) -> float:
    """The median of `runs` calls after a first one, which compiles and is not counted."""
    work()
    return statistics.median(timed(work)[0] for _ in range(runs))
