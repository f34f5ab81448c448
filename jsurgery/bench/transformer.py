"""bench transformer: our forward and the torch reference's take turns in one process on the CPU."""

import concurrent.futures
import contextlib
import dataclasses
import importlib
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from jsurgery.bench.torch_reference import REFERENCE, need_reference, reference_transformer, reference_velocity
from jsurgery.config import check_video
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report, peak_bytes, processor, relative_error, versions, xla_threads
from jsurgery.runtime.progress import say
from jsurgery.runtime.timing import timed
from jsurgery.wan.checkpoint import load_transformer, read_config
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_folder import model_path, transformer_folder
from jsurgery.wan.video_size import check_size, latent_grid

SIZES = {
    "1.3b": WanConfig(),
    "tiny": WanConfig(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
    ),
}


def bench_transformer(
    *,
    model: str | None,
    size: str,
    frames: int,
    height: int,
    width: int,
    text_length: int,
    dtype: str,
    runs: int,
    report: str | None = None,
) -> None:
    """Prints the seconds of `runs` forwards on each side, and time and memory of loading ours.

    `report` names a JSON file for the same numbers. `model` is a folder or repository; without it diffusers saves a
    model of a `size` with random weights. The batch size is 1. The first forward of each side, which compiles or warms
    up, is not counted. Raises InputError for a size that the model does not take and for missing libraries.
    """
    check_report(report)
    need_reference()
    check_video(frames, height, width, prefix="--")
    with contextlib.ExitStack() as stack:
        if model is None:
            check_size(SIZES[size], frames, height, width)
            folder = stack.enter_context(random_model(SIZES[size]))
        else:
            folder = transformer_folder(model_path(model))
        stack.enter_context(jax.default_device(jax.devices("cpu")[0]))
        network = read_config(folder)
        check_size(network, frames, height, width)
        shape = 1, *latent_grid(frames, height, width, network.strides), network.in_channels
        result = {
            "model": size if model is None else model,
            "video": {"frames": frames, "height": height, "width": width},
            "latents": list(shape),
            "text_length": text_length,
            "dtype": dtype,
            "reference": "jsurgery.export.torch_model" if network.hybrid else "diffusers",
            **compare_forwards(folder, network, shape, text_length, dtype, runs),
        }
    ratios = [run["ratio"] for run in result["runs"]]
    result["median_ratio"], result["spread"] = statistics.median(ratios), [min(ratios), max(ratios)]
    median = result["median_ratio"]
    print(f"ours / {result['reference']}: median {median:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
    print(f"largest relative difference: {result['relative_difference']:.2e} ({dtype})")
    print(
        f"loading ours: {result['load_s']:.1f} s, peak memory of the process {result['peak_bytes'] / 1e9:.2f} GB, "
        f"before loading {result['peak_bytes_before'] / 1e9:.2f} GB"
    )
    machine = result["machine"]
    print(f"{machine['name']}: {machine['processor']}, {machine['threads']} threads each")
    if report is not None:
        write_json(epath.Path(report), result)


def compare_forwards(
    folder: epath.Path, network: WanConfig, shape: tuple[int, ...], text_length: int, dtype: str, runs: int
) -> dict[str, Any]:
    """Seconds of both forwards, their relative difference, what was measured and on what; for JSON.

    Ours loads first, so that torch takes no part in the peak of memory.
    """
    before = peak_bytes()
    say("bench: loading ours")
    start = time.perf_counter()
    transformer = load_transformer(folder, np.dtype(dtype))
    jax.block_until_ready(nnx.state(transformer))
    loading = {"load_s": time.perf_counter() - start, "peak_bytes": peak_bytes(), "peak_bytes_before": before}

    rng = np.random.default_rng(0)
    latents, text = (rng.normal(size=size).astype(np.float32) for size in (shape, (1, text_length, network.text_dim)))
    inputs = [(latents, np.array([timestep], np.float32), text) for timestep in np.linspace(950, 50, runs)]
    graph, params = nnx.split(transformer)
    forward = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs))
    ours = lambda *inputs: np.asarray(forward(params, *inputs), np.float32)
    say("bench: compiling ours")
    compile_s, _ = timed(ours, *inputs[0])

    say("bench: loading the reference")
    import torch

    threads = xla_threads()
    torch.set_num_threads(threads)
    module = reference_transformer(folder, network, dtype)
    theirs = lambda *inputs: reference_velocity(module, *inputs)
    theirs(*inputs[0])

    rows, difference = [], 0.0
    for number, each in enumerate(inputs, start=1):
        (ours_s, velocity), (theirs_s, expected) = timed(ours, *each), timed(theirs, *each)
        difference = max(difference, relative_error(velocity, expected))
        rows.append({"ours_s": ours_s, "reference_s": theirs_s, "ratio": ours_s / theirs_s})
        ratio = f"ratio {ours_s / theirs_s:.3f}"
        print(f"run {number}: ours {ours_s:.3f} s, reference {theirs_s:.3f} s, {ratio}", flush=True)
    return {
        "runs": rows,
        "relative_difference": difference,
        "compile_s": compile_s,
        **loading,
        "machine": {
            "name": platform.node(),
            "processor": processor(),
            "system": platform.platform(),
            "threads": threads,
        },
        "versions": versions(("jsurgery", "jax", "jaxlib", "flax", *REFERENCE)),
    }


@contextlib.contextmanager
def random_model(network: WanConfig) -> Iterator[epath.Path]:
    """A folder of random weights. diffusers writes it in a process of its own, so that its memory is not measured."""
    with tempfile.TemporaryDirectory() as folder:
        say("bench: diffusers writes a random model")
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            pool.submit(save_random, network, folder).result()
        yield epath.Path(folder)


def save_random(network: WanConfig, folder: str) -> None:
    import torch

    diffusers: Any = importlib.import_module("diffusers")
    torch.manual_seed(0)
    fields = dataclasses.asdict(network)
    del fields["hybrid"]
    diffusers.WanTransformer3DModel(**fields).save_pretrained(folder)
