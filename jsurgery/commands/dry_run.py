"""The flags of --dry_run, which several commands have."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from jsurgery.commands.options import Options, Parser
from jsurgery.load_config import split_topology

if TYPE_CHECKING:
    from jsurgery.estimate.dry_run import Limits


def add_dry_run(command: Parser, *, json: bool = True) -> None:
    """Adds the flags of a dry run, with `--json` unless the command has that flag already."""
    text = "Only tell what would run: its meshes, memory, disk and hours on NAME@TOPOLOGY, or on this machine."
    command.add_argument("--dry_run", action="store_true", help=text)
    text = "For --dry_run: how many GB of disk there are (default: what is free under --workdir)."
    command.add_argument("--disk", type=float, metavar="GB", help=text)
    text = "For --dry_run: how many GB there are for the results alone, without checkpoints and traces."
    command.add_argument("--kept", type=float, metavar="GB", help=text)
    if json:
        command.add_argument("--json", metavar="FILE", help="For --dry_run: also write the result to this file.")


def scope(options: Options) -> contextlib.AbstractContextManager[None]:
    """What a command runs in: a dry run downloads no weights."""
    if not getattr(options, "dry_run", False):
        return contextlib.nullcontext()
    from jsurgery.wan.hub import leaving_weights

    return leaving_weights()


def limits(options: Options, workdir: str | None = None) -> "Limits":
    """The limits that the flags give. `workdir` is where files would lie, by default `--workdir`."""
    from jsurgery.estimate.dry_run import Limits

    return Limits(workdir or options.workdir, options.disk, options.kept, options.json)


def dry_run_sampling(
    command: str, config: ConfigDict, options: Options, videos: int, batch: int, workdir: str | None = None
) -> None:
    """Tells what sampling of `videos`, `batch` at once, would take. With a model's folder, first checks its files."""
    from jsurgery.estimate import dry_run

    check_model(config)
    name = options.config or "tiny"
    found = limits(options, workdir)
    dry_run.dry_run_sampling(command, config, name, split_topology(name)[1], videos, batch, found)


def dry_run_streaming(config: ConfigDict, options: Options, videos: int, workdir: str) -> None:
    """Tells what `sample --stream` of `videos` would take. With a model's folder, first checks its files."""
    from jsurgery.estimate import dry_run

    check_model(config)
    name = options.config or "tiny"
    dry_run.dry_run_streaming(config, name, split_topology(name)[1], videos, limits(options, workdir))


def check_model(config: ConfigDict) -> None:
    """Checks the files of the folder that the config names, if it does, and that its LoRAs fit."""
    from jsurgery.wan.lora import check_loras, loras_of
    from jsurgery.wan.model_folder import check_pipeline

    if config.model.path:
        check_loras(check_pipeline(config.model.path), loras_of(config))


def tell_cut(config: ConfigDict, prompts: Sequence[str]) -> None:
    """Says in one line how many of the prompts do not fit the config's length, if it names a model."""
    if config.model.path:
        from jsurgery.runtime.progress import say
        from jsurgery.wan.model_folder import model_path, pipeline_folder
        from jsurgery.wan.tokenizer import Tokenizer, describe_cut

        tokenizer = Tokenizer(pipeline_folder(model_path(config.model.path)) / "tokenizer")
        if cut := describe_cut(tokenizer, prompts, config.text_length):
            say(f"text: {cut}")


def dry_run_encoding(config: ConfigDict, options: Options, clips: int) -> None:
    """Tells what the encoding of `clips` would take."""
    from jsurgery.estimate import dry_run

    dry_run.dry_run_encoding(config, options.config, split_topology(options.config)[1], clips, limits(options))
