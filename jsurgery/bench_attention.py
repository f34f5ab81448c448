"""bench attention: hybrid attention at each rate beside full softmax by the best stock kernel, alternating; and, with
plans, whole forwards of a hybrid beside the softmax model."""

import dataclasses
import importlib
import importlib.util
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jsurgery.attention.hybrid import Rate
from jsurgery.attention_programs import (
    TEXT_LENGTH,
    Size,
    arguments,
    at_rate,
    forwards,
    name_of,
    of_rows,
    program,
    step,
    torch_softmax,
)
from jsurgery.bench import processor, xla_threads
from jsurgery.errors import InputError
from jsurgery.runtime.progress import say
from jsurgery.runtime.stages import write_json
from jsurgery.surgery.plan import named_budget
from jsurgery.verify import check_report, versions
from jsurgery.wan.transformer import WanConfig
from pallas_kernels import hybrid_attention, stock, tuning

PASSES = ("forward", "forward + backward")
# Forward + backward counts as three forwards: what is computed again is no work done.
FORWARDS = {"forward": 1, "forward + backward": 3}
STOCK = {"cpu": "torch", "gpu": "cuDNN", "tpu": "flash_attention"}
VIDEO = (81, 480, 832)  # frames, height and width of whole forwards


def bench_attention(
    *,
    rates: tuple[Rate, ...],
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: str | None,
    stabilizer: str,
    implementation: str | None,
    runs: int,
    backward: bool,
    plans: tuple[str, ...] = (),
    report: str | None = None,
) -> None:
    """Prints a table of `runs` measurements of every rate; with `report` also as a JSON file.

    With plans, like ("15R2", "20R8"), also of whole forwards of Wan2.1 1.3B on random weights, at 480x832, 81 frames.

    `dtype` None is float32 on CPU and bfloat16 elsewhere. The baseline is torch on CPU, where torch is installed, cuDNN
    on GPU (bfloat16) and jax's `flash_attention` on TPU. The first run of each, which compiles or warms up, is not
    counted. Memory is what a program takes on the device, arguments and results included.
    """
    check_report(report)
    backend = jax.default_backend()
    size = Size(tokens, heads, head_dim, dtype or ("float32" if backend == "cpu" else "bfloat16"), stabilizer)
    network, video = WanConfig(), VIDEO
    check_plans(plans, network)
    found = {**dataclasses.asdict(size), "implementation": implementation, "passes": {}}
    for name in PASSES if backward else PASSES[:1]:
        say(f"bench: compiling, {name}")
        contenders = [baseline(size, backend, name), *(ours(size, rate, implementation, name) for rate in rates)]
        for each in contenders:
            each |= {"flops": FORWARDS[name] * size.flops(each["rate"]), "bound": size.bound(each["rate"])}
        found["passes"][name] = rows = measured(contenders, runs)
        print(table(name, rows), flush=True)
    if plans:
        say("bench: compiling, whole forwards")
        rows = measured(forwards(plans, network, video, size.dtype, stabilizer), runs)
        found["forward_of_a_model"] = {"video": list(video), "text_length": TEXT_LENGTH, "rows": rows}
        print(table("whole forward", rows), flush=True)
    device = jax.devices()[0]
    found["machine"] = {
        "name": platform.node(),
        "device": processor() if backend == "cpu" else f"{jax.device_count()} x {device.device_kind}",
        "system": platform.platform(),
        "threads": xla_threads() if backend == "cpu" else None,
    }
    found["versions"] = versions(("jsurgery", "jax", "jaxlib", "torch"))
    threads = f", {found['machine']['threads']} threads" if backend == "cpu" else ""
    print(f"{found['machine']['name']}: {found['machine']['device']}{threads}; {size.dtype}, stabilizer {stabilizer}")
    if report is not None:
        write_json(epath.Path(report), found)


def ours(size: Size, rate: Rate, implementation: str | None, passes: str) -> dict[str, Any]:
    """A rate, the program that runs it, and its memory. Raises InputError on what the implementation does not take."""
    attend = at_rate(hybrid_attention, size, rate, implementation=implementation)
    try:
        return {"name": name_of(rate), "rate": rate, **program(attend, arguments(size, rate), passes)}
    except NotImplementedError as error:
        raise InputError(f"--implementation={implementation}: {error}") from None


def baseline(size: Size, backend: str, passes: str) -> dict[str, Any]:
    """Full softmax by the best stock kernel of the platform."""
    if backend == "cpu" and importlib.util.find_spec("torch") is not None:
        return {"name": "torch", "rate": 1, "memory_bytes": None, "run": torch_softmax(size, passes)}
    name = STOCK.get(backend, "jax.nn") if backend != "cpu" and size.dtype == "bfloat16" else "jax.nn"
    attend = partial(stock.hybrid_attention, num_softmax=size.tokens, platform=backend)
    return {"name": name, "rate": 1, **program(attend, arguments(size, 1), passes)}


def check_plans(plans: tuple[str, ...], network: WanConfig) -> None:
    for plan in plans:
        found = named_budget(plan)
        if found is None or found[0] > network.num_layers:
            raise InputError(f"--plans: expected like 15R2, at most {network.num_layers} blocks, found {plan!r}")


def measured(contenders: list[dict[str, Any]], runs: int) -> list[dict[str, Any]]:
    """`row`s of contenders, the first of which is the baseline."""
    seconds = alternate([contender.pop("run") for contender in contenders], runs)
    base = statistics.median(seconds[0])
    return [row(base, *pair) for pair in zip(contenders, seconds, strict=True)]


def alternate(programs: list[Callable[[], Any]], runs: int) -> list[list[float]]:
    """Seconds of every run of every program, one run of each in turn."""
    seconds: list[list[float]] = [[] for _ in programs]
    for run in programs:
        run()
    for number in range(1, runs + 1):
        say(f"bench: run {number} of {runs}")
        for run, times in zip(programs, seconds, strict=True):
            times.append(timed(run))
    return seconds


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def row(baseline_s: float, contender: dict[str, Any], seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    return contender | {
        "seconds": seconds,
        "median_s": median,
        "spread_s": [min(seconds), max(seconds)],
        "speedup": baseline_s / median,
        "share_of_bound": baseline_s / median / contender["bound"],
        "tflops_per_s": contender["flops"] / median / 1e12,
    }


def table(passes: str, rows: list[dict[str, Any]]) -> str:
    head = f"{passes:20}{'median s':>10}{'spread':>20}{'speed-up':>10}{'bound':>8}{'share':>7}{'TFLOP/s':>10}{'GB':>7}"
    lines = [
        f"{each['name']:20}{each['median_s']:10.4g}{'{:.4g} to {:.4g}'.format(*each['spread_s']):>20}"
        f"{each['speedup']:9.2f}x{each['bound']:7.2f}x{each['share_of_bound']:7.0%}{each['tflops_per_s']:10.4g}"
        + (f"{each['memory_bytes'] / 1e9:7.2f}" if each["memory_bytes"] is not None else f"{'-':>7}")
        for each in rows
    ]
    return "\n".join([head, *lines])


def estimate_attention(
    *,
    chip: str,
    rates: tuple[Rate, ...],
    tokens: int,
    heads: int,
    head_dim: int,
    stabilizer: str,
    backward: bool,
    report: str | None = None,
) -> None:
    """Prints what the TPU compiler expects each rate to cost in bfloat16, with no TPU: static estimates."""
    check_report(report)
    check_estimates(chip)
    kernels = importlib.import_module("pallas_kernels.tpu")
    size = Size(tokens, heads, head_dim, "bfloat16", stabilizer)
    found: dict[str, Any] = {"static_estimate": True, "chip": chip, **dataclasses.asdict(size), "passes": {}}
    flash = partial(stock.hybrid_attention, num_softmax=tokens, platform="tpu")
    contenders: list[tuple[str, Rate, Callable]] = [(STOCK["tpu"], 1, flash)]
    for rate in dict.fromkeys((1, *rates)):
        blocks = kernels.blocks_for(chip, tokens, size.num_softmax(rate))
        contenders.append((name_of(rate), rate, at_rate(kernels.hybrid_attention, size, rate, block_sizes=blocks)))
    for passes in PASSES if backward else PASSES[:1]:
        rows = []
        for name, rate, attend in contenders:
            say(f"bench: estimating {name}, {passes}")
            made = {"name": name, "rate": rate, "bound": size.bound(rate)}
            made |= estimated(chip, size, rate, attend, passes)
            if name == STOCK["tpu"]:  # XLA moves the heads out of the rows for it, which others may not need
                made["cycles"] -= made["xla"]
            rows.append(made)
        full = rows[1]["cycles"]
        print(f"static estimate, {chip}, {passes}: million cycles, over our softmax, over flash_attention, FLOP bound")
        for each in rows:
            each |= {"speedup": full / each["cycles"], "over_flash_attention": rows[0]["cycles"] / each["cycles"]}
            print(
                f"{each['name']:20}{each['cycles'] / 1e6:10.3f}{each['speedup']:9.2f}x"
                f"{each['over_flash_attention']:9.2f}x{each['bound']:9.2f}x",
                flush=True,
            )
        found["passes"][passes] = rows
    if report is not None:
        write_json(epath.Path(report), found)


def estimated(chip: str, size: Size, rate: Rate, attend: Callable, passes: str) -> dict[str, Any]:
    """Static cycles of a layer: {"cycles": of all, "kernels": {name: cycles}, "xla": of XLA's own operations}."""
    estimates = importlib.import_module("pallas_kernels.estimate")
    rows = jax.ShapeDtypeStruct((1, size.tokens, size.heads * size.head_dim), jnp.dtype(size.dtype))
    maps = jax.eval_shape(lambda: arguments(dataclasses.replace(size, tokens=1), rate)[3:])
    layer = step(partial(of_rows, attend, size.heads), passes)
    kernels, own = estimates.estimate_cycles(chip, layer, rows, rows, rows, *maps)
    xla = sum(own.values())
    return {"cycles": sum(kernels.values()) + xla, "kernels": kernels, "xla": xla}


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
    size = Size(tokens, heads, head_dim, "bfloat16", stabilizer)
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
        print(f"{name} {name_of(rate)}: {blocks}, {source}", flush=True)
    print(tuning.PATH)


def check_estimates(chip: str) -> None:
    estimates = importlib.import_module("pallas_kernels.estimate")
    if chip not in estimates.CHIPS:
        raise InputError(f"--estimate: expected one of {', '.join(estimates.CHIPS)}, found {chip!r}")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError('--estimate: needs libtpu, found none: pip install "jsurgery[tpu]"')


def search(blocks: dict[str, int], seconds: Callable[[dict[str, int], str], float]) -> dict[str, int]:
    """The sizes at which neither half nor double of any one is 2 % faster; those of the backward are timed in it."""
    for name in blocks:
        passes = PASSES[name.startswith("backward")]
        best = seconds(blocks, passes)
        for change in (lambda size: 2 * size, lambda size: size // 2):
            while (size := change(blocks[name])) and (found := seconds(blocks | {name: size}, passes)) < 0.98 * best:
                blocks, best = blocks | {name: size}, found
    return blocks
