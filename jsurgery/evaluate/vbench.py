"""Makes the videos that VBench and VBench-2.0 expect, and scores them with VBench's own package.

The protocol is that of github.com/Vchitect/VBench: `prompts/README.md` and `VBench-2.0/prompts/README.md` (names,
seeds, augmented prompts), `vbench/__init__.py` and `vbench2/__init__.py` (what the loaders look for) and
`vbench/cli/static_filter.py` (temporal flickering is scored on the first five still videos of each prompt).
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
from jsurgery.errors import InputError, shortened
from jsurgery.evaluate.vbench_scores import DIMENSIONS, DIMENSIONS_2, canonical, report_results
from jsurgery.io.files import check_local, check_writable, read_json, write_json
from jsurgery.runtime import processes
from jsurgery.runtime.progress import say
from jsurgery.sample import VideoRequest, make_videos, unfinished

NEED_A_LIST = ("object_class", "multiple_objects", "scene", "appearance_style", "color", "spatial_relationship")
LONGEST_NAME = 245  # bytes; file systems allow 255, and a file's name is longer while it is written


@dataclasses.dataclass(frozen=True)
class Suite:
    """How VBench and VBench-2.0 differ. videos: number per prompt; more: number for dimensions that need more."""

    package: str
    dimensions: tuple[str, ...]
    videos: int
    more: dict[str, int]
    name_length: int | None = None  # characters of the prompt that name its videos
    folders: bool = False  # whether each dimension has a folder of videos


VBENCH = Suite("vbench", DIMENSIONS, videos=5, more={"temporal_flickering": 25})
VBENCH_2 = Suite("vbench2", DIMENSIONS_2, videos=3, more={"diversity": 20}, name_length=180, folders=True)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """text: VBench's prompt, by which videos are named; model_prompt: what the model gets; entry: in VBench's list."""

    text: str
    model_prompt: str
    dimensions: tuple[str, ...]
    entry: dict[str, Any] | None


def read_suite(
    prompts: str, info: str | None = None, augmented: str | None = None, subset: int = 1
) -> tuple[Suite, list[Prompt]]:
    """The prompts of a file: VBench's list with its dimensions (`*full_info.json`), or one prompt a line.

    info: VBench's list, which gives the dimensions of the lines. Without it, a text file named after a dimension
        (`temporal_flickering.txt`) has that dimension, and any other has none.
    augmented: a text file with the prompts that the model gets in place of the lines (or entries) of `prompts`.
    subset: keeps every n-th prompt of each group of dimensions. The paper evaluates its ablations on one fifth and does
        not say which.

    Raises InputError for files that are no such lists or do not match.
    """
    is_list = prompts.endswith(".json")
    texts = [entry["prompt_en"].strip() for entry in read_info(prompts)] if is_list else read_prompts(prompts, flag="")
    model_prompts = texts if augmented is None else read_prompts(augmented, flag="")
    if len(model_prompts) != len(texts):
        way_out = ""
        if is_list and len(set(texts)) == len(model_prompts):  # VBench-2.0: 1,230 entries of 1,013 prompts
            way_out = f"; give the suite's text list, whose lines these follow, as --prompts, and {prompts} as --info"
        expected = f"a line for each of {len(texts)} prompts"
        raise InputError(f"{augmented}: expected {expected}, found {len(model_prompts)}{way_out}")
    # Reversed, so that of equal lines the first counts.
    model_prompt_of = dict(zip(reversed(texts), reversed(model_prompts), strict=True))
    if is_list or info is not None:
        entries = [entry for entry in read_info(info or prompts) if entry["prompt_en"].strip() in model_prompt_of]
        unknown = sorted(model_prompt_of.keys() - {entry["prompt_en"].strip() for entry in entries})
        if unknown:
            raise InputError(f"{info}: expected all prompts of {prompts}, found no {unknown[0]!r}")
        suite_prompts = [
            Prompt(entry["prompt_en"], model_prompt_of[entry["prompt_en"].strip()], tuple(entry["dimension"]), entry)
            for entry in entries
        ]
    else:
        stem = pathlib.Path(prompts).stem
        dimensions = (stem,) if canonical(stem) in (*DIMENSIONS, *DIMENSIONS_2) else ()
        suite_prompts = [Prompt(text, model_prompt_of[text], dimensions, None) for text in dict.fromkeys(texts)]
    suite = suite_of(suite_prompts, info or prompts)
    groups: dict[tuple[str, ...], list[Prompt]] = {}
    for prompt in suite_prompts:
        groups.setdefault(prompt.dimensions, []).append(prompt)
    kept = {id(prompt) for group in groups.values() for prompt in group[::subset]}
    return suite, [prompt for prompt in suite_prompts if id(prompt) in kept]


def read_info(path: str) -> list[dict[str, Any]]:
    """Entries with `prompt_en` and a list `dimension`, as in `VBench_full_info.json`."""
    entries = read_json(path, "VBench's list of prompts as JSON")
    if not isinstance(entries, list) or not entries:
        names = "VBench_full_info.json or VBench2_full_info.json"
        raise InputError(f"{path}: expected a list of prompts, as in {names}, found {type(entries).__name__}")
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
    """The suite that has the prompts' dimensions; VBench if they have none. Raises InputError for other dimensions."""
    names = {canonical(name) for prompt in prompts for name in prompt.dimensions}
    for suite in (VBENCH, VBENCH_2):
        if names <= set(suite.dimensions):
            return suite
    unknown = sorted(names - {*DIMENSIONS, *DIMENSIONS_2})
    raise InputError(
        f"{path}: expected dimensions of VBench or of VBench-2.0, found {unknown[0] if unknown else 'some of both'}"
    )


def plan_videos(
    config: ConfigDict, suite: Suite, prompts: Sequence[Prompt], folder: epath.Path, *, rule: str, seeds: int | None
) -> list[VideoRequest]:
    """A request for every video under `folder`; a prompt that is listed for several dimensions is sampled once.

    rule: "video" derives each video's noise from its name and index, whichever videos are made; "index" uses the seed
        plus i for the i-th video of every prompt. seeds: videos per prompt, in place of the suite's numbers.
    Raises InputError for a prompt that cannot name a file, and for two prompts that would name the same files.
    """
    counts: dict[tuple[str, str], tuple[Prompt, int]] = {}
    for prompt in prompts:
        for parent in prompt.dimensions if suite.folders else ("",):
            name = prompt.text[: suite.name_length]
            if "/" in name or len(name.encode()) > LONGEST_NAME:
                raise InputError(f"prompt {prompt.text!r}: expected at most {LONGEST_NAME} bytes and no slash")
            other, count = counts.get((parent, name), (prompt, 0))
            if other.text != prompt.text:
                raise InputError(f"prompts {prompt.text!r} and {other.text!r} would name the same videos")
            needed = [suite.more.get(canonical(dimension), 0) for dimension in prompt.dimensions]
            counts[parent, name] = other, seeds or max(count, suite.videos, *needed)
    total = sum(count for _, count in counts.values())
    requests: list[VideoRequest] = []
    for (parent, name), (prompt, count) in counts.items():
        for index in range(count):
            seed, number = noise_of(config.seed, f"{parent}/{name}", index, rule)
            file = folder / parent / f"{name}-{index}.mp4"
            label = f"sample {len(requests) + 1}/{total}"
            requests.append(VideoRequest(file, prompt.model_prompt, seed, number, label))
    return requests


def noise_of(seed: int, name: str, index: int, rule: str) -> tuple[int, int]:
    """(seed, number) of the `index`-th video of a prompt; `rule` as in `plan_videos`."""
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
    """Makes the missing videos of one shard in `output/videos`, prints their files, and scores the complete set.

    A device, or a group of devices that share a model, makes one video at a time.

    shard: (index, number of shards). If several processes run together, each process is a shard, and process 0
        continues when all have ended.
    `output/full_info.json` holds the entries of VBench's list for these prompts, if there is a list. Once all shards'
    videos exist, VBench's package scores them if it is installed; otherwise its commands are printed.
    Raises InputError for an existing video that was made with other settings, and if a command of VBench fails.
    """
    check_local(output, "--output", "the packages of VBench read local files")
    folder = epath.Path(output)
    requests = plan_videos(config, suite, prompts, folder / "videos", rule=rule, seeds=seeds)
    number, count = (jax.process_index(), jax.process_count()) if processes.several() else shard
    listed = [prompt.entry for prompt in prompts if prompt.entry is not None]

    def work() -> None:
        missing = unfinished(config, requests[number::count])
        check_names([request.file for request in missing])
        if listed and number == 0:
            write_json(epath.Path(folder / "full_info.json"), listed)
        for file in make_videos(config, missing):
            print(file, flush=True)

    processes.on_all(work)
    if not processes.is_first():
        return
    left = sum(not request.file.exists() for request in requests)
    if left:
        say(f"vbench: {left} of {len(requests)} videos are left to other shards")
        return
    lines = commands(suite, prompts, output)
    if importlib.util.find_spec(suite.package) is None:
        say(f"vbench: all {len(requests)} videos are there; where {suite.package} is installed (it needs a GPU), run:")
        print("\n".join(shlex.join(line) for line in lines))
        return
    for line in lines:
        if subprocess.run(line).returncode:
            raise InputError(f"{shlex.join(line)}: failed; the videos are kept: run the same command again")
    report_results([str(folder / "results")], config.model.path)


def check_names(files: Sequence[epath.Path]) -> None:
    """Raises InputError where the file system of the videos cannot have a file of each name, as those of desktops may.

    Some take no colon or question mark, and some no two names that differ in the case of letters alone.
    """
    folded: dict[str, str] = {}
    for file in files:
        check_writable(file, "--output")
        other = folded.setdefault(str(file).casefold(), str(file))
        if other != str(file) and ignores_case(file.parent):
            raise InputError(f"--output: {file} and {other} are one file on this disk, where case does not count")


def ignores_case(folder: epath.Path) -> bool:
    """Whether the file system takes names that differ in the case of letters alone for one."""
    probe = folder / ".Probe"
    probe.write_bytes(b"")
    try:
        return (folder / ".pROBE").exists()
    finally:
        probe.unlink()


def commands(suite: Suite, prompts: Sequence[Prompt], output: str) -> list[list[str]]:
    """The commands of VBench's package that score the videos of `output` into `output/results`.

    Prompts without a dimension are scored in the dimensions that VBench has for any video ("custom_input").
    """
    folder = pathlib.Path(output)
    names = list(dict.fromkeys(name for prompt in prompts for name in prompt.dimensions))
    run = [suite.package, "evaluate", "--output_path", shlex.quote(str(folder / "results"))]  # goes through a shell
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
