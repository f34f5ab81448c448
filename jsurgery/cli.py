"""The commands. Exit codes: 0 done, 1 a fault of ours, 2 bad input, 3 does not fit, 4 parity breached."""

import argparse
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence

from jsurgery.config import load_config
from jsurgery.errors import DoesNotFit, InputError, ParityError

STAGES = ("trace", "distill", "plan", "operate", "finetune", "evaluate", "report")
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

    def command(name: str, run: Callable, text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--config", default="tiny", help="a config file, or the name of a shipped one (default: tiny)")
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
    sub = command("ablate", ablate, "answer a question about the method by running its arms over several seeds")
    sub.add_argument("--table", choices=["evidence"], required=True)
    sub.add_argument("--seeds", type=int, default=3)
    sub.add_argument("--workdir", required=True)
    sub = command("sample", sample, "a prompt to a video")
    sub.add_argument("--model", default="tiny_wan", help="a model folder (default: the bundled tiny_wan)")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--output", default="out.mp4", help=".mp4, .gif or .png")
    sub.add_argument("--seed", type=int, default=0)
    return parser.parse_args(rest), overrides


def surgery(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(options.config, overrides)
    from jsurgery.run import Run

    run = Run(config, options.workdir)
    for name in STAGES if options.name == "surgery" else (options.name,):
        run.stage(name)
    if options.name in ("surgery", "report"):
        print(run.workdir / "report.html")


def train(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(options.config, overrides)
    from jsurgery.train.teacher import train_teacher

    print(train_teacher(config, options.workdir))


def ablate(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(options.config, overrides)
    from jsurgery.ablate import evidence

    evidence(config, options.workdir, options.seeds)


def sample(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(options.config, overrides)
    output = pathlib.Path(options.output)
    if output.suffix not in (".mp4", ".gif", ".png"):
        raise InputError(f"--output={output}: expected a name that ends in .mp4, .gif or .png")
    from jsurgery.evaluate.video_file import write_video
    from jsurgery.wan.pipeline import load_pipeline

    video = load_pipeline(options.model)(options.prompt, config, seed=options.seed)[0]
    settings = {"prompt": options.prompt, "seed": options.seed, **config.sampler.to_dict(), **config.video.to_dict()}
    write_video(output, video, config.video.fps, settings)
    print(output)


if __name__ == "__main__":
    sys.exit(main())
