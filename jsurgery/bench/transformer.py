"""bench: our transformer's forward beside the reference's, alternating in one process on the CPU."""

import concurrent.futures
import contextlib
import dataclasses
import importlib
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from jsurgery.bench.torch_reference import (
    REFERENCE,
    need_reference,
    reference_transformer,
    reference_velocity,
)
from jsurgery.config import check_video
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report, peak_bytes, processor, relative_error, versions, xla_threads
from jsurgery.runtime.progress import say
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
    """Prints the times of `runs` forwards of each, and what loading took; with `report` also as a JSON file.

    The model is a folder or repository, or without one random weights of a `size`, saved by diffusers for the occasion.
    Each forward is one of batch 1; the first of each side, which compiles or warms up, is not counted.
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
        shape = 1, *latent_grid(frames, height, width), network.in_channels
        found = {
            "model": size if model is None else model,
            "video": {"frames": frames, "height": height, "width": width},
            "latents": list(shape),
            "text_length": text_length,
            "dtype": dtype,
            "reference": "jsurgery.export.torch_model" if network.hybrid else "diffusers",
            **alternate(folder, network, shape, text_length, dtype, runs),
        }
    ratios = [run["ratio"] for run in found["runs"]]
    found["median_ratio"], found["spread"] = statistics.median(ratios), [min(ratios), max(ratios)]
    print(
        f"ours / {found['reference']}: median {found['median_ratio']:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}"
    )
    print(f"largest relative difference: {found['relative_difference']:.2e} ({dtype})")
    print(
        f"loading: {found['load_s']:.1f} s, peak memory {found['peak_bytes'] / 1e9:.2f} GB "
        f"(of which {found['peak_bytes_before'] / 1e9:.2f} GB before)"
    )
    machine = found["machine"]
    print(f"{machine['name']}: {machine['processor']}, {machine['threads']} threads each")
    if report is not None:
        write_json(epath.Path(report), found)


def alternate(
    folder: epath.Path, network: WanConfig, shape: tuple[int, ...], text_length: int, dtype: str, runs: int
) -> dict[str, Any]:
    """Times and differences. Ours loads first, so that the memory's peak is its own."""
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

    measured, difference = [], 0.0
    for number, each in enumerate(inputs, start=1):
        (ours_s, velocity), (theirs_s, expected) = timed(ours, *each), timed(theirs, *each)
        difference = max(difference, relative_error(velocity, expected))
        measured.append({"ours_s": ours_s, "reference_s": theirs_s, "ratio": ours_s / theirs_s})
        print(
            f"run {number}: ours {ours_s:.3f} s, reference {theirs_s:.3f} s, ratio {ours_s / theirs_s:.3f}", flush=True
        )
    return {
        "runs": measured,
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


def timed(forward: Callable[..., np.ndarray], *inputs: np.ndarray) -> tuple[float, np.ndarray]:
    """(seconds, velocity on the host)."""
    start = time.perf_counter()
    velocity = forward(*inputs)
    return time.perf_counter() - start, velocity


@contextlib.contextmanager
def random_model(network: WanConfig) -> Iterator[epath.Path]:
    """A folder with random weights that diffusers wrote, in a process of its own so that its memory is not ours."""
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
