"""The videos that VBench and VBench-2.0 expect to find, and the commands that score them.

The protocol is that of github.com/Vchitect/VBench: `prompts/README.md` and `VBench-2.0/prompts/README.md` (names,
seeds, augmented prompts), `vbench/__init__.py` and `vbench2/__init__.py` (what the loaders look for) and
`vbench/cli/static_filter.py` (temporal flickering is scored on the five first still videos of each prompt).
"""

import dataclasses
import hashlib
import importlib.util
import pathlib
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from jsurgery.config import check_text
from jsurgery.data.prompts import read_prompts
from jsurgery.errors import InputError
from jsurgery.evaluate.vbench_scores import DIMENSIONS, DIMENSIONS_2, canonical, report_results
from jsurgery.io.files import read_json, shortened, write_json
from jsurgery.runtime import processes
from jsurgery.runtime.progress import say
from jsurgery.sample import VideoRequest, make_videos, unfinished

NEED_A_LIST = ("object_class", "multiple_objects", "scene", "appearance_style", "color", "spatial_relationship")
LONGEST_NAME = 245  # bytes; file systems allow 255, and a file has a longer name while it is written


@dataclasses.dataclass(frozen=True)
class Suite:
    """What sets VBench and VBench-2.0 apart. `videos`: of a prompt; `more`: dimensions that need others."""

    package: str
    dimensions: tuple[str, ...]
    videos: int
    more: dict[str, int]
    name_length: int | None = None  # characters of the prompt that name its videos
    folders: bool = False  # one for each dimension


VBENCH = Suite("vbench", DIMENSIONS, videos=5, more={"temporal_flickering": 25})
VBENCH_2 = Suite("vbench2", DIMENSIONS_2, videos=3, more={"diversity": 20}, name_length=180, folders=True)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`text` names the videos, `words` are what the model is told; `entry` stands for it in VBench's own list."""

    text: str
    words: str
    dimensions: tuple[str, ...]
    entry: dict[str, Any] | None


def read_suite(
    prompts: str, info: str | None = None, augmented: str | None = None, subset: int = 1
) -> tuple[Suite, list[Prompt]]:
    """The prompts of a file: VBench's list with its dimensions (`*full_info.json`), or one prompt a line.

    info: the list that tells the dimensions of the lines. Without it a text file that is named after a dimension
        (`temporal_flickering.txt`) is of that one; other lines have none.
    augmented: a text file whose lines are what the model is told instead of the lines (or entries) of `prompts`.
    subset: every n-th prompt of each group of dimensions. The paper evaluates its ablations on one fifth and does not
        say which.

    Raises InputError for files that are no such lists, that do not match, and for prompts that cannot name a file.
    """
    is_list = prompts.endswith(".json")
    texts = [entry["prompt_en"].strip() for entry in read_info(prompts)] if is_list else read_prompts(prompts, flag="")
    words = texts if augmented is None else read_prompts(augmented, flag="")
    if len(words) != len(texts):
        raise InputError(f"{augmented}: expected a line for each of {len(texts)} prompts, found {len(words)}")
    told = dict(zip(reversed(texts), reversed(words), strict=True))  # of equal lines the first counts
    if is_list or info is not None:
        entries = [entry for entry in read_info(info or prompts) if entry["prompt_en"].strip() in told]
        unknown = sorted(told.keys() - {entry["prompt_en"].strip() for entry in entries})
        if unknown:
            raise InputError(f"{info}: expected all prompts of {prompts}, found no {unknown[0]!r}")
        found = [
            Prompt(entry["prompt_en"], told[entry["prompt_en"].strip()], tuple(entry["dimension"]), entry)
            for entry in entries
        ]
    else:
        stem = pathlib.Path(prompts).stem
        dimensions = (stem,) if canonical(stem) in (*DIMENSIONS, *DIMENSIONS_2) else ()
        found = [Prompt(text, told[text], dimensions, None) for text in dict.fromkeys(texts)]
    suite = suite_of(found, info or prompts)
    groups: dict[tuple[str, ...], list[Prompt]] = {}
    for prompt in found:
        groups.setdefault(prompt.dimensions, []).append(prompt)
    kept = {id(prompt) for group in groups.values() for prompt in group[::subset]}
    return suite, [prompt for prompt in found if id(prompt) in kept]


def read_info(path: str) -> list[dict[str, Any]]:
    """Entries with `prompt_en` and a list `dimension`, as in `VBench_full_info.json`."""
    entries = read_json(path, "VBench's list of prompts as JSON")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a list of prompts, found {type(entries).__name__}")
    for entry in entries:
        text = entry.get("prompt_en") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{path}: expected entries with 'prompt_en', found {shortened(entry)}")
        check_text(f"{path}: prompt_en", text)
        names = entry.get("dimension")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}: expected a list 'dimension' of names in the entry {shortened(text)}")
    return entries


def suite_of(prompts: Sequence[Prompt], path: str) -> Suite:
    """The suite of the prompts' dimensions; VBench where there are none."""
    names = {canonical(name) for prompt in prompts for name in prompt.dimensions}
    for suite in (VBENCH, VBENCH_2):
        if names <= set(suite.dimensions):
            return suite
    odd = sorted(names - {*DIMENSIONS, *DIMENSIONS_2})
    raise InputError(
        f"{path}: expected dimensions of VBench or of VBench-2.0, found {odd[0] if odd else 'some of both'}"
    )


def plan_videos(
    config: ConfigDict, suite: Suite, prompts: Sequence[Prompt], folder: pathlib.Path, *, rule: str, seeds: int | None
) -> list[VideoRequest]:
    """A job for every video under `folder`; a prompt that is listed for several dimensions is sampled once.

    rule: "video" gives every video noise of its own, whichever others are made; "index" takes the seed plus i for the
        i-th video of every prompt. seeds: videos a prompt instead of the suite's numbers.
    Raises InputError for prompts that cannot name a file and for two that would name the same.
    """
    wanted: dict[tuple[str, str], tuple[Prompt, int]] = {}
    for prompt in prompts:
        for parent in prompt.dimensions if suite.folders else ("",):
            name = prompt.text[: suite.name_length]
            if "/" in name or len(name.encode()) > LONGEST_NAME:
                raise InputError(f"prompt {prompt.text!r}: expected at most {LONGEST_NAME} bytes and no slash")
            other, count = wanted.get((parent, name), (prompt, 0))
            if other.text != prompt.text:
                raise InputError(f"prompts {prompt.text!r} and {other.text!r} would name the same videos")
            needed = [suite.more.get(canonical(dimension), 0) for dimension in prompt.dimensions]
            wanted[parent, name] = other, seeds or max(count, suite.videos, *needed)
    total = sum(count for _, count in wanted.values())
    jobs: list[VideoRequest] = []
    for (parent, name), (prompt, count) in wanted.items():
        for index in range(count):
            seed, number = noise_of(config.seed, f"{parent}/{name}", index, rule)
            file = folder / parent / f"{name}-{index}.mp4"
            jobs.append(VideoRequest(file, prompt.words, seed, number, f"sample {len(jobs) + 1}/{total}"))
    return jobs


def noise_of(seed: int, name: str, index: int, rule: str) -> tuple[int, int]:
    """(seed, number) of the `index`-th video of a prompt."""
    if rule == "index":
        return (seed + index) % 2**32, 0
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "big"), index


def evaluate(
    config: ConfigDict,
    suite: Suite,
    prompts: Sequence[Prompt],
    output: str,
    *,
    rule: str = "video",
    seeds: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Makes the videos of this shard, number `shard[0]` of `shard[1]`, that are not there yet, and prints their files.

    Where several processes run this together, each is a shard, by its index, and the first goes on when all have ended.
    They lie in `output/videos`; `output/full_info.json` is VBench's list of just these prompts, where there is one.
    When no video is missing, of no shard, VBench's package scores them if it is installed; else its commands are
    printed. Raises InputError for a video that is there and was made with other settings.
    """
    folder = pathlib.Path(output)
    jobs = plan_videos(config, suite, prompts, folder / "videos", rule=rule, seeds=seeds)
    number, count = (jax.process_index(), jax.process_count()) if processes.several() else shard
    listed = [prompt.entry for prompt in prompts if prompt.entry is not None]

    def work() -> None:
        mine = unfinished(config, jobs[number::count])
        try:
            for parent in {job.file.parent for job in jobs}:
                parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output={output}: {error.strerror}") from None
        if listed and number == 0:
            write_json(epath.Path(folder / "full_info.json"), listed)
        for file in make_videos(config, mine):
            print(file, flush=True)

    processes.on_all(work)
    if not processes.is_first():
        return
    left = sum(not job.file.exists() for job in jobs)
    if left:
        say(f"vbench: {left} of {len(jobs)} videos are left to other shards")
        return
    lines = commands(suite, prompts, output)
    if importlib.util.find_spec(suite.package) is None:
        say(f"vbench: all {len(jobs)} videos are there; where {suite.package} is installed (it needs a GPU), run:")
        print("\n".join(shlex.join(line) for line in lines))
        return
    for line in lines:
        if subprocess.run(line).returncode:
            raise InputError(f"{shlex.join(line)}: failed; the videos are there, and running this again goes on")
    report_results([str(folder / "results")], config.model.path)


def commands(suite: Suite, prompts: Sequence[Prompt], output: str) -> list[list[str]]:
    """What scores the videos of `output` with VBench's own package, into `output/results`.

    Prompts of no dimension are scored in those that VBench has for any video ("custom_input").
    """
    folder = pathlib.Path(output)
    names = list(dict.fromkeys(name for prompt in prompts for name in prompt.dimensions))
    run = [suite.package, "evaluate", "--output_path", shlex.quote(str(folder / "results"))]  # it goes through a shell
    if not names:
        custom = [name for name in DIMENSIONS if name not in NEED_A_LIST]
        return [
            [*run, "--mode", "custom_input", "--videos_path", str(folder / "videos"), "--dimension", " ".join(custom)]
        ]
    if any(prompt.entry is not None for prompt in prompts):
        run += ["--full_json_dir", shlex.quote(str(folder / "full_info.json"))]
    run.append("--videos_path")
    if suite.folders:
        return [[*run, str(folder / "videos" / name), "--dimension", name] for name in names]
    still, lines = folder / "still", []
    others = [name for name in names if name != "temporal_flickering"]
    if others:
        lines.append([*run, str(folder / "videos"), "--dimension", " ".join(others)])
    if "temporal_flickering" in names:
        lines.append(["vbench", "static_filter", "--videos_path", str(folder / "videos"), "--result_path", str(still)])
        lines.append([*run, str(still / "filtered_videos"), "--dimension", "temporal_flickering"])
    return lines
