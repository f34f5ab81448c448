"""What README.md and docs/ say: their commands, links, headings, and how each command is tested."""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator

from jsurgery import cli

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RENDERED = re.compile(r"docs/notebooks/\d")  # their cells are run by test_notebooks.py
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
WAN = ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers")

# Commands that need a network, an hour, a TPU's compiler or another package: here they are only parsed. The file beside
# each runs the same command on something small.
ELSEWHERE = {
    "ablate": "ablate/test_run_tables.py",
    "bench attention": "bench/test_attention.py",
    "bench transformer": "bench/test_transformer.py",
    "compile": "estimate/test_compile_ahead.py",
    "evaluate study-results": "evaluate/test_study.py",
    "evaluate vbench-results": "evaluate/test_vbench_scores.py",
    "export": "export/test_command.py",
    "models": "wan/test_models.py",
    "push": "report/test_push.py",
    "roofline": "estimate/test_roofline.py",
    "train": "train/test_training.py",
    "verify": "bench/test_verify.py",
}
# Commands on the tiny model that would take a test too long: here they are dry runs.
LONG = ("runs/linear", "runs/measured", "distill.blocks")


def module(name: str):
    """A Python file of docs/, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def name_of(page: pathlib.Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: pathlib.Path) -> str:
    """A page with its references written out, as the site has it."""
    return module("reference").expand(page.read_text())


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a shell block: the page it is on, and its words, without a comment."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"

    @property
    def arguments(self) -> list[str] | None:
        """What the program jsurgery gets; None if the line does not run it. It may stand behind another program, or in
        the quotes of a command for other machines."""
        for words in (self.words, *(word.split() for word in self.words if " " in word)):
            for place, word in enumerate(words[:-1]):
                if re.fullmatch(r"(\S*/)?jsurgery", word) and words[place + 1] in cli_words():
                    return list(itertools.takewhile(lambda word: word not in ("&&", ";", "|"), words[place + 1 :]))
        return None


def lines_of(page: pathlib.Path) -> Iterator[Line]:
    for language, block in BLOCK.findall(page.read_text()):
        if language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                words = tuple(shlex.split(line, comments=True))
                if words:
                    yield Line(name_of(page), words)


@functools.cache
def cli_words() -> set[str]:
    """The first words of all commands."""
    return {name.split()[0] for name in parsers()}


@functools.cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    """{command: its parser}, such as "evaluate vbench"."""
    return {name: parser for name, parser, _ in module("reference").parsers(cli.make_parser())}


LINES = list(dict.fromkeys(line for page in PAGES if not RENDERED.match(name_of(page)) for line in lines_of(page)))
COMMANDS = [line for line in LINES if line.arguments is not None]


def command_of(arguments: list[str]) -> str:
    """("evaluate", "vbench", …) -> "evaluate vbench"."""
    two = " ".join(arguments[:2])
    return two if two in parsers() else arguments[0]


def way(line: Line) -> str:
    """How a command is tested: "elsewhere", as a "dry run", or "run" on the small model."""
    arguments = line.arguments or []
    if command_of(arguments) in ELSEWHERE:
        return "elsewhere"
    dry = any(word.startswith("--config=wan") or any(name in word for name in WAN) for word in arguments)
    dry = dry or "vbench" in arguments or any(word in argument for word in LONG for argument in arguments)
    return "dry run" if dry and arguments[0] not in ("bench", "cost") else "run"


def dry(arguments: list[str]) -> list[str]:
    """The same command as a dry run that needs no network, no folder of another machine and no errors to plan with."""
    words = []
    for word in arguments:
        flag = word.partition("=")[0]
        if flag in ("--json", "--dry_run", "--image"):
            continue
        if any(word == f"--config.model.path={name}" for name in WAN):
            continue
        if flag in ("--config.prompts", "--prompts_file"):
            word = f"{flag}=prompts.txt"
        elif flag == "--workdir":
            word = f"{flag}=runs/elsewhere"
        word = re.sub(r"^(--config\.plan\.budget)=[\d.]+$", r"\1=3R2", word)
        for name in WAN:
            word = word.replace(name, "tiny_wan")
        words.append(word)
    return [*words, "--dry_run", "--disk=1000", "--json=dry.json"]


def here() -> list[Line]:
    """The lines that `test_run.py` runs, on the small model or as dry runs, each once."""
    found: dict[tuple[str, ...], Line] = {}
    for line in LINES:
        if line.arguments is None and line.words[0] == "mkdir":
            found.setdefault(line.words, line)
        elif line.arguments is not None and (how := way(line)) != "elsewhere":
            found.setdefault(tuple(dry(line.arguments) if how == "dry run" else line.arguments), line)
    return list(found.values())


def anchors(text: str) -> set[str]:
    """The names in a page that links can lead to, as GitHub and MyST make them of headings; and explicit targets."""
    outside = BLOCK.sub("", text)
    headings = re.findall(r"^#+ (.+?)\s*$", outside, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", outside, re.MULTILINE))


def broken_links(page: pathlib.Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""

    def leads(link: str) -> bool:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            return False
        return not anchor or anchor in anchors(text if target == page else text_of(target))

    links = LINK.findall(BLOCK.sub("", text))
    return [link for link in links if not re.match(r"\w+:", link) and not leads(link)]


def small(arguments: list[str], fields: list[str], model: pathlib.Path) -> list[str]:
    """The same command on the small model `model`, with `fields`, the overrides that fit it, unless it sets them."""
    few = ("--prompts_file=prompts.txt", "--prompts_file=few_prompts.txt")
    arguments = [word.replace("=tiny_wan", f"={model}").replace(*few) for word in arguments]
    arguments = [re.sub(r"^(--config\.plan\.budget)=.*", r"\1=1e12", word) for word in arguments]  # more than it costs
    if command_of(arguments) not in ("surgery", "plan", "sample", "evaluate fidelity"):
        return arguments
    given = {word.partition("=")[0] for word in arguments}
    if "--config" not in given:
        arguments = [*arguments, "--config=tiny"]
    elif "--model" not in given:
        arguments = [*arguments, f"--config.model.path={model}"]
    if "--config.plan.budget" in given:  # the test is that trace and distill are kept
        given.add("--config.finetune.steps")
        arguments = [*arguments, "--config.finetune.steps=0"]
    return [*arguments, *(field for field in fields if field.partition("=")[0] not in given)]
