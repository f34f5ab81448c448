"""The answers of a blind preference study, as behind the paper's Table 2: their statistics and their table.

`report/study_page.py` makes the page of a study. Only the key file, which stays with the author, says which model made
which video.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from etils import epath
from scipy.stats import binomtest

from jsurgery.data.video_writer import read_settings
from jsurgery.errors import InputError
from jsurgery.evaluate.vbench import read_info
from jsurgery.evaluate.vbench_scores import canonical
from jsurgery.io.files import read_object, write_json
from jsurgery.io.results import check_report

PAGE, KEY = "study.html", "study.key.json"
ANSWERS = ("first", "none", "second")


def prompt_of(file: pathlib.Path, folders: Sequence[pathlib.Path]) -> str:
    """A video's prompt: from VBench's name `prompt-N.mp4`, its metadata or its evaluation.json; else its name."""
    named = re.fullmatch(r"(.*\D.*)-\d+", file.stem)
    if named:
        return named[1]
    for folder in folders:
        prompt = read_settings(folder / file).get("prompt")
        if prompt:
            return str(prompt)
        evaluation = folder.parent.parent / "evaluation.json"
        if file.stem.isdecimal() and evaluation.exists():
            prompts = read_object(evaluation).get("prompts")
            if isinstance(prompts, list) and int(file.stem) < len(prompts):
                return str(prompts[int(file.stem)])
    return file.stem


def read_dimensions(path: str | None) -> dict[str, list[str]]:
    """prompt -> its dimensions, from VBench's list at `path`; empty without one."""
    dimensions: dict[str, list[str]] = {}
    for entry in read_info(path) if path else ():
        names = dimensions.setdefault(entry["prompt_en"], [])
        names += [canonical(name).replace("_", " ") for name in entry["dimension"]]
    return dimensions


def report_study(files: Sequence[str], key: str | None = None, report: str | None = None) -> None:
    """Prints the table of exported answers, and writes its numbers to a JSON file if `report` names one."""
    check_report(report)
    sealed = read_key(pathlib.Path(key) if key else pathlib.Path(files[0]).parent / KEY)
    rows, participants = tally(files, sealed)
    print(table(rows, sealed))
    print(f"\n{participants} participants; {rows['Total']['n']} comparisons. In brackets: 95 % (Wilson).")
    if report is not None:
        write_json(epath.Path(report), {"a": sealed["a"], "b": sealed["b"], "participants": participants, "rows": rows})


def read_key(file: pathlib.Path) -> dict[str, Any]:
    """The key file that `build_study` wrote beside the page. Raises InputError for any other file."""
    try:
        key = read_object(file)
        sound = {"study", "a", "b", "pairs"} <= key.keys() and all(
            pair["first"] in ("a", "b") and all(isinstance(name, str) for name in pair["dimensions"])
            for pair in key["pairs"].values()
        )
    except (InputError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise InputError(f"--key={file}: expected the {KEY} that lies beside the study's page")
    return key


def tally(files: Sequence[str], key: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], int]:
    """(rows by dimension and "Total", number of participants) from files of exported answers.

    A prompt of several dimensions counts in each of them, and once in the total. If a participant exported twice, the
    answers of the later file count. Raises InputError for files that are not answers to this study.
    """
    votes: dict[tuple[str, str], str] = {}
    for path in files:
        try:
            export = read_object(path)
            study, participant = export["study"], str(export["participant"])
            answers = {answer["pair"]: answer["answer"] for answer in export["answers"]}
        except (InputError, TypeError, KeyError):
            raise InputError(f"{path}: expected answers that a study's page exported") from None
        if study != key["study"]:
            raise InputError(f"{path}: expected answers of study {key['study']}, found those of {study}")
        for pair, answer in answers.items():
            if pair not in key["pairs"] or answer not in ANSWERS:
                raise InputError(f"{path}: expected answers {', '.join(ANSWERS)} to the key's pairs, found {answer!r}")
            votes[participant, pair] = answer
    counts: dict[str, dict[str, int]] = {}
    for (_, pair), answer in votes.items():
        sealed = key["pairs"][pair]
        choice = "none" if answer == "none" else "ab"[(sealed["first"] == "b") != (answer == "second")]
        for dimension in {*sealed["dimensions"], "Total"}:
            row = counts.setdefault(dimension, {"a": 0, "none": 0, "b": 0})
            row[choice] += 1
    names = [*sorted(counts.keys() - {"Total"}), "Total"]
    rows = {name: statistics(**counts.get(name, {"a": 0, "none": 0, "b": 0})) for name in names}
    return rows, len({participant for participant, _ in votes})


def statistics(a: int, none: int, b: int) -> dict[str, Any]:
    """Counts, the share of each answer with its 95 % Wilson interval, and the two-sided sign test of a against b.

    The test leaves out answers without a preference. It assumes that answers are independent, which is only partly true
    for answers of the same participant or to the same pair.
    """
    n = a + none + b
    result: dict[str, Any] = {"n": n, "p": float(binomtest(a, a + b).pvalue) if a + b else None}
    for name, count in {"a": a, "none": none, "b": b}.items():
        interval = binomtest(count, n).proportion_ci(method="wilson") if n else None
        result[name] = {
            "count": count,
            "share": count / n if n else None,
            "interval": [float(interval.low), float(interval.high)] if interval else None,
        }
    return result


def table(rows: dict[str, dict[str, Any]], key: dict[str, Any]) -> str:
    """Markdown, in the columns of the paper's Table 2."""

    def cell(choice: dict[str, Any]) -> str:
        if choice["share"] is None:
            return "–"
        low, high = choice["interval"]
        return f"{100 * choice['share']:.1f} ({100 * low:.0f} to {100 * high:.0f})"

    header = ["prompt dimension", f"{key['a']} %", "no preference %", f"{key['b']} %", "n", "sign test p"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, row in rows.items():
        p = "–" if row["p"] is None else f"{row['p']:.3g}"
        lines.append([name, cell(row["a"]), cell(row["none"]), cell(row["b"]), str(row["n"]), p])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
