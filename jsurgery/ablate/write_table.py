"""Writes a table's result as Markdown, as JSON and as an HTML page."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from etils import epath

from jsurgery.io.files import write_json
from jsurgery.io.results import markdown_table
from jsurgery.report.charts import Chart, line_chart
from jsurgery.report.cost_page import write_page

LABELS = {
    "validation_loss": "validation loss",
    "latent_rmse": "latent RMSE",
    "velocity_error": "velocity error",
    "softmax_share": "softmax share",
    "teacher_share": "teacher's mass there",
    "attention_flops": "attention FLOPs, of the teacher's",
    "attention_time": "attention time, of the teacher's",
    "velocity_squared": "velocity error, squared, %",
    "finetuned_squared": "the same, fine-tuned",
    "distilled": "velocity error, squared, %",
    "initial": "with initial maps",
    "one block": "velocity error, squared, %",
    "phi_kparams": "φ, k params",
    "phi_mflop": "φ, MFLOP",
}
HIDDEN = ("color", "background", "flicker", "shape")  # measures in the JSON alone
PAIRED = ("total", "motion", "latent_rmse", "velocity_error", "error R8", "error linear")


def markdown(result: Mapping[str, Any]) -> str:
    parts = [result["text"]]
    for title, head, body in grids(result):
        parts += [title, markdown_table(head, body)] if title else [markdown_table(head, body)]
    return "\n\n".join([*parts, *result.get("notes", [])]) + "\n"


def grids(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, body) of two tables: the arms, with the paper's numbers in the last columns, and the contrasts.

    Those of `more` follow: each has a "title", and "rows" or "contrasts".
    """
    tables = [("", *grid_of_rows(result["subject"], result["rows"], result.get("paper", {})))]
    if contrasts := result.get("contrasts", {}):
        title = "Paired differences over the prompts or blocks of all seeds, with 95 % bootstrap intervals:"
        tables.append((title, *grid_of_contrasts(contrasts)))
    for each in result.get("more", ()):
        grid = grid_of_contrasts(each["contrasts"]) if "contrasts" in each else grid_of_rows("", each["rows"])
        tables.append((each["title"], *grid))
    return tables


def grid_of_rows(
    subject: str, rows: Mapping[str, Mapping[str, Any]], paper: Mapping[str, Mapping[str, float]] = MappingProxyType({})
) -> tuple[list[str], list[list[str]]]:
    # In the order of the last row, since the first, the teacher's, lacks some columns.
    columns = [c for c in dict.fromkeys(name for row in reversed([*rows.values()]) for name in row) if c not in HIDDEN]
    printed = list(dict.fromkeys(name for row in paper.values() for name in row))
    head = [subject, *(LABELS.get(c, c) for c in columns), *(f"paper: {name}" for name in printed)]
    body = []
    for name, row in rows.items():
        of_paper = paper.get(name, {})
        quoted = [f"{of_paper[p]:g}" if p in of_paper else "" for p in printed]
        body.append([name, *(cell(row.get(c)) for c in columns), *quoted])
    return head, body


def grid_of_contrasts(contrasts: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    measures = list(dict.fromkeys(name for row in contrasts.values() for name in row))
    body = [[pair, *(difference(row.get(m)) for m in measures)] for pair, row in contrasts.items()]
    return ["", *(LABELS.get(m, m) for m in measures)], body


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return f"{value:.4g}"
    mean, deviation = value
    return f"{mean:.4f} ± {deviation:.4f}" if math.isfinite(mean) else "n/a"


def difference(paired: Mapping[str, float] | None) -> str:
    if paired is None or not math.isfinite(paired["difference"]):
        return ""
    return f"{paired['difference']:+.4f} [{paired['low']:+.4f}, {paired['high']:+.4f}] (n {paired['items']})"


def charts(result: Mapping[str, Any]) -> list[Chart]:
    figures = [interval_chart(m, result["rows"]) for m in result.get("plotted", ())]
    for chart in result.get("charts", ()):
        points = [
            {"step": x, name: y}
            for name, line in chart["lines"].items()
            for x, y in zip(line["x"], line["y"], strict=True)
            if math.isfinite(y)
        ]
        points.sort(key=lambda point: point["step"])
        if len({point["step"] for point in points}) > 1:
            figures.append(line_chart(chart["title"], points, {name: name for name in chart["lines"]}))
    return [figure for figure in figures if figure is not None]


def interval_chart(measure: str, rows: Mapping[str, Mapping[str, Any]]) -> Chart | None:
    """A vertical line from mean - deviation to mean + deviation for every row, numbered in the table's order."""
    spreads = {name: row[measure] for name, row in rows.items() if isinstance(row.get(measure), Sequence)}
    spreads = {name: spread for name, spread in spreads.items() if math.isfinite(spread[0])}
    points = [
        {"step": at, name: mean + sign * deviation}
        for at, (name, (mean, deviation)) in enumerate(spreads.items())
        for sign in (-1, 1)
    ]
    if len(spreads) < 2:
        return None
    numbered = {name: f"{number} {name}" for number, name in enumerate(spreads, 1)}
    chart = line_chart(LABELS.get(measure, measure), points, numbered)
    ticks = tuple((100 * at / (len(spreads) - 1), str(at + 1)) for at in range(len(spreads)))
    return chart and dataclasses.replace(chart, x_ticks=ticks)


def write(result: Mapping[str, Any], workdir: epath.Path) -> str:
    """Leaves TABLE.json, TABLE.md and TABLE.html in the workdir; returns the Markdown."""
    name, text = result["table"], markdown(result)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / f"{name}.json", result)
    (workdir / f"{name}.md").write_text(text)
    caption = " ".join([result["text"], *result.get("notes", [])])
    sections: list[dict[str, Any]] = [{"title": "Figure", "text": "", "charts": charts(result)}]
    for title, head, body in grids(result):
        sections.append({"title": "Table", "text": title, "table": {"head": head, "rows": body}})
    write_page(workdir / f"{name}.html", result["title"], caption, [], sections)
    return text
