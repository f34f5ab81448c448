"""The parser, flags that several commands have, and functions that parse the values of flags."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ml_collections import ConfigDict

from jsurgery.errors import InputError, did_you_mean
from jsurgery.load_config import load_config

if TYPE_CHECKING:
    from jsurgery.wan.lora_file import LoraSource

Options = argparse.Namespace
Overrides = dict[str, str]  # {"video.frames": "17"}: config fields and their values
RunCommand = Callable[[Options, Overrides], None]

VIDEO_FIELDS = {name: f"video.{name}" for name in ("frames", "height", "width")}
SAMPLE_FIELDS = {
    "model": "model.path",
    "kind": "model.kind",
    **VIDEO_FIELDS,
    "steps": "sampler.steps",
    "guidance": "sampler.guidance",
    "shift": "sampler.shift",
    "solver": "sampler.solver",
    "negative_prompt": "sampler.negative_prompt",
    "seed": "seed",
}
SIZES = {  # a flag of `add_size` -> what it counts
    "frames": "Frames of the video",
    "height": "Height in pixels",
    "width": "Width in pixels",
    "tokens": "Tokens of the sequence",
    "heads": "Attention heads",
    "head_dim": "Channels of a head",
    "text_length": "Tokens of the prompt",
    "runs": "Repetitions of each measurement",
}


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError, where argparse would print its usage and exit.

    `subcommands` are the parsers of its commands, by name; empty for a command itself.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.subcommands: dict[str, Parser] = {}

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's check of a command's name and of a flag's choices; its own message lists all of them."""
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        near = did_you_mean(str(value), known)
        if action.choices is self.subcommands:
            raise InputError(f"{value}: unknown command of `{self.prog}`{near} (see `{self.prog} --help`)")
        name = action.option_strings[0] if action.option_strings else action.dest
        raise InputError(f"{name}: expected one of {', '.join(known)}; found {value!r}{near}")


class Commands:
    """The commands of a parser. Each calls its function `run(options, overrides)`."""

    def __init__(self, parser: Parser, metavar: str = "COMMAND", prefix: str = ""):
        self.prefix = prefix
        self.commands = parser.add_subparsers(required=True, metavar=metavar, parser_class=Parser)
        parser.subcommands = self.commands.choices  # type: ignore[assignment]

    def add(
        self, name: str, run: RunCommand, text: str, config: str | None = "tiny", otherwise: str = "chosen by the model"
    ) -> Parser:
        """Adds a command with the flag `--config`, whose default is `config`.

        With None the command chooses the config itself, and `otherwise` tells in the help which one.
        """
        command = self.add_without_config(name, run, text)
        kind = f"A file or the name of a shipped config (default: {config or otherwise}). NAME@TOPOLOGY adds a mesh."
        command.add_argument("--config", default=config, help=kind)
        return command

    def add_group(self, name: str, text: str) -> Parser:
        """Adds a word that is followed by a command, such as `bench` in `bench attention`."""
        return self.commands.add_parser(name, help=text, description=text)

    def add_without_config(self, name: str, run: RunCommand, text: str) -> Parser:
        command = self.commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=run, name=self.prefix + name)
        return command


def add_fields(command: Parser, fields: Mapping[str, str]) -> None:
    """Adds flags that are short for config fields: {flag: field}."""
    for flag, field in fields.items():
        command.add_argument(f"--{flag}", help=f"This is short for --config.{field}.", metavar="VALUE")


def given_fields(options: Options, fields: Mapping[str, str]) -> Overrides:
    """The config fields that the user set by flags of `add_fields`."""
    return {field: text for flag, field in fields.items() if (text := getattr(options, flag)) is not None}


def add_lora(command: Parser) -> None:
    """Adds the flags of LoRAs."""
    text = "LoRAs, .safetensors of any key style, which are merged into the transformer's weights."
    command.add_argument("--lora", nargs="+", default=[], metavar="FILE", help=text)
    text = "The factor of each (default: 1)."
    command.add_argument("--lora_scale", nargs="+", type=number, default=[], metavar="S", help=text)


def lora_fields(options: Options) -> Overrides:
    """The config fields that the flags of `add_lora` set."""
    fields = {"model.lora": tuple(options.lora), "model.lora_scale": tuple(options.lora_scale)}
    return {field: repr(values) for field, values in fields.items() if values}


def given_loras(options: Options) -> "tuple[LoraSource, ...]":
    """The LoRAs of these flags, for a command that reads no config. Raises InputError unless each has a scale."""
    from jsurgery.wan.lora import loras_of

    return loras_of(load_config("tiny", lora_fields(options)))


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None


def add_json(command: Parser) -> None:
    command.add_argument("--json", metavar="FILE", help="Also write the result to this file.")


def add_size(command: Parser, **sizes: int) -> None:
    """Adds flags for sizes, with their defaults."""
    for name, default in sizes.items():
        command.add_argument(f"--{name}", type=positive, default=default, help=f"{SIZES[name]} (default: {default}).")


def add_processes(command: Parser) -> None:
    """Adds the flags for a run with several processes."""
    text = "Where process 0 listens, the same for all processes, or auto on TPU pods and under Slurm or Open MPI."
    command.add_argument("--coordinator", metavar="HOST:PORT", help=text)
    command.add_argument("--num_processes", type=int, metavar="N", help="How many processes run this command.")
    command.add_argument("--process_id", type=int, metavar="I", help="Which of them this is, from 0.")


def join_processes(options: Options) -> None:
    """Connects to the other processes of this command, if there are any."""
    from jsurgery.runtime.processes import join

    join(options.coordinator, options.num_processes, options.process_id)


def read_config(options: Options, overrides: Overrides) -> ConfigDict:
    """The config of `--config` with the overrides, for a command that compiles programs."""
    return keep_compiled(load_config(options.config, overrides))


def read_sampling_config(options: Options, overrides: Overrides) -> ConfigDict:
    """The config for a command with the flags SAMPLE_FIELDS. Without `--config`, the model selects it."""
    from jsurgery.sample import sampling_config

    given = given_fields(options, SAMPLE_FIELDS) | (lora_fields(options) if "lora" in options else {})
    return keep_compiled(sampling_config(options.config, overrides | given))


def keep_compiled(config: ConfigDict) -> ConfigDict:
    """Keeps compiled programs for later commands if `config.compile_cache` is set. Returns the config."""
    if config.compile_cache:
        from jsurgery.runtime.compile_cache import use_compile_cache

        use_compile_cache()
    return config


def takes_no_config(options: Options, overrides: Overrides) -> None:
    """Raises InputError for overrides of a command that reads no config."""
    if overrides:
        raise InputError(f"--config.{min(overrides)}: {options.name} takes no config")


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, found {text!r}")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """("17,33") -> (17, 33)."""
    return tuple(positive(number) for number in text.split(","))


def shard(text: str) -> tuple[int, int]:
    """("0/4") -> (0, 4), the first of four shares."""
    index, _, count = text.partition("/")
    if not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, found {text!r}")
    return int(index), int(count)


def some_of(choices: str) -> Callable[[str], tuple[str, ...]]:
    """A parser of lists such as "onnx,qnn", whose words must be among `choices`. Both are separated by commas."""

    def read(text: str) -> tuple[str, ...]:
        chosen: Sequence[str] = text.split(",")
        if not set(chosen) <= set(choices.split(",")):
            raise argparse.ArgumentTypeError(f"expected some of {choices}, found {text!r}")
        return tuple(chosen)

    return read


def rates(text: str) -> tuple[int | str, ...]:
    """("1,8,linear") -> (1, 8, "linear")."""
    return tuple(rate if rate == "linear" else positive(rate) for rate in text.split(","))
