"""The commands. Exit codes: 0 done, 1 a fault of ours, 2 bad input, 3 does not fit, 4 parity breached."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from jsurgery.config import load_config
from jsurgery.errors import DoesNotFit, InputError, ParityError

STAGES = ("trace", "distill", "plan", "operate", "finetune", "evaluate", "report")
SAMPLE_FIELDS = {
    "model": "model.path",
    "frames": "video.frames",
    "height": "video.height",
    "width": "video.width",
    "steps": "sampler.steps",
    "guidance": "sampler.guidance",
    "shift": "sampler.shift",
    "solver": "sampler.solver",
    "negative_prompt": "sampler.negative_prompt",
    "seed": "seed",
}
COST_FIELDS = {name: f"video.{name}" for name in ("frames", "height", "width")}
CODES = {InputError: 2, DoesNotFit: 3, ParityError: 4}


def main(arguments: Sequence[str] | None = None) -> int:
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax talks about every save
    try:
        options, overrides = parse(sys.argv[1:] if arguments is None else arguments)
        options.command(options, overrides)
    except tuple(CODES) as error:
        message = " ".join(str(error).split())
        print(f"jsurgery: {message}", file=sys.stderr)
        return CODES[type(error)]
    return 0


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str):
        raise InputError(f"{message} (see `{self.prog} --help`)")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Options of a command, and the `--config.a.b=value` overrides among the arguments."""
    overrides, rest = {}, []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--config."):
            if not equals:
                raise InputError(f"{name}: expected {name}=VALUE")
            overrides[name.removeprefix("--config.")] = value
        else:
            rest.append(argument)

    parser = Parser(prog="jsurgery", description="Attention surgery for video diffusion transformers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Callable, text: str, config: str | None = "tiny") -> Parser:
        sub = commands.add_parser(name, help=text, description=text)
        kind = f"a config file, or the name of a shipped one (default: {config or 'by the model'})"
        sub.add_argument("--config", default=config, help=kind)
        sub.set_defaults(command=run, name=name)
        return sub

    texts = {
        "surgery": "all stages in order; running it again resumes",
        "trace": "sample the teacher and keep the noisy latents on the way",
        "distill": "train the feature maps of every block at every rate",
        "plan": "choose every block's rate under the budget",
        "operate": "build the hybrid model",
        "finetune": "train the whole hybrid model briefly",
        "evaluate": "sample and score the model of every stage",
        "report": "write report.html",
        "train": "train a tiny teacher from scratch",
    }
    for name, text in texts.items():
        sub = command(name, train if name == "train" else surgery, text)
        sub.add_argument("--workdir", required=True, help="where the files of this run go")
        if name == "plan":
            sub.add_argument("--front", action="store_true", help="also all plans that no other beats, as front.json")
    sub = command("cost", cost, "parameters, FLOPs and bytes of a block and of the network; needs no weights")
    for flag, field in COST_FIELDS.items():
        sub.add_argument(f"--{flag}", help=f"short for --config.{field}", metavar="VALUE")
    sub.add_argument("--plan", help="a name like 15R2, or a plan.json (default: an operated model's own)")
    sub.add_argument("--feature_map", choices=["polynomial", "hedgehog"], default="polynomial")
    sub.add_argument("--json", metavar="FILE", help="also write the result here")
    sub.add_argument("--figure", metavar="DIR", help="also leave cost.html here")
    sub = command("ablate", ablate, "answer a question about the method by running its arms over several seeds")
    sub.add_argument("--table", choices=["evidence"], required=True)
    sub.add_argument("--seeds", type=int, default=3)
    sub.add_argument("--workdir", required=True)
    sub = command("sample", sample, "prompts to videos", config=None)
    prompts = sub.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt")
    prompts.add_argument("--prompts_file", help="one prompt a line; running it again makes the videos still missing")
    sub.add_argument("--output", help=".mp4, .gif or .png (default: out.mp4); with --prompts_file a folder of mp4")
    for flag, field in SAMPLE_FIELDS.items():
        sub.add_argument(f"--{flag}", help=f"short for --config.{field}", metavar="VALUE")
    sub = command("encode", encode, "videos with captions to the latents and text embeddings that finetune reads")
    sub.add_argument("--videos", required=True, help="a folder with .txt captions, or .jsonl, .json, .csv, .parquet")
    sub.add_argument("--root", metavar="FOLDER", help="where an index's paths begin (default: the index's folder)")
    sub.add_argument("--workdir", required=True, help="gets encoded/; running it again resumes")
    sub = command("convert", convert, "a transformer from one checkpoint layout to another")
    sub.add_argument("--model", required=True, help="a folder, file or repository; or the original VAE or T5 .pth file")
    sub.add_argument("--output", required=True, help="a new folder; for comfyui a new .safetensors file")
    sub.add_argument("--layout", choices=["diffusers", "original", "comfyui"], default="diffusers")
    sub = command("verify", verify, "a checkpoint against diffusers and transformers, on this machine", config=None)
    sub.add_argument("--model", required=True, help="a folder, a bundled name or a repository")
    add_size(sub, frames=5, height=64, width=96)
    sub = command("push", push, "a model folder to the Hugging Face Hub, with a model card", config=None)
    sub.add_argument("--model", required=True, help="a folder in diffusers' layout")
    sub.add_argument("--repo", required=True, metavar="ORG/NAME")
    sub.add_argument("--private", action="store_true")
    sub.add_argument("--revision", metavar="BRANCH")
    sub = command("compile", compile_ahead, "a stage's step for TPUs that are not there: does it fit, what moves")
    sub.add_argument("--stage", required=True, choices=["distill", "finetune", "sample"])
    sub.add_argument("--topology", required=True, help="like v5e:4x4")
    sub.add_argument("--num_slices", type=positive, default=1)
    sub.add_argument("--json", metavar="FILE", help="also write the result here")
    text = "our transformer's forward, or one attention layer, beside others', alternating"
    bench = commands.add_parser("bench", help=text, description=text)
    subjects = bench.add_subparsers(required=True, metavar="SUBJECT", parser_class=Parser)
    text = "our forward beside diffusers', on the CPU"
    sub = subjects.add_parser("transformer", help=text, description=text)
    sub.set_defaults(command=bench_transformer, name="bench")
    weights = sub.add_mutually_exclusive_group()
    weights.add_argument("--model", help="a folder, a bundled name or a repository")
    weights.add_argument("--size", choices=["1.3b", "tiny"], default="1.3b", help="random weights (default: 1.3b)")
    add_size(sub, frames=1, height=480, width=832)
    sub.add_argument("--text_length", type=positive, default=512)
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    sub.add_argument("--runs", type=positive, default=3)
    text = "hybrid attention beside full softmax by the best stock kernel of this machine"
    sub = subjects.add_parser("attention", help=text, description=text)
    sub.set_defaults(command=bench_attention, name="bench")
    sub.add_argument("--rates", type=rates, default=rates("1,2,4,8,linear"), help="default: 1,2,4,8,linear")
    for flag, default in (("tokens", 16384), ("heads", 12), ("head_dim", 128), ("runs", 3)):
        sub.add_argument(f"--{flag}", type=positive, default=default, help=f"default: {default}")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on CPU, else bfloat16")
    sub.add_argument("--stabilizer", choices=["max", "lse"], default="lse")
    sub.add_argument("--implementation", choices=["xla", "reference", "tpu", "gpu", "stock"], help="default: the best")
    sub.add_argument("--backward", action="store_true", help="forward + backward too")
    sub.add_argument("--json", metavar="FILE", help="also write the result here")
    instead = sub.add_mutually_exclusive_group()
    instead.add_argument("--estimate", metavar="CHIP", help="static cycles on a v4, v5e, v5p or v6e, with no TPU")
    instead.add_argument("--tune", action="store_true", help="measure block sizes on this TPU or GPU and keep the best")
    return parser.parse_args(rest), overrides


def add_size(sub: argparse.ArgumentParser, **sizes: int) -> None:
    """The flags of a video's size, and where the result goes."""
    for name, default in sizes.items():
        sub.add_argument(f"--{name}", type=positive, default=default, help=f"default: {default}")
    sub.add_argument("--json", metavar="FILE", help="also write the result here")


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, found {text!r}")
    return int(text)


def rates(text: str) -> tuple:
    """Rates in a list like 1,2,8,linear."""
    return tuple(rate if rate == "linear" else positive(rate) for rate in text.split(","))


def surgery(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(options.config, overrides)
    from jsurgery.run import Run

    run = Run(config, options.workdir)
    for name in STAGES if options.name == "surgery" else (options.name,):
        run.stage(name)
    if options.name in ("surgery", "report"):
        print(run.workdir / "report.html")
    if options.name == "plan" and options.front:
        from jsurgery.report.cost_figures import neighbours, write_front_page
        from jsurgery.surgery.plan import front

        found = front(config, run.model_config, run.distill.folder, run.plan.folder)
        for row in neighbours(found):
            print("  ".join(row))
        chosen = found["chosen"]
        verdict = "proven optimal" if chosen["proven_optimal"] else f"not optimal: {chosen['optimum']:.5g} is possible"
        print(f"bound {chosen['error_bound']:.5g}; {verdict}")
        print(write_front_page(run.plan.folder, found))


def cost(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    given = {field: getattr(options, flag) for flag, field in COST_FIELDS.items()}
    config = load_config(options.config, overrides | {field: text for field, text in given.items() if text is not None})
    from jsurgery.report.cost_table import cost as counted
    from jsurgery.verify import check_report

    check_report(options.json)
    counted(
        config,
        options.config,
        plan=options.plan,
        feature_map=options.feature_map,
        report=options.json,
        figure=options.figure,
    )


def train(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(options.config, overrides)
    from jsurgery.train.teacher import train_teacher

    print(train_teacher(config, options.workdir))


def ablate(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(options.config, overrides)
    from jsurgery.ablate import evidence

    evidence(config, options.workdir, options.seeds)


def sample(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    given = {field: getattr(options, flag) for flag, field in SAMPLE_FIELDS.items()}
    overrides |= {field: text for field, text in given.items() if text is not None}
    from jsurgery.sample import read_prompts, sample_videos, sampling_config

    config = sampling_config(options.config, overrides)
    single = options.prompts_file is None
    prompts = [options.prompt] if single else read_prompts(options.prompts_file)
    for file in sample_videos(config, prompts, options.output or ("out.mp4" if single else "samples"), single):
        print(file, flush=True)


def encode(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(options.config, overrides)
    from jsurgery.data.encode import encode_videos

    print(encode_videos(config, options.videos, options.root, options.workdir))


def convert(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery.wan.convert import convert as converted

    print(converted(options.model, options.output, options.layout))


def verify(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery.verify import verify as verified

    verified(options.model, options.frames, options.height, options.width, options.json)


def push(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery.push import push as pushed

    print(pushed(options.model, options.repo, private=options.private, revision=options.revision))


def compile_ahead(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(options.config, overrides)
    from jsurgery.compile import compile_stage

    compile_stage(
        config, options.config, options.stage, options.topology, slices=options.num_slices, report=options.json
    )


def bench_transformer(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery.bench import bench_transformer as measured

    measured(
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


def bench_attention(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery import bench_attention as bench

    layer = {name: getattr(options, name) for name in ("rates", "tokens", "heads", "head_dim", "stabilizer")}
    if options.tune:
        bench.tune_attention(**layer, runs=options.runs)
    elif options.estimate is not None:
        bench.estimate_attention(**layer, chip=options.estimate, backward=options.backward, report=options.json)
    else:
        bench.bench_attention(
            **layer,
            dtype=options.dtype,
            implementation=options.implementation,
            runs=options.runs,
            backward=options.backward,
            report=options.json,
        )


def takes_no_config(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    if overrides:
        raise InputError(f"--config.{min(overrides)}: {options.name} takes no config")


if __name__ == "__main__":
    sys.exit(main())
