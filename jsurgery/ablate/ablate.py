"""ablate: a question about the method, answered by running its arms over several seeds; the same command resumes."""

from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.ablate.attention import attention_statistics
from jsurgery.ablate.errors import block_errors
from jsurgery.ablate.evidence import evidence
from jsurgery.ablate.objective import objective
from jsurgery.ablate.results import update_results
from jsurgery.ablate.rope import phi_and_rope
from jsurgery.ablate.seed import Seed
from jsurgery.ablate.sweep import run_sweep
from jsurgery.ablate.sweeps import STUDIES, SWEEPS, TABLES
from jsurgery.ablate.table import write
from jsurgery.ablate.temporal import temporal_control
from jsurgery.errors import InputError
from jsurgery.runtime.progress import say

Study = Callable[[Sequence[Seed]], dict[str, Any]]
RUN: dict[str, Study] = {
    "errors": block_errors,
    "objective": objective,
    "attention": attention_statistics,
    "rope": phi_and_rope,
    "temporal": temporal_control,
}


def ablate(
    config: ConfigDict,
    table: str,
    workdir: str,
    seeds: int,
    results: str | None = None,
    measurements: str | None = None,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Runs a table of `TABLES`, "all" of them, or "evidence"; leaves TABLE.json, .md and .html in the workdir.

    Tables in one workdir share what their arms have in common. `results` is a Markdown document whose section for the
    table is rewritten. `measurements` is a folder of measurements, by default in the workdir: those that it has are not
    made again, whatever the workdir has. `shard` (I, N) of several runs at once measures every N-th seed from the I-th
    on, and leaves the tables to a run without it.
    """
    folder, document = epath.Path(workdir), None if results is None else epath.Path(results)
    if document is not None and not document.exists():
        raise InputError(f"--results={results}: no such file")
    first, step = shard
    if table == "evidence" and step > 1:
        raise InputError("--shard: expected a table of `--table=all`, found evidence")
    if table == "evidence":
        text = evidence(config, workdir, seeds)
        if document is not None:
            update_results(document, table, text)
        return
    shared = [Seed(config, folder, number, measurements) for number in range(first, seeds, step)]
    if not shared:
        raise InputError(f"--shard={first}/{step}: expected at most one for each of {seeds} seeds")
    for name in TABLES if table == "all" else (table,):
        made = RUN[name](shared) if name in RUN else run_sweep(SWEEPS[name], shared)
        if step > 1:
            continue
        subject = "tiny model" if config.model.path == "tiny_wan" else config.model.path
        text = write({"table": name, "title": title(name), "subject": subject, **made}, folder)
        print(text)
        if document is not None:
            update_results(document, name, text)
        say(f"{name}: {folder / name}.json, .md, .html")


def title(table: str) -> str:
    return STUDIES[table] if table in STUDIES else SWEEPS[table].title
