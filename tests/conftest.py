import dataclasses
import gc
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jsurgery.runtime.compile_cache import MOST_BYTES, default_folder, prune

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile many small programs and run each a few times: optimisation and more threads cost more than they save.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1 "
) + os.environ.get("XLA_FLAGS", "")
# Compiled programs are shared with other processes, later runs of the tests and other checkouts.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{default_folder()}_tests")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsurgery.data import sprites
from jsurgery.wan.checkpoint import save_text_encoder, save_transformer, save_vae
from jsurgery.wan.model_config import TextEncoderConfig, VaeConfig, WanConfig
from jsurgery.wan.models import VAE_5B, takes_image
from jsurgery.wan.pipeline_parts import write_pipeline_index
from jsurgery.wan.text_encoder import TextEncoder
from jsurgery.wan.tokenizer import train_tokenizer
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.vae import WanVae

# Traced programs are millions of long-lived objects, and garbage collection takes a tenth of the time. The oldest are
# therefore not collected, and those of finished files are not looked at again.
gc.set_threshold(200_000, 20, 200)

# `make kernels`: all shapes and meshes in the tests that otherwise take a sample of them.
FULL_GRID = os.environ.get("FULL_GRID") == "1"

# The slowest files start first, so that no process is left running one at the end.
LONGEST = (
    "export/test_export.py",
    "test_notebooks.py",
    "runtime/test_processes.py",
    "surgery/test_phases.py",
    "wan/test_weights.py",
    "pallas_kernels/test_xla.py",
    "pallas_kernels/test_tpu.py",
    "pallas_kernels/test_gpu.py",
    "ablate/test_evidence.py",
    "wan/test_sharded_model.py",
    "pallas_kernels/test_tpu_compiler.py",
    "estimate/test_compile_ahead.py",
    "ablate/test_run_tables.py",
    "surgery/test_resume.py",
    "surgery/distillation/test_distill.py",
    "surgery/distillation/test_sharded.py",
    "bench/test_gpu_evidence.py",
    "train/test_training.py",
    "bench/test_verify.py",
    "wan/test_vae.py",
    "test_run.py",
    "faults/test_soak.py",
    "pallas_kernels/test_estimate.py",
)
FOLDER = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {FOLDER / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


# libtpu has wheels for Linux on x86-64 only. There the `test` extra installs it, and tests fail without it.
needs_libtpu = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="libtpu runs on Linux on x86-64 alone: nothing was compiled for TPUs",
)
TINY_VAE = VaeConfig(
    base_dim=4,
    z_dim=4,
    num_res_blocks=1,
    latents_mean=(0.1, -0.2, 0.3, 0.0),
    latents_std=(1.0, 0.9, 1.1, 1.2),
)
TINY_TEXT_ENCODER = TextEncoderConfig(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=1)
TINY_TRANSFORMER = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=48,
    num_layers=2,
)


# Likewise of the kind of Wan2.2 TI2V 5B, whose 48 channels tell it from Wan2.1.
TINY_VAE_2_2 = VaeConfig(**VAE_5B | {"base_dim": 4, "decoder_base_dim": 4, "num_res_blocks": 1})
TINY_TRANSFORMER_2_2 = dataclasses.replace(TINY_TRANSFORMER, in_channels=48, out_channels=48)


@pytest.fixture(scope="module", autouse=True)
def uncollected() -> Iterator[None]:
    yield
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    prune(pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]), MOST_BYTES)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A complete Wan pipeline folder with random weights: 2 blocks of 2 heads of 12, latents of 4 channels.

    Shared by the whole session: copy it to change it. `--config.video.frames=5 --config.video.height=64
    --config.video.width=48` gives 2 x 4 x 3 tokens.
    """
    return build_tiny_pipeline(tmp_path_factory.mktemp("tiny_pipeline"))


@pytest.fixture(scope="session")
def tiny_pipeline_2_2(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Like `tiny_pipeline`, of the kind of Wan2.2 TI2V 5B: twice the sides give as many tokens."""
    folder = tmp_path_factory.mktemp("tiny_pipeline_2_2")
    return build_tiny_pipeline(folder, TINY_TRANSFORMER_2_2, TINY_VAE_2_2)


def build_tiny_pipeline(
    folder: pathlib.Path, transformer_config: WanConfig = TINY_TRANSFORMER, vae_config: VaeConfig = TINY_VAE
) -> pathlib.Path:
    """Writes the folder of the fixture `tiny_pipeline`, for callers that are not tests."""
    tokenizer = train_tokenizer(sprites.all_captions(), folder / "tokenizer", vocab_size=TINY_TEXT_ENCODER.vocab_size)
    assert tokenizer.vocab_size <= TINY_TEXT_ENCODER.vocab_size
    rng = np.random.default_rng(0)
    save_vae(random_module(lambda: WanVae(vae_config, rngs=nnx.Rngs(0)), rng), folder / "vae")
    encoder = random_module(lambda: TextEncoder(TINY_TEXT_ENCODER, rngs=nnx.Rngs(0)), rng)
    save_text_encoder(encoder, folder / "text_encoder")
    transformer = random_module(lambda: WanTransformer(transformer_config, rngs=nnx.Rngs(0)), rng)
    save_transformer(transformer, folder / "transformer")
    write_pipeline_index(folder, shift=3.0, takes_image=takes_image(transformer_config.in_channels))
    return folder


def random_module(build, rng: np.random.Generator) -> nnx.Module:
    """The module with weights drawn by NumPy, which compiles nothing; no bias or gain has its default value."""
    module = nnx.eval_shape(build)
    for (*_, leaf), param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        values = rng.normal(size=param.shape)
        if leaf in ("kernel", "embedding"):
            values /= math.sqrt(math.prod(param.shape[:-1]))
        elif leaf == "bias" or "scale_shift" in str(leaf):
            values *= 0.1
        else:
            values = 1 + 0.1 * values
        param.set_value(jnp.asarray(values, param.dtype))
    return module


@pytest.fixture(scope="session")
def random_transformer() -> Callable[[WanConfig], WanTransformer]:
    """Makes transformers, hybrid or not, with no tensor near its default: biases and gates are as large as kernels."""

    def make(config: WanConfig) -> WanTransformer:
        rng = np.random.default_rng(0)
        model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))

        def draw(path, leaf):
            noise, name = rng.normal(size=leaf.shape), jax.tree_util.keystr(path)
            gain = "norm" in name and "bias" not in name
            return jnp.asarray(1 + 0.3 * noise if gain else 0.2 * noise, leaf.dtype)

        nnx.update(model, jax.tree.map_with_path(draw, nnx.state(model)))
        return model

    return make


FAKE_DEVICES = """
import contextlib, gc, io, json, sys, traceback

gc.set_threshold(200_000, 20, 200)
for line in sys.stdin:
    script, sys.argv[1:] = json.loads(line)
    error, printed = "", io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    except Exception:
        error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), flush=True)
"""


@pytest.fixture(scope="session")
def on_fake_devices() -> Iterator[Callable[..., list[Any]]]:
    """Runs a script in a process with 8 CPU devices, shared by all scripts; returns the JSON values that it printed."""
    process = None

    def run(script: str, *arguments: str) -> list[Any]:
        nonlocal process
        if process is None:
            flags = "--xla_force_host_platform_device_count=8 " + os.environ["XLA_FLAGS"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = subprocess.Popen(
                [sys.executable, "-c", FAKE_DEVICES], env=os.environ | {"XLA_FLAGS": flags}, **pipes
            )
        process.stdin.write(json.dumps([script, arguments]) + "\n")
        process.stdin.flush()
        printed, error = json.loads(process.stdout.readline() or '["", "the process ended"]')
        assert not error, error
        return [json.loads(line) for line in printed.splitlines()]

    yield run
    if process is not None:
        process.stdin.close()
        process.wait()
