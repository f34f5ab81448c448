"""The evidence as a JSON file and as Markdown tables. Both are rewritten after every row."""

import json
import os
import pathlib
from typing import Any

from jsurgery.bench.gpu_evidence.rows import ATTENTION, DISTILLATION, FORWARD, KERNELS, PARTS, Row

TOY_NOTE = "toy sizes: no GPU found; nothing here is a measurement of a GPU"
COLUMNS = {
    KERNELS: "kernel test | tokens | error of y | at most | of a gradient | at most | least of a control | passed",
    ATTENTION: "attention | tokens | pass | median ms | min to max | over baseline | FLOP bound | TFLOP/s",
    PARTS: "part of attention | tokens | pass | median ms | min to max | over baseline | FLOP bound | TFLOP/s",
    FORWARD: "whole forward | video | median s | min to max | over baseline | FLOP bound | TFLOP/s",
    DISTILLATION: "distillation step | video | median s | min to max | forwards of the teacher | by FLOPs | TFLOP/s",
}


class Report:
    """The report's files. They list every row from the start, as missing until its result is added."""

    def __init__(self, folder: pathlib.Path, rows: list[Row], header: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.json, self.markdown = folder / "gpu_evidence.json", folder / "gpu_evidence.md"
        self.header = header
        self.rows = [row.shown() | {"missing": "not begun"} for row in rows]
        self.write()

    def add(self, index: int, result: dict[str, Any]) -> None:
        """`result` is what was measured, or {"missing": the reason}."""
        del self.rows[index]["missing"]
        self.rows[index] |= result
        self.write()

    def end(self, seconds: float) -> None:
        self.header["seconds"] = round(seconds, 1)
        self.write()

    def write(self) -> None:
        replace(self.json, json.dumps(self.header | {"rows": self.rows}, indent=1) + "\n")
        replace(self.markdown, as_markdown(self.header, self.rows))


def replace(path: pathlib.Path, text: str) -> None:
    """Writes under a temporary name, then renames: a file with the final name is complete."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def as_markdown(header: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    machine, versions = header.get("machine", {}), header.get("versions", {})
    lines = ["# GPU evidence", ""]
    lines += [f"**{header['note']}**", ""] if "note" in header else []
    for part in (machine, versions, header.get("sizes", {})):
        lines += [", ".join(f"{name} {value}" for name, value in part.items()), ""] if part else []
    for group, columns in COLUMNS.items():
        if measured := [row for row in rows if row["group"] == group and "missing" not in row]:
            lines += [f"| {columns} |", "|---" * (columns.count("|") + 1) + "|"]
            lines += [f"| {' | '.join(cells(row))} |" for row in measured] + [""]
            if baselines := dict.fromkeys(row["baseline"] for row in measured if "baseline" in row):
                lines += [f"Baseline, measured in turn with each row: {', '.join(baselines)}.", ""]
    if missing := [row for row in rows if "missing" in row]:
        lines += [f"Missing, {len(missing)} of {len(rows)} rows:", ""]
        lines += [f"- {title(row)}: {row['missing']}" for row in missing] + [""]
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> list[str]:
    if row["group"] == KERNELS:
        numbers = [row.get(name) for name in ("error", "tolerance", "gradient_error", "gradient_tolerance")]
        numbers.append(min(row["control_errors"].values()))
        errors = ("-" if number is None else f"{number:.1e}" for number in numbers)
        return [row["name"], f"{row['tokens']:,}", *errors, "yes" if row["passed"] else "**no**"]
    unit = 1000 if row["group"] in (ATTENTION, PARTS) else 1
    place = [f"{row['tokens']:,}", row["pass"]] if row["group"] in (ATTENTION, PARTS) else [video(row)]
    low, high = (unit * limit for limit in row["spread_s"])
    times = [f"{unit * row['median_s']:.4g}", f"{low:.4g} to {high:.4g}"]
    speedup, bound = row.get("speedup"), row["bound"]
    if row["group"] == DISTILLATION:  # inverted: how many forwards of the teacher a step costs
        speedup, bound = speedup and 1 / speedup, 1 / bound
    ratios = ["-" if speedup is None else f"{speedup:.2f}", f"{bound:.2f}"]
    return [row["name"], *place, *times, *ratios, f"{row['tflops_per_s']:.3g}"]


def title(row: dict[str, Any]) -> str:
    place = f"{row['tokens']:,} tokens" if "tokens" in row else video(row)
    return ", ".join([row["group"], row["name"], place, *([row["pass"]] if row["group"] in (ATTENTION, PARTS) else [])])


def video(row: dict[str, Any]) -> str:
    frames, height, width = row["video"]
    return f"{height}x{width}, {frames} frames"


def line(row: Row, result: dict[str, Any]) -> str:
    """The line that is printed when a row has ended."""
    name = title(row.shown())
    if "missing" in result:
        return f"{name}: missing: {result['missing']}"
    if row.group == KERNELS:
        verdict = "passed" if result["passed"] else "FAILED"
        return f"{name}: {verdict}, error {result['error']:.1e}, tolerance {result['tolerance']:.1e}"
    ratio = f", {result['speedup']:.2f} times {result['baseline']}" if "speedup" in result else ""
    return f"{name}: {1000 * result['median_s']:.4g} ms, {result['tflops_per_s']:.3g} TFLOP/s{ratio}"


def summary(report: Report) -> dict[str, int]:
    """How many rows were measured, how many are missing, and how many kernel tests failed."""
    missing = sum("missing" in row for row in report.rows)
    failed = sum(row.get("passed") is False for row in report.rows)
    return {"measured": len(report.rows) - missing, "missing": missing, "failed": failed}
