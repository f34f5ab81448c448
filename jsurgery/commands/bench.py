"""Comparisons with other implementations: bench transformer, bench distill, bench attention, verify."""

import argparse

from jsurgery.commands.options import (
    Commands,
    Options,
    Overrides,
    Parser,
    add_json,
    add_size,
    rates,
    takes_no_config,
)
from jsurgery.load_config import load_config

DTYPES, RATES = ("float32", "bfloat16"), "1,2,4,8,linear"


def add(commands: Commands) -> None:
    text = "Compare a checkpoint's outputs with those of diffusers and transformers, on this machine."
    command = commands.add("verify", run_verify, text, config=None)
    command.add_argument("--model", required=True, help="A folder, a bundled name or a repository.")
    add_size(command, frames=5, height=64, width=96)
    add_json(command)

    text = "Time the transformer, a distillation step or an attention layer, compared with other implementations."
    subjects = Commands(commands.add_group("bench", text), "SUBJECT", prefix="bench ")
    text = "Time our forward and that of diffusers in turn, on the CPU."
    add_transformer(subjects.add_without_config("transformer", run_transformer, text))
    text = "Compare the distillation of all blocks and rates in one pass with that of one block and one rate at a time."
    add_distill(subjects.add_without_config("distill", run_distill, text))
    text = "Compare hybrid attention with full softmax by the best stock kernel for this machine."
    add_attention(subjects.add_without_config("attention", run_attention, text))


def add_transformer(command: Parser) -> None:
    weights = command.add_mutually_exclusive_group()
    weights.add_argument("--model", help="A folder, a bundled name or a repository.")
    weights.add_argument(
        "--size",
        choices=["1.3b", "tiny"],
        default="1.3b",
        help="The size, with random weights (default: 1.3b).",
    )
    add_size(command, frames=1, height=480, width=832)
    add_size(command, text_length=512)
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="The type of weights (default: float32).")
    add_size(command, runs=3)
    add_json(command)


def add_distill(command: Parser) -> None:
    text = "A file or the name of a shipped config (default: tiny). If it names a model, a step is timed."
    command.add_argument("--config", default="tiny", help=text)
    add_size(command, runs=3)
    add_json(command)


def add_attention(command: Parser) -> None:
    command.add_argument("--rates", type=rates, default=rates(RATES), help=f"The rates (default: {RATES}).")
    add_size(command, tokens=16384, heads=12, head_dim=128, runs=3)
    command.add_argument("--dtype", choices=DTYPES, help="The type (default: float32 on CPU, else bfloat16).")
    text = "What divides the exponentials: that of the largest logit, or the sum of softmax (default: lse)."
    command.add_argument("--stabilizer", choices=["max", "lse"], default="lse", help=text)
    choices = ["xla", "reference", "tpu", "gpu", "stock"]
    command.add_argument("--implementation", choices=choices, help="Which implementation (default: the device's).")
    command.add_argument("--backward", action="store_true", help="Also time forward and backward together.")
    text = "Also time whole forwards of Wan2.1 1.3B with these plans, such as 15R2,20R8, and with softmax alone."
    command.add_argument("--plans", type=lambda text: tuple(text.split(",")), default=(), help=text)
    text = "Also time attention in causal chunks, by the tokens of a chunk and of its overlap, such as 4680,1560."
    command.add_argument("--chunked", type=chunk_and_overlap, metavar="CHUNK,OVERLAP", help=text)
    text = "Also time sparse-linear attention, with this share of the key blocks, such as 0.1."
    command.add_argument("--sparse", type=share, metavar="SHARE", help=text)
    add_json(command)
    text = "Estimate cycles on a v4, v5e, v5p or v6e by the TPU compiler instead. That needs no TPU."
    command.add_argument("--estimate", metavar="CHIP", help=text)
    text = "Find and keep the best block sizes, by timing on this TPU or GPU, or by the cycles of --estimate."
    command.add_argument("--tune", action="store_true", help=text)


def chunk_and_overlap(text: str) -> tuple[int, int]:
    """("4680,1560") -> (4680, 1560)."""
    chunk, overlap = (int(part) for part in text.split(","))
    if chunk < 1 or overlap < 0:
        raise argparse.ArgumentTypeError(f"expected a chunk of at least 1 token and an overlap, found {text}")
    return chunk, overlap


def share(text: str) -> float:
    """("0.1") -> 0.1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, found {text}")
    return float(text)


def run_verify(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.bench.verify import verify

    verify(options.model, options.frames, options.height, options.width, options.json)


def run_transformer(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.bench.transformer import bench_transformer

    bench_transformer(
        model=options.model,
        size=options.size,
        frames=options.frames,
        height=options.height,
        width=options.width,
        text_length=options.text_length,
        dtype=options.dtype,
        runs=options.runs,
        report=options.json,
    )


def run_distill(options: Options, overrides: Overrides) -> None:
    config = load_config(options.config, overrides)
    from jsurgery.bench.distillation import bench_distill

    bench_distill(config, options.config, runs=options.runs, report=options.json)


def run_attention(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.bench.attention import bench_attention
    from jsurgery.bench.attention_cycles import estimate_attention
    from jsurgery.bench.attention_tuning import tune_attention
    from jsurgery.estimate.quiet_libtpu import quiet_libtpu

    layer = {name: getattr(options, name) for name in ("rates", "tokens", "heads", "head_dim", "stabilizer")}
    if options.estimate is not None:
        with quiet_libtpu():
            if options.tune:
                tune_attention(**layer, runs=options.runs, chip=options.estimate)
            else:
                estimate_attention(**layer, chip=options.estimate, backward=options.backward, report=options.json)
    elif options.tune:
        tune_attention(**layer, runs=options.runs, chip=None)
    else:
        bench_attention(
            **layer,
            dtype=options.dtype,
            implementation=options.implementation,
            runs=options.runs,
            backward=options.backward,
            plans=options.plans,
            chunked=options.chunked,
            sparse=options.sparse,
            report=options.json,
        )
