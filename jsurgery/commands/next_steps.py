"""The line that a finished command prints on stderr: where its result is, and what usually comes next.

A whole surgery and the overview print lines of their own.
"""

import shlex
from typing import Any

from jsurgery.commands.options import Options, Overrides

# Name of a command -> (its result, what comes next). `same` stands for the flags that all stages of a run share,
# `config` for --config, `first` for the first of --precision; any other name for the value of that flag.
STEPS = {
    "trace": ("{workdir}/trace", "jsurgery distill {same}"),
    "distill": ("{workdir}/distill, its errors in errors.json", "jsurgery plan {same}"),
    "plan": ("{workdir}/plan/plan.json", "jsurgery operate {same}"),
    "operate": ("{workdir}/hybrid", "jsurgery finetune {same}"),
    "finetune": ("{workdir}/model", "jsurgery evaluate {same}"),
    "evaluate": ("{workdir}/evaluation/evaluation.json", "jsurgery report --workdir={workdir}"),
    "report": ("{workdir}/report.html, a page for the browser", "jsurgery sample --model={workdir}/model --prompt='…'"),
    "report --compare": ("{output}, a page for the browser", "jsurgery push --model=RUN/model --repo=ORG/NAME"),
    "sample": ("{output}", "another --seed, --steps or --guidance; `jsurgery sample --help` lists all"),
    "models": ("{json}", "jsurgery sample --model=MODEL --prompt='…', with a folder or a repository of one of them"),
    "cost": ("{json}", "jsurgery surgery {config} --workdir=RUN --dry_run, which tells memory, disk and hours"),
    "compile": ("{json}", "jsurgery roofline {config} --compiled FILE, with the FILE of --json"),
    "roofline": ("{json}", "jsurgery surgery {config} --workdir=RUN --dry_run, which tells memory and disk"),
    "encode": ("{workdir}/encoded", "jsurgery surgery {config} --workdir=RUN --config.data.path={workdir}/encoded"),
    "synthesize": (
        "{workdir}/synthesized",
        "jsurgery surgery {config} --workdir=RUN --config.data.path={workdir}/synthesized",
    ),
    "train": ("{workdir}/model", "jsurgery surgery --config=tiny --workdir=RUN --config.model.path={workdir}/model"),
    "convert": ("{output}", "jsurgery verify --model={output}, if it is in diffusers' layout"),
    "push": ("the address above", "jsurgery sample --model={repo} --prompt='…', on any machine"),
    "verify": ("{json}", "jsurgery surgery --config=wan_1_3b_lowres --workdir=RUN --config.model.path={model}"),
    "bench transformer": ("{json}", "jsurgery bench attention, which compares the rates"),
    "bench distill": ("{json}", "jsurgery distill {config} --workdir=RUN, after trace"),
    "bench attention": ("{json}", "jsurgery cost --config=wan_1_3b, which tells what a whole model saves"),
    "ablate": ("{workdir}, a page for each table", "the same with a larger --seeds, for narrower intervals"),
    "evaluate vbench": ("{output}", "jsurgery evaluate vbench-results {output}/results, once the videos are scored"),
    "evaluate vbench-results": ("{json}", "jsurgery evaluate study --a=VIDEOS --b=VIDEOS, which asks people"),
    "evaluate fidelity": (
        "{workdir}/fidelity.json",
        "jsurgery report --workdir=RUN, whose page shows it if {workdir} is RUN/fidelity",
    ),
    "evaluate study": (
        "{output}/study.html",
        "send it to participants, then jsurgery evaluate study-results ANSWERS --key={output}/study.key.json",
    ),
    "evaluate study-results": ("{json}", "jsurgery push --model=RUN/model --repo=ORG/NAME"),
    "export": (
        "{workdir}/export",
        "python {workdir}/export/driver.py {workdir}/export --precision={first} --prompt='…' --output=out.gif",
    ),
    "export --parts": ("{workdir}/export", "the same without --parts, which driver.py needs"),
}  # fmt: skip


def tell_next(options: Options, overrides: Overrides) -> None:
    """Prints the line of a command that has just finished. With several processes, process 0 alone does."""
    line = next_line(options, overrides)
    if line:
        from jsurgery.runtime.progress import say

        say(line)


def next_line(options: Options, overrides: Overrides) -> str | None:
    """The line, or None for a command that has none."""
    given = vars(options)
    if given.get("dry_run"):
        return "done: nothing has run; next: the same command without --dry_run"
    variants = (f"{options.name} --{flag}" for flag in ("compare", "parts") if given.get(flag))
    name = next((name for name in variants if name in STEPS), options.name)
    if name not in STEPS:
        return None
    result, following = (text.format_map(words(given, overrides)) for text in STEPS[name])
    return f"done: {result}; next: {following}"


def words(given: dict[str, Any], overrides: Overrides) -> dict[str, str]:
    """What stands for the names in `STEPS`, quoted for a shell."""
    defaults = {"json": "printed above", "output": default_output(given)}
    values = {name: shlex.quote(str(value)) if value else defaults.get(name, "") for name, value in given.items()}
    config = f"--config={values['config']}" if given.get("config") else ""
    fields = [shlex.quote(f"--config.{field}={text}") for field, text in overrides.items()]
    same = " ".join(filter(None, [config, f"--workdir={values.get('workdir')}", *fields]))
    precisions = given.get("precision") or "float32"
    first = precisions.split(",")[0] if isinstance(precisions, str) else precisions[0]
    return values | {"config": config, "same": same, "first": first}


def default_output(given: dict[str, Any]) -> str:
    """Where a command without --output writes."""
    if given.get("compare"):
        return "compare.html"
    return "out.mp4" if given.get("prompts_file") is None else "samples"
