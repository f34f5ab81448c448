"""The last lines that a surgery prints: what it achieved, and what to do next."""

import pathlib
import shlex
import sys

from etils import epath
from ml_collections import ConfigDict

from jsurgery.report.page import stages
from jsurgery.report.run_files import RunFiles, read_run
from jsurgery.report.scores import quality, scaled
from jsurgery.runtime.progress import say

LONGEST_PROMPT = 100  # characters; a longer prompt is not repeated in the suggested command


def tell_result(config: ConfigDict, workdir: epath.PathLike) -> None:
    for line in result_lines(read_run(workdir, config), command()):
        say(line)


def command() -> str:
    """The command that the user typed to run jsurgery."""
    return sys.argv[0] if pathlib.Path(sys.argv[0]).name == "jsurgery" else "jsurgery"


def result_lines(run: RunFiles, command: str) -> list[str]:
    """Lines: what the surgery saves and costs in quality, where the page is, and a command to try next."""
    achieved, page = [], run.workdir / "report.html"
    if run.plan is not None:
        converted, share = sum(rate != 1 for rate in run.plan["rates"]), run.plan["share_of_teacher"]
        work = f"{abs(1 - share):.0%} {'less' if share <= 1 else 'more'} attention work"
        achieved.append(f"{converted} of {len(run.plan['rates'])} attention layers rebuilt, {work}")
    if run.evaluation is not None and (result := quality(run.evaluation)) is not None:
        name = stages(run.config)[result["model"]][0].lower()
        achieved.append(quality_text(result, run.evaluation["models"], name))
    lines = [f"done: {'; '.join(achieved)}."] if achieved else []
    lines.append(f"look: open {page} in a browser.")
    if run.prompts and (run.workdir / "model").exists():
        prompt = shlex.quote(run.prompts[0]) if len(run.prompts[0]) <= LONGEST_PROMPT else "'…'"
        model = shlex.quote(str(run.workdir / "model"))
        lines.append(f"next: {command} sample --model={model} --prompt={prompt} --output=clip.mp4")
    return lines


def quality_text(result: dict, models: dict, name: str) -> str:
    """The result of `quality` in words; `name` is that of the last model."""
    if "scores" in result:
        before, after = result["scores"]
        text = f"score {before:.2f} before, {after:.2f} after ({name})"
        undistilled = scaled(models.get("not_distilled", {}).get("score", {}).get("total"))
        return text + (f", {undistilled['mean']:.2f} without distillation" if undistilled else "")
    if "losses" in result:
        before, after = result["losses"]
        return f"validation loss {before:.3f} before, {after:.3f} after ({name})"
    return f"distance to the original's clips {result['distance']['mean']:.2f} ({name})"
