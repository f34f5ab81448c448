"""What `jsurgery` alone and `jsurgery --help` print: the commands, grouped by what one wants to do."""

import shutil
import textwrap

from jsurgery.commands.options import Options, Overrides, Parser

START = {
    "jsurgery surgery --config=tiny --workdir=runs/demo": "Performs the whole surgery on the bundled tiny model, in "
    "about five minutes on two CPU cores.",
    "jsurgery sample --model=tiny_wan --prompt='a red circle moves left over a grey background'": "Makes a video with "
    "any model, here with the tiny teacher.",
    "jsurgery surgery --config=wan_1_3b_lowres@v5e-8 --workdir=runs/wan --dry_run": "Tells what the surgery of Wan2.1 "
    "1.3B takes on eight chips of a TPU v5e, and reads no weights.",
}
GROUPS = {
    "Perform a surgery": ("surgery", "trace", "distill", "plan", "operate", "finetune", "evaluate", "report"),
    "Make videos": ("sample",),
    "Prepare training clips": ("encode", "synthesize"),
    "Judge a model": (
        "evaluate fidelity", "evaluate vbench", "evaluate vbench-results", "evaluate study", "evaluate study-results",
    ),
    "Know the cost before": ("models", "cost", "compile", "roofline"),
    "Move a model": ("convert", "export", "push"),
    "Check and measure": ("verify", "bench", "ablate", "train"),
    "Set up the shell": ("completion",),
}  # fmt: skip
CLOSING = (
    "`jsurgery COMMAND --help` explains a command. `--config.FIELD=VALUE` sets any field of its config, such as "
    "--config.finetune.steps=100."
)


class TopParser(Parser):
    """The parser of `jsurgery` itself."""

    def format_help(self) -> str:
        """All commands by group, wrapped to the width of the terminal."""
        width = min(shutil.get_terminal_size().columns, 120) - 2
        column = max(map(len, self.subcommands)) + 4
        lines = [self.description or "", "", "Start with"]
        for command, text in START.items():
            lines += [f"  {command}", *wrapped(text, "      ", width)]
        for title, names in GROUPS.items():
            lines += ["", title]
            for name in names:
                first, *others = wrapped(self.subcommands[name].description or "", " " * column, width)
                lines += [f"  {name}".ljust(column) + first.lstrip(), *others]
        return "\n".join([*lines, "", *wrapped(CLOSING, "", width), ""])


def wrapped(text: str, indent: str, width: int) -> list[str]:
    wrapper = textwrap.TextWrapper(width, indent, indent, break_on_hyphens=False, break_long_words=False)
    return wrapper.wrap(text)


def show_overview(parser: Parser) -> Options:
    """The options of `jsurgery` without a command, which print the help."""

    def show(options: Options, overrides: Overrides) -> None:
        print(parser.format_help(), end="")

    return Options(command=show, name="")
