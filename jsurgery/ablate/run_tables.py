"""ablate: answers a question about the method with a table, by running its arms over several seeds."""

from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.ablate.attention_concentration import attention_statistics
from jsurgery.ablate.block_errors import block_errors
from jsurgery.ablate.evidence import evidence
from jsurgery.ablate.families import families_table
from jsurgery.ablate.framewise_control import temporal_control
from jsurgery.ablate.phi_before_rope import phi_and_rope
from jsurgery.ablate.predicted_errors import objective
from jsurgery.ablate.results_document import update_results
from jsurgery.ablate.run_arms import run_arms
from jsurgery.ablate.seed_run import SeedRun
from jsurgery.ablate.tables import APART, ARM_TABLES, OTHER_TABLES, TABLES
from jsurgery.ablate.write_table import write
from jsurgery.errors import InputError
from jsurgery.runtime.progress import say

Study = Callable[[Sequence[SeedRun]], dict[str, Any]]
RUN: dict[str, Study] = {
    "errors": block_errors,
    "objective": objective,
    "attention": attention_statistics,
    "rope": phi_and_rope,
    "temporal": temporal_control,
}
RUN_APART: dict[str, Study] = {"families": families_table}


def run_tables(
    config: ConfigDict,
    table: str,
    workdir: str,
    seeds: int,
    results: str | None = None,
    measurements: str | None = None,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Runs a table of `TABLES`, "all" of them, one of `APART`, or "evidence".

    Leaves TABLE.json, .md and .html in the workdir.

    The same call again resumes. Tables in one workdir share traces, distillations and fine-tuned models.

    Args:
      results: a Markdown document whose section for the table is rewritten.
      measurements: the folder of measurements, by default the workdir's `measurements`. Measurements that it has are
        never repeated, even if the workdir lacks the models.
      shard: (I, N), of N runs at the same time: this one measures seeds I, I + N, ... and writes no table.
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
    seed_runs = [SeedRun(config, folder, number, measurements) for number in range(first, seeds, step)]
    if not seed_runs:
        raise InputError(f"--shard={first}/{step}: expected at most one for each of {seeds} seeds")
    for name in TABLES if table == "all" else (table,):
        study = (RUN | RUN_APART).get(name)
        result = study(seed_runs) if study else run_arms(ARM_TABLES[name], seed_runs)
        if step > 1:
            continue
        subject = "tiny model" if config.model.path == "tiny_wan" else config.model.path
        text = write({"table": name, "title": title(name), "subject": subject, **result}, folder)
        print(text)
        if document is not None:
            update_results(document, name, text)
        say(f"{name}: {folder / name}.json, .md, .html")


def title(table: str) -> str:
    others = OTHER_TABLES | APART
    return others[table] if table in others else ARM_TABLES[table].title
