"""What the commands share: the parser, flags that several of them take, and readers of flags' values."""

import argparse
from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from jsurgery.errors import InputError
from jsurgery.load_config import load_config

Options = argparse.Namespace
Overrides = dict[str, str]  # of config fields: "video.frames" -> "17"
Run = Callable[[Options, Overrides], None]

VIDEO_FIELDS = {name: f"video.{name}" for name in ("frames", "height", "width")}
SAMPLE_FIELDS = {
    "model": "model.path",
    **VIDEO_FIELDS,
    "steps": "sampler.steps",
    "guidance": "sampler.guidance",
    "shift": "sampler.shift",
    "solver": "sampler.solver",
    "negative_prompt": "sampler.negative_prompt",
    "seed": "seed",
}


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str):
        raise InputError(f"{message} (see `{self.prog} --help`)")


class Commands:
    """The commands of a parser: each calls `run(options, overrides)`."""

    def __init__(self, parser: argparse.ArgumentParser, metavar: str = "COMMAND", prefix: str = ""):
        self.prefix = prefix
        self.commands = parser.add_subparsers(required=True, metavar=metavar, parser_class=Parser)

    def add(
        self, name: str, run: Run, text: str, config: str | None = "tiny", otherwise: str = "by the model"
    ) -> Parser:
        """A command with `--config`. Where `config` is None, `otherwise` tells what is taken without the flag."""
        command = self.add_without_config(name, run, text)
        kind = f"a config file or a shipped name, and maybe @TOPOLOGY (default: {config or otherwise})"
        command.add_argument("--config", default=config, help=kind)
        return command

    def add_group(self, name: str, text: str) -> Parser:
        """A word that commands of its own follow."""
        return self.commands.add_parser(name, help=text, description=text)

    def add_without_config(self, name: str, run: Run, text: str) -> Parser:
        command = self.commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=run, name=self.prefix + name)
        return command


def add_fields(command: Parser, fields: Mapping[str, str]) -> None:
    """Flags that are short for config fields: `fields` maps one to the other."""
    for flag, field in fields.items():
        command.add_argument(f"--{flag}", help=f"short for --config.{field}", metavar="VALUE")


def given_fields(options: Options, fields: Mapping[str, str]) -> Overrides:
    """The overrides that the flags of `add_fields` make."""
    return {field: text for flag, field in fields.items() if (text := getattr(options, flag)) is not None}


def add_json(command: Parser) -> None:
    command.add_argument("--json", metavar="FILE", help="also write the result here")


def add_size(command: Parser, **sizes: int) -> None:
    """The flags of a video's size, with their defaults."""
    for name, default in sizes.items():
        command.add_argument(f"--{name}", type=positive, default=default, help=f"default: {default}")


def add_processes(command: Parser) -> None:
    """The flags of a run of several processes."""
    text = "where process 0 listens, the same for all; auto on TPU pods and under Slurm or Open MPI"
    command.add_argument("--coordinator", metavar="HOST:PORT", help=text)
    command.add_argument("--num_processes", type=int, metavar="N", help="how many processes run this command")
    command.add_argument("--process_id", type=int, metavar="I", help="which of them this is, from 0")


def join_processes(options: Options) -> None:
    """Meets the other processes of this command, if there are any."""
    from jsurgery.runtime.processes import join

    join(options.coordinator, options.num_processes, options.process_id)


def read_config(options: Options, overrides: Overrides) -> ConfigDict:
    """The config of `--config` and the overrides, for a command that compiles."""
    return keep_compiled(load_config(options.config, overrides))


def read_sampling_config(options: Options, overrides: Overrides) -> ConfigDict:
    """The config of the flags of SAMPLE_FIELDS; without `--config`, the one that suits the model."""
    from jsurgery.sample import sampling_config

    return keep_compiled(sampling_config(options.config, overrides | given_fields(options, SAMPLE_FIELDS)))


def keep_compiled(config: ConfigDict) -> ConfigDict:
    """The same config. Programs that the command compiles are kept for later commands, unless the config says no."""
    if config.compile_cache:
        from jsurgery.runtime.compile_cache import use_compile_cache

        use_compile_cache()
    return config


def takes_no_config(options: Options, overrides: Overrides) -> None:
    if overrides:
        raise InputError(f"--config.{min(overrides)}: {options.name} takes no config")


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, found {text!r}")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """Whole numbers in a list like 17,33."""
    return tuple(positive(number) for number in text.split(","))


def shard(text: str) -> tuple[int, int]:
    """(I, N) of a share like 0/4."""
    index, _, count = text.partition("/")
    if not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, found {text!r}")
    return int(index), int(count)


def some_of(choices: str) -> Callable[[str], tuple[str, ...]]:
    """Reads a list of some of `choices`, both parted by commas."""

    def read(text: str) -> tuple[str, ...]:
        chosen: Sequence[str] = text.split(",")
        if not set(chosen) <= set(choices.split(",")):
            raise argparse.ArgumentTypeError(f"expected some of {choices}, found {text!r}")
        return tuple(chosen)

    return read


def rates(text: str) -> tuple[int | str, ...]:
    """Rates in a list like 1,2,8,linear."""
    return tuple(rate if rate == "linear" else positive(rate) for rate in text.split(","))
