"""Comparisons with other implementations: bench transformer, bench distill, bench attention, verify."""

from jsurgery.commands.options import (
    Commands,
    Options,
    Overrides,
    Parser,
    add_json,
    add_size,
    positive,
    rates,
    takes_no_config,
)
from jsurgery.load_config import load_config


def add(commands: Commands) -> None:
    text = "compare a checkpoint's outputs with those of diffusers and transformers, on this machine"
    command = commands.add("verify", run_verify, text, config=None)
    command.add_argument("--model", required=True, help="a folder, a bundled name or a repository")
    add_size(command, frames=5, height=64, width=96)
    add_json(command)

    text = "time the transformer, a distillation step or an attention layer, compared with other implementations"
    subjects = Commands(commands.add_group("bench", text), "SUBJECT", prefix="bench ")
    text = "our forward compared with that of diffusers, on the CPU"
    add_transformer(subjects.add_without_config("transformer", run_transformer, text))
    text = "distillation of all blocks and rates in one pass, compared with one block and one rate at a time"
    add_distill(subjects.add_without_config("distill", run_distill, text))
    text = "hybrid attention compared with full softmax by the best stock kernel for this machine"
    add_attention(subjects.add_without_config("attention", run_attention, text))


def add_transformer(command: Parser) -> None:
    weights = command.add_mutually_exclusive_group()
    weights.add_argument("--model", help="a folder, a bundled name or a repository")
    weights.add_argument("--size", choices=["1.3b", "tiny"], default="1.3b", help="random weights (default: 1.3b)")
    add_size(command, frames=1, height=480, width=832)
    command.add_argument("--text_length", type=positive, default=512)
    command.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    command.add_argument("--runs", type=positive, default=3)
    add_json(command)


def add_distill(command: Parser) -> None:
    text = "if it names a model, a step is timed; otherwise only FLOPs are counted (default: tiny)"
    command.add_argument("--config", default="tiny", help=text)
    command.add_argument("--runs", type=positive, default=3)
    add_json(command)


def add_attention(command: Parser) -> None:
    command.add_argument("--rates", type=rates, default=rates("1,2,4,8,linear"), help="default: 1,2,4,8,linear")
    add_size(command, tokens=16384, heads=12, head_dim=128, runs=3)
    command.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on CPU, else bfloat16")
    command.add_argument("--stabilizer", choices=["max", "lse"], default="lse")
    choices = ["xla", "reference", "tpu", "gpu", "stock"]
    command.add_argument("--implementation", choices=choices, help="default: chosen by the device")
    command.add_argument("--backward", action="store_true", help="also time forward and backward together")
    text = "such as 15R2,20R8: also time whole forwards of Wan2.1 1.3B at 480x832, 81 frames, and with softmax alone"
    command.add_argument("--plans", type=lambda text: tuple(text.split(",")), default=(), help=text)
    add_json(command)
    text = "instead estimate cycles on a v4, v5e, v5p or v6e by the TPU compiler; needs no TPU"
    command.add_argument("--estimate", metavar="CHIP", help=text)
    text = "find and keep the best block sizes, by timing on this TPU or GPU, or by the cycles of --estimate"
    command.add_argument("--tune", action="store_true", help=text)


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

    layer = {name: getattr(options, name) for name in ("rates", "tokens", "heads", "head_dim", "stabilizer")}
    if options.tune:
        tune_attention(**layer, runs=options.runs, chip=options.estimate)
    elif options.estimate is not None:
        estimate_attention(**layer, chip=options.estimate, backward=options.backward, report=options.json)
    else:
        bench_attention(
            **layer,
            dtype=options.dtype,
            implementation=options.implementation,
            runs=options.runs,
            backward=options.backward,
            plans=options.plans,
            report=options.json,
        )
