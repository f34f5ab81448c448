"""Seconds of attention layers, whole forwards and distillation steps, each in turn with its baseline."""

import functools
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jsurgery.bench import attention as bench_attention
from jsurgery.bench.attention_programs import PHI, AttentionShape, forward, random_softmax_model, torch_softmax
from jsurgery.bench.gpu_evidence.rows import Row, Scale
from jsurgery.bench.transformer import SIZES
from jsurgery.config import base
from jsurgery.runtime.timing import timed
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.surgery.distillation.update import initial_maps, make_optimizer, make_update
from jsurgery.wan.cost import Workload, distillation_flops, model_flops
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.video_size import latent_grid

STABILIZER = "lse"
LONG = 5.0  # seconds: a row whose run takes longer is measured once


def measured(baseline: dict[str, Any] | None, contender: dict[str, Any], runs: int) -> dict[str, Any]:
    """The `row` of the contender, which takes turns with the baseline. Without a baseline there is no speed-up."""
    run = contender.pop("run")
    both = [run] if baseline is None or baseline["run"] is run else [baseline["run"], run]
    seconds: list[list[float]] = [[] for _ in both]
    for number in range(runs + 1):
        for times, each in zip(seconds, both, strict=True):
            times.append(timed(each)[0])
        if number and max(times[-1] for times in seconds) > LONG:
            break
    seconds = [times[1:] for times in seconds]  # the first warms up
    median = statistics.median(seconds[0])
    result = bench_attention.row(median, contender, seconds[-1])
    del result["memory_bytes"]  # the compiler's estimate, not a measurement
    if baseline is None:
        del result["speedup"], result["share_of_bound"]
        return result
    return result | {"baseline": baseline["name"], "baseline_median_s": median}


def attention(row: Row, scale: Scale) -> dict[str, Any]:
    """One contender in turn with the stock softmax of the platform, on GPUs JAX's cuDNN attention."""
    assert row.tokens is not None and row.passes is not None and row.rate is not None and row.implementation is not None
    size = AttentionShape(row.tokens, scale.heads, scale.head_dim, scale.dtype, STABILIZER)
    platform = jax.default_backend()
    if row.implementation == "cudnn":
        if platform != "gpu":
            raise NotImplementedError(f"JAX runs cuDNN on GPUs alone, found {platform}")
        contender = stock_softmax(size, row.passes) | {}
    elif row.implementation.startswith("torch"):
        run = torch_run(row.implementation.removeprefix("torch "), size, row.passes)
        contender = {"memory_bytes": None, "run": run}
    elif row.implementation == "gpu" and platform != "gpu":
        raise NotImplementedError("without a GPU our kernels are only interpreted, and their time means nothing")
    else:
        contender = bench_attention.ours(size, row.rate, row.implementation, row.passes)
    contender |= {
        "name": row.name,
        "flops": bench_attention.FORWARDS[row.passes] * size.flops(row.rate),
        "bound": size.bound(row.rate),
    }
    return measured(baseline_of(size, row.passes), contender, scale.runs)


@functools.lru_cache(maxsize=len(bench_attention.PASSES))
def stock_softmax(size: AttentionShape, passes: str) -> dict[str, Any]:
    return bench_attention.baseline(size, jax.default_backend(), passes)


@functools.lru_cache(maxsize=len(bench_attention.PASSES))
def baseline_of(size: AttentionShape, passes: str) -> dict[str, Any] | None:
    """`stock_softmax`, or None where it does not run. The row of the stock softmax itself then gives the reason."""
    try:
        return stock_softmax(size, passes)
    except Exception:
        return None


def torch_run(backend: str, size: AttentionShape, passes: str) -> Callable[[], None]:
    """A run of full softmax by a backend of torch, on the GPU if JAX has one. It waits until the GPU has finished."""
    import torch

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no GPU")
    run = torch_softmax(size, passes, torch_attention(backend, on_gpu), "cuda" if on_gpu else "cpu")

    def whole_run() -> None:
        run()
        if on_gpu:
            torch.cuda.synchronize()

    return whole_run


def torch_attention(backend: str, compiled: bool) -> Callable[..., Any]:
    """`attend(q, k, v)` by torch's "flex", "flash" or "cudnn" attention; flex attention can be `compiled`."""
    import torch
    from torch.nn import attention

    if backend == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        if not compiled:
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return flex_attention
        torch.compiler.reset()  # else torch.compile falls back to dynamic shapes after other sizes
        return torch.compile(flex_attention, dynamic=False)
    chosen = {"flash": attention.SDPBackend.FLASH_ATTENTION, "cudnn": attention.SDPBackend.CUDNN_ATTENTION}[backend]

    def attend(q: Any, k: Any, v: Any) -> Any:
        with attention.sdpa_kernel(chosen):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return attend


def whole_forward(row: Row, scale: Scale) -> dict[str, Any]:
    """The forward of a plan in turn with the softmax model's."""
    assert row.video is not None
    baseline = softmax_forward(scale, row.video)
    if row.name == "softmax":
        return measured(baseline, baseline | {}, scale.runs)
    plan = forward(softmax_model(scale), row.name, row.video, STABILIZER, scale.text_length)
    return measured(baseline, plan, scale.runs)


@functools.lru_cache(maxsize=1)
def softmax_model(scale: Scale) -> WanTransformer:
    return random_softmax_model(SIZES[scale.model], scale.dtype)


@functools.lru_cache(maxsize=1)
def softmax_forward(scale: Scale, video: tuple[int, int, int]) -> dict[str, Any]:
    return forward(softmax_model(scale), "softmax", video, STABILIZER, scale.text_length)


def distillation(row: Row, scale: Scale) -> dict[str, Any]:
    """A step of `jsurgery distill`, for every block at every rate, in turn with the teacher's forward."""
    assert row.video is not None
    config = base()
    config.model.dtype, config.text_length = scale.dtype, scale.text_length
    config.video.frames, config.video.height, config.video.width = row.video
    baseline, teacher = softmax_forward(scale, row.video), softmax_model(scale)
    network, optimizer = teacher.config, make_optimizer(config)
    graph, params = nnx.split(teacher)
    maps = initial_maps(config, teacher)
    state: dict[str, Any] = {"maps": maps, "opt_state": optimizer.init(maps)}  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    shapes = {
        "latents": (config.distill.batch, *latent_grid(*row.video, network.strides), network.in_channels),
        "text": (config.distill.batch, config.text_length, network.text_dim),
    }
    batch = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    batch["timestep"] = jnp.full(config.distill.batch, 500.0)
    step = make_update(optimizer, graph, DistillSpec.of(config)).lower(state, params, batch).compile()
    losses: list[np.ndarray] = []

    def run() -> None:
        nonlocal state
        state, loss = step(state, params, batch)
        losses.append(np.asarray(loss))

    work = Workload(network, 0, config.text_length, PHI).of_video(*row.video)
    flops = distillation_flops(work, config.hybrid.rates)
    bound = model_flops(work, (1,) * network.num_layers) / flops
    contender = {"name": row.name, "flops": flops, "bound": bound, "memory_bytes": None, "run": run}
    result = measured(baseline, contender, scale.runs)
    if not all(np.isfinite(each).all() for each in losses):
        raise FloatingPointError("a loss is not finite")
    return result | {
        "rates": list(config.hybrid.rates),
        "blocks": network.num_layers,
        "mean_losses": [float(each.mean()) for each in losses],
    }
