"""The page of a blind preference study: people say which of two videos they prefer.

The two videos of a pair are one video in the page, side by side, so that they stay in step. Only the key file beside
the page says which half is whose. Each participant's browser draws the order of the pairs and the sides of the halves.
"""

import base64
import pathlib
import secrets
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av.error
import numpy as np
from etils import epath

from jsurgery.errors import InputError
from jsurgery.evaluate.study import KEY, PAGE, prompt_of, read_dimensions
from jsurgery.io.files import check_local, check_writable, replacing, write_json
from jsurgery.report.templates import player_data, render
from jsurgery.report.video_player import abreast, decode, encode
from jsurgery.runtime.progress import Progress, say


def build_study(
    a: str, b: str, output: str, *, prompts: int = 50, info: str | None = None, seed: int = 0
) -> pathlib.Path:
    """Writes `output/study.html` and its key from two folders with videos of the same names; returns the page's path.

    prompts: number of prompts to draw, with `seed`, from those in both folders; one video of each prompt is drawn.
    info: VBench's list of prompts with their dimensions (default: `full_info.json` beside the folder `a`, if there).
        Without it the table of answers has a single row.
    Raises InputError for folders with no video in common, pairs of different sizes, and an existing study.
    """
    if seed < 0:
        raise InputError(f"--seed: expected a whole number from 0, found {seed}")
    folders = {"a": pathlib.Path(a), "b": pathlib.Path(b)}
    files = {}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise InputError(f"--{name}={folder}: expected a folder of mp4 files, found none")
        files[name] = {file.relative_to(folder) for file in folder.rglob("*.mp4") if not file.name.startswith(".")}
    common = sorted(files["a"] & files["b"])
    if not common:
        raise InputError(f"--a={a}, --b={b}: expected mp4 files of the same names, found none in both")
    check_local(output, "--output", "the page is to be opened in a browser")
    target = pathlib.Path(output)
    if (target / KEY).exists() or (target / PAGE).exists():
        raise InputError(f"--output={output}: a study is there already; its answers need its key: use another folder")
    alone = len(files["a"] ^ files["b"])
    if alone:
        say(f"study: {alone} videos are in one folder only and left out")

    files_by_prompt: dict[str, list[pathlib.Path]] = {}
    for file in common:
        files_by_prompt.setdefault(prompt_of(file, list(folders.values())), []).append(file)
    rng = np.random.default_rng(seed)
    if len(files_by_prompt) < prompts:
        say(f"study: {len(files_by_prompt)} of {prompts} prompts are there; all are taken")
    chosen = [list(files_by_prompt)[i] for i in sorted(rng.permutation(len(files_by_prompt))[:prompts])]
    drawn = {prompt: (files := files_by_prompt[prompt])[rng.integers(len(files))] for prompt in chosen}
    beside = folders["a"].parent / "full_info.json"
    dimensions = read_dimensions(info or (str(beside) if beside.exists() else None))

    check_writable(target / PAGE, "--output")
    sealed = secrets.SystemRandom()
    pairs, key, progress = [], {}, Progress("study", len(drawn))
    for number, (prompt, file) in enumerate(drawn.items()):
        name, first = secrets.token_hex(6), sealed.choice("ab")
        halves = join(*(folders[side] / file for side in ("ab" if first == "a" else "ba")))
        pairs.append({"id": name, "prompt": prompt, **halves})
        key[name] = {"prompt": prompt, "dimensions": dimensions.get(prompt, []), "file": str(file), "first": first}
        progress.show(number + 1, last=number + 1 == len(drawn))
    sealed.shuffle(pairs)
    study = secrets.token_hex(6)
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_json(epath.Path(target / KEY), {"study": study, "a": a, "b": b, "pairs": key})
        with replacing(target / PAGE) as temporary:
            temporary.write_text(page_of(study, pairs), "utf-8")
    except OSError as error:
        raise InputError(f"--output={output}: {error.strerror}") from None
    return target / PAGE


def join(first: pathlib.Path, second: pathlib.Path) -> dict[str, Any]:
    """Two videos as one, side by side: `video` (WebM as base64), and `width`, `height` and `offset` of the halves."""
    (one, rate), (two, other_rate) = read_video(first), read_video(second)
    if rate != other_rate:
        rates = f"{float(rate):g} and {float(other_rate):g} frames a second"
        raise InputError(f"{first}, {second}: expected videos of one rate, found {rates}")
    if one.shape[1:] != two.shape[1:]:
        sizes = " and ".join(f"{video.shape[2]} x {video.shape[1]}" for video in (one, two))
        raise InputError(f"{first}, {second}: expected videos of one size, found {sizes}")
    frames = min(len(one), len(two))
    both = abreast([one[:frames], two[:frames]])
    height, width = one.shape[1:3]
    video = base64.b64encode(encode(both, rate)).decode()
    return {"video": video, "width": width, "height": height, "offset": both.shape[2] // 2}


def read_video(file: pathlib.Path) -> tuple[np.ndarray, Fraction]:
    """(uint8 [F, H, W, 3], frames a second)."""
    try:
        return decode(file.read_bytes())
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        raise InputError(f"{file}: expected a video that decodes ({error})") from None


def page_of(study: str, pairs: Sequence[dict[str, Any]]) -> str:
    data = {"study": study, "pairs": player_data(pairs)}
    videos = {pair["id"]: pair["video"] for pair in pairs}
    return render("study.html.jinja", assets="study", data=data, videos=videos)
