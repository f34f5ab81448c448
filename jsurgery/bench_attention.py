"""bench attention: hybrid attention at each rate beside full softmax by the best stock kernel, alternating."""

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

from jsurgery.attention.hybrid import FeatureMapConfig, Rate
from jsurgery.bench import processor, xla_threads
from jsurgery.cost import Workload, core_flops
from jsurgery.errors import InputError
from jsurgery.runtime.progress import say
from jsurgery.runtime.stages import write_json
from jsurgery.verify import check_report, versions
from jsurgery.wan.transformer import WanConfig
from pallas_kernels import hybrid_attention, init_polynomial_map, stock, tuning

PHI = FeatureMapConfig()
PASSES = ("forward", "forward + backward")
# Forward + backward counts as three forwards: what is computed again is no work done.
FORWARDS = {"forward": 1, "forward + backward": 3}
STOCK = {"cpu": "torch", "gpu": "cuDNN", "tpu": "flash_attention"}


@dataclasses.dataclass(frozen=True)
class Size:
    """One attention layer, of batch 1."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    stabilizer: str

    def num_softmax(self, rate: Rate) -> int:
        return 0 if isinstance(rate, str) else -(-self.tokens // rate)

    def flops(self, rate: Rate) -> int:
        """Of one forward, phi included."""
        config = WanConfig(num_attention_heads=self.heads, attention_head_dim=self.head_dim)
        return core_flops(Workload(config, self.tokens, feature_map=PHI), rate)

    def bound(self, rate: Rate) -> float:
        """The speed-up over full softmax that FLOPs allow."""
        return self.flops(1) / self.flops(rate)


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
    report: str | None = None,
) -> None:
    """Prints a table of `runs` measurements of every rate; with `report` also as a JSON file.

    `dtype` None is float32 on CPU and bfloat16 elsewhere. The baseline is torch on CPU, where torch is installed, cuDNN
    on GPU (bfloat16) and jax's `flash_attention` on TPU. The first run of each, which compiles or warms up, is not
    counted. Memory is what a program takes on the device, arguments and results included.
    """
    check_report(report)
    backend = jax.default_backend()
    size = Size(tokens, heads, head_dim, dtype or ("float32" if backend == "cpu" else "bfloat16"), stabilizer)
    found = {**dataclasses.asdict(size), "implementation": implementation, "passes": {}}
    for name in PASSES if backward else PASSES[:1]:
        say(f"bench: compiling, {name}")
        contenders = [baseline(size, backend, name), *(ours(size, rate, implementation, name) for rate in rates)]
        measured = alternate([contender.pop("run") for contender in contenders], runs)
        base = statistics.median(measured[0])
        rows = [row(size, name, base, *pair) for pair in zip(contenders, measured, strict=True)]
        found["passes"][name] = rows
        print(table(name, rows), flush=True)
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
    attend = partial(
        hybrid_attention,
        num_softmax=size.num_softmax(rate),
        stabilizer=size.stabilizer,
        implementation=implementation,
    )
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


def name_of(rate: Rate) -> str:
    return "softmax" if rate == 1 else rate if isinstance(rate, str) else f"R{rate}"


def arguments(size: Size, rate: Rate) -> tuple:
    """q, k, v and two maps, random."""
    keys = jax.random.split(jax.random.key(0), 5)
    heads = 1, size.tokens, size.heads, size.head_dim
    q, k, v = (jax.random.normal(key, heads, jnp.dtype(size.dtype)) for key in keys[:3])
    if rate == 1:
        return q, k, v, None, None
    make = partial(init_polynomial_map, heads=size.heads, width=size.head_dim, degree=PHI.degree, layers=PHI.layers)
    return q, k, v, make(keys[3]), make(keys[4])


def step(attend: Callable, passes: str) -> Callable:
    """Attention, or its gradients, of q, k, v and maps."""
    return attend if passes == "forward" else partial(gradients, attend)


def gradients(attend: Callable, *inputs: Any) -> tuple:
    return jax.grad(lambda *inputs: attend(*inputs).astype(jnp.float32).sum(), argnums=(0, 1, 2, 3, 4))(*inputs)


def program(attend: Callable, inputs: tuple, passes: str) -> dict[str, Any]:
    compiled = jax.jit(step(attend, passes)).lower(*inputs).compile()
    memory = compiled.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return {
        "memory_bytes": None if memory is None else sum(getattr(memory, part) for part in parts),
        "run": lambda: jax.block_until_ready(compiled(*inputs)),
    }


def torch_softmax(size: Size, passes: str) -> Callable[[], None]:
    import torch

    torch.set_num_threads(xla_threads())
    generator = torch.Generator().manual_seed(0)
    shape = 1, size.heads, size.tokens, size.head_dim
    q, k, v = (torch.randn(shape, generator=generator, dtype=getattr(torch, size.dtype)) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v)

    def both() -> None:
        leaves = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        torch.autograd.grad(attend(*leaves).float().sum(), leaves)

    return forward if passes == "forward" else both


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


def row(size: Size, passes: str, baseline_s: float, contender: dict[str, Any], seconds: list[float]) -> dict[str, Any]:
    median, flops = statistics.median(seconds), FORWARDS[passes] * size.flops(contender["rate"])
    bound = size.bound(contender["rate"])
    return contender | {
        "seconds": seconds,
        "median_s": median,
        "spread_s": [min(seconds), max(seconds)],
        "speedup": baseline_s / median,
        "bound": bound,
        "share_of_bound": baseline_s / median / bound,
        "flops": flops,
        "tflops_per_s": flops / median / 1e12,
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
    estimates = importlib.import_module("pallas_kernels.estimate")
    if chip not in estimates.CHIPS:
        raise InputError(f"--estimate: expected one of {', '.join(estimates.CHIPS)}, found {chip!r}")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError('--estimate: needs libtpu, found none: pip install "jsurgery[tpu]"')
    size = Size(tokens, heads, head_dim, "bfloat16", stabilizer)
    found: dict[str, Any] = {"static_estimate": True, "chip": chip, **dataclasses.asdict(size), "passes": {}}
    flash = partial(stock.hybrid_attention, num_softmax=tokens, platform="tpu")
    contenders: list[tuple[str, Rate, Callable]] = [("flash_attention", 1, flash)]
    for rate in dict.fromkeys((1, *rates)):
        options = {"num_softmax": size.num_softmax(rate), "stabilizer": stabilizer, "implementation": "tpu"}
        contenders.append((name_of(rate), rate, partial(hybrid_attention, **options)))
    for passes in PASSES if backward else PASSES[:1]:
        rows = []
        for name, rate, attend in contenders:
            say(f"bench: estimating {name}, {passes}")
            cycles = whole_layer(partial(estimates.estimate_cycles, chip), size, rate, step(attend, passes))
            rows.append({"name": name, "rate": rate, "cycles": cycles, "bound": size.bound(rate)})
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


def whole_layer(estimate: Callable[..., dict[str, int]], size: Size, rate: Rate, function: Callable) -> float:
    """Cycles of all heads and queries, from one tile of heads at two numbers of queries: the compiler's memory grows
    with the grid, and cycles are linear in either."""
    heads = 1 if size.head_dim % 128 == 0 else math.gcd(size.heads, 2)
    block = min(2048, size.tokens)

    def cycles(num_queries: int) -> int:
        dtype = jnp.dtype(size.dtype)
        q, k = (jax.ShapeDtypeStruct((1, n, heads, size.head_dim), dtype) for n in (num_queries, size.tokens))
        maps = jax.eval_shape(lambda: arguments(dataclasses.replace(size, tokens=1, heads=heads), rate)[3:])
        return sum(estimate(function, q, k, k, *maps).values())

    one = cycles(block)
    slope = (cycles(2 * block) - one) / block if size.tokens > block else 0.0
    return (one + slope * (size.tokens - block)) * size.heads / heads


def tune_attention(
    *, rates: tuple[Rate, ...], tokens: int, heads: int, head_dim: int, stabilizer: str, runs: int
) -> None:
    """Measures block sizes on this accelerator, in bfloat16, and keeps the best of each rate in tuned.json."""
    backend = jax.default_backend()
    if backend not in ("gpu", "tpu"):
        raise InputError(f"--tune: block sizes are measured on a TPU or GPU, found {backend} alone")
    kernels = importlib.import_module(f"pallas_kernels.{backend}")
    size = Size(tokens, heads, head_dim, "bfloat16", stabilizer)
    start = vars(kernels.BlockSizes()) if backend == "tpu" else kernels.BLOCK_SIZES[jnp.dtype(size.dtype)]._asdict()
    for rate in rates:
        inputs, num_softmax = arguments(size, rate), size.num_softmax(rate)

        def seconds(blocks: dict[str, int], passes: str, inputs=inputs, num_softmax=num_softmax) -> float:
            try:
                attend = partial(
                    kernels.hybrid_attention,
                    num_softmax=num_softmax,
                    stabilizer=stabilizer,
                    block_sizes=kernels.BlockSizes(**blocks),
                )
                run = program(attend, inputs, passes)["run"]
                run()
                return statistics.median(timed(run) for _ in range(runs))
            except (ValueError, jax.errors.JaxRuntimeError):  # blocks that do not divide, or do not fit
                return math.inf

        blocks = search(start, seconds)
        tuning.save(tuning.current_chip(), tokens, num_softmax, blocks)
        print(f"{tuning.current_chip()} {name_of(rate)}: {blocks}", flush=True)
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
