"""bench attention: hybrid attention at each rate takes turns with full softmax by the best stock kernel.

With plans, whole forwards of hybrids take turns with the forward of the softmax model.
"""

import dataclasses
import importlib
import importlib.util
import platform
import statistics
from functools import partial
from typing import Any

import jax
from etils import epath

from jsurgery.attention.kinds.registry import parse_block_budget, plan_of_budget, rate_name
from jsurgery.bench.attention_families import families
from jsurgery.bench.attention_programs import (
    TEXT_LENGTH,
    AttentionShape,
    arguments,
    at_rate,
    forwards,
    program,
    torch_softmax,
)
from jsurgery.errors import InputError
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report, processor, versions, xla_threads
from jsurgery.rates import Rate
from jsurgery.runtime.progress import say
from jsurgery.runtime.timing import alternate
from jsurgery.wan.model_config import WanConfig
from pallas_kernels import stock
from pallas_kernels.api import hybrid_attention

PASSES = ("forward", "forward + backward")
# A backward costs two forwards. What it recomputes of the forward is not counted as work.
FORWARDS = {"forward": 1, "forward + backward": 3}
STOCK = {"cpu": "torch", "gpu": "cuDNN", "tpu": "flash_attention"}
VIDEO = (81, 480, 832)  # of whole forwards: frames, height, width


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
    chunked: tuple[int, int] | None = None,
    sparse: float | None = None,
    report: str | None = None,
) -> None:
    """Prints a table of `runs` measurements of every rate; `report` names a JSON file for them.

    `chunked` and `sparse` add rows of other families, see `families`.

    `plans`, like ("15R2", "20R8"), adds a table of whole forwards of Wan2.1 1.3B with random weights, for `VIDEO`.
    `dtype` None means float32 on CPU and bfloat16 elsewhere. The baseline on CPU is torch, if it is installed, on GPU
    cuDNN (bfloat16 only), on TPU jax's `flash_attention`; otherwise `jax.nn`. The first run of each, which compiles or
    warms up, is not counted. Memory counts a program's arguments, results and temporaries on the device.
    Raises InputError for a plan or an implementation that does not fit.
    """
    check_report(report)
    backend = jax.default_backend()
    size = AttentionShape(tokens, heads, head_dim, dtype or ("float32" if backend == "cpu" else "bfloat16"), stabilizer)
    network, video = WanConfig(), VIDEO
    check_plans(plans, network)
    result = {**dataclasses.asdict(size), "implementation": implementation, "passes": {}}
    for name in PASSES if backward else PASSES[:1]:
        say(f"bench: compiling, {name}")
        contenders = [baseline(size, backend, name), *(ours(size, rate, implementation, name) for rate in rates)]
        contenders += families(size, chunked, sparse, implementation, name)
        for each in contenders:
            flops = each.pop("forward_flops", None) or size.flops(each["rate"])
            each |= {"flops": FORWARDS[name] * flops, "bound": size.flops(1) / flops}
        result["passes"][name] = rows = measured(contenders, runs)
        print(table(name, rows), flush=True)
    if plans:
        say("bench: compiling, whole forwards")
        rows = measured(forwards(plans, network, video, size.dtype, stabilizer), runs)
        result["forward_of_a_model"] = {"video": list(video), "text_length": TEXT_LENGTH, "rows": rows}
        print(table("whole forward", rows), flush=True)
    device = jax.devices()[0]
    result["machine"] = {
        "name": platform.node(),
        "device": processor() if backend == "cpu" else f"{jax.device_count()} x {device.device_kind}",
        "system": platform.platform(),
        "threads": xla_threads() if backend == "cpu" else None,
    }
    result["versions"] = versions(("jsurgery", "jax", "jaxlib", "torch"))
    threads = f", {result['machine']['threads']} threads" if backend == "cpu" else ""
    print(f"{result['machine']['name']}: {result['machine']['device']}{threads}; {size.dtype}, stabilizer {stabilizer}")
    if report is not None:
        write_json(epath.Path(report), result)


def ours(size: AttentionShape, rate: Rate, implementation: str | None, passes: str) -> dict[str, Any]:
    """Our attention at a rate: {"name", "rate", "memory_bytes", "run"}.

    Raises InputError where the implementation does not support it.
    """
    attend = at_rate(hybrid_attention, size, rate, implementation=implementation)
    try:
        return {"name": rate_name(rate), "rate": rate, **program(attend, arguments(size, rate), passes)}
    except NotImplementedError as error:
        raise InputError(f"--implementation={implementation}: {error}") from None


def baseline(size: AttentionShape, backend: str, passes: str) -> dict[str, Any]:
    """Full softmax by the best stock kernel of the platform, in the form of `ours`."""
    if backend == "cpu" and importlib.util.find_spec("torch") is not None:
        return {"name": "torch", "rate": 1, "memory_bytes": None, "run": torch_softmax(size, passes)}
    name = STOCK.get(backend, "jax.nn") if backend != "cpu" and size.dtype == "bfloat16" else "jax.nn"
    attend = partial(stock.hybrid_attention, num_softmax=size.tokens, platform=backend)
    return {"name": name, "rate": 1, **program(attend, arguments(size, 1), passes)}


def check_plans(plans: tuple[str, ...], network: WanConfig) -> None:
    """Raises InputError for a plan that is no name like "15R2" or has more blocks than the network."""
    for plan in plans:
        named = parse_block_budget(plan)
        if named is None or plan_of_budget(named, network.num_layers) is None:
            raise InputError(f"--plans: expected like 15R2, at most {network.num_layers} blocks, found {plan!r}")


def measured(contenders: list[dict[str, Any]], runs: int) -> list[dict[str, Any]]:
    """Runs the contenders in turn; the `row` of each. The first is the baseline."""
    seconds = alternate([contender.pop("run") for contender in contenders], runs)
    base = statistics.median(seconds[0])
    return [row(base, *pair) for pair in zip(contenders, seconds, strict=True)]


def row(baseline_s: float, contender: dict[str, Any], seconds: list[float]) -> dict[str, Any]:
    """The contender with its seconds, its speed-up over the baseline and the share of the FLOP bound reached."""
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
    """The rows as lines of text under a header."""
    head = f"{passes:20}{'median s':>10}{'spread':>20}{'speed-up':>10}{'bound':>8}{'share':>7}{'TFLOP/s':>10}{'GB':>7}"
    lines = [
        f"{each['name']:20}{each['median_s']:10.4g}{'{:.4g} to {:.4g}'.format(*each['spread_s']):>20}"
        f"{each['speedup']:9.2f}x{each['bound']:7.2f}x{each['share_of_bound']:7.0%}{each['tflops_per_s']:10.4g}"
        + (f"{each['memory_bytes'] / 1e9:7.2f}" if each["memory_bytes"] is not None else f"{'-':>7}")
        for each in rows
    ]
    return "\n".join([head, *lines])
