"""What a surgery has achieved, in plain words, for its last lines on a terminal."""

import pathlib
import shlex
import sys

from etils import epath
from ml_collections import ConfigDict

from jsurgery.report.page import stages
from jsurgery.report.run_files import RunFiles, read_run
from jsurgery.report.scores import quality
from jsurgery.runtime.progress import say

LONGEST_PROMPT = 100  # that is repeated in a command


def tell_result(config: ConfigDict, workdir: epath.PathLike) -> None:
    for line in result_lines(read_run(workdir, config), command()):
        say(line)


def command() -> str:
    """What the user typed to run jsurgery."""
    return sys.argv[0] if pathlib.Path(sys.argv[0]).name == "jsurgery" else "jsurgery"


def result_lines(run: RunFiles, command: str) -> list[str]:
    """Lines: what the surgery saves and what it costs, where the page is, what to type next."""
    said, page = [], run.workdir / "report.html"
    if run.plan is not None:
        converted, share = sum(rate != 1 for rate in run.plan["rates"]), run.plan["share_of_teacher"]
        work = f"{abs(1 - share):.0%} {'less' if share <= 1 else 'more'} attention work"
        said.append(f"{converted} of {len(run.plan['rates'])} attention layers rebuilt, {work}")
    if run.evaluation is not None and (found := quality(run.evaluation)) is not None:
        said.append(told(found, run.evaluation["models"], stages(run.config)[found["model"]][0].lower()))
    lines = [f"done: {'; '.join(said)}."] if said else []
    lines.append(f"look: open {page} in a browser.")
    if run.prompts and (run.workdir / "model").exists():
        prompt = shlex.quote(run.prompts[0]) if len(run.prompts[0]) <= LONGEST_PROMPT else "'…'"
        model = shlex.quote(str(run.workdir / "model"))
        lines.append(f"next: {command} sample --model={model} --prompt={prompt} --output=clip.mp4")
    return lines


def told(found: dict, models: dict, name: str) -> str:
    """The teacher's and the last model's quality, and what there would be without distillation."""
    if "scores" in found:
        before, after = found["scores"]
        text = f"score {before:.2f} before, {after:.2f} after ({name})"
        bare = models.get("not_distilled", {}).get("score")
        return text + (f", {bare['total']['mean']:.2f} without distillation" if bare else "")
    if "losses" in found:
        before, after = found["losses"]
        return f"validation loss {before:.3f} before, {after:.3f} after ({name})"
    return f"distance to the original's clips {found['distance']['mean']:.2f} ({name})"
