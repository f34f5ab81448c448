"""`comparison.gif`: the clips of a run's models beside each other, with labels, for a README or a message."""

import io
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jsurgery.data.sprites import parse_caption
from jsurgery.errors import InputError
from jsurgery.io.files import replacing
from jsurgery.report.run_files import RunFiles
from jsurgery.report.video_player import read_clip

PROMPTS = 4  # in the picture
AS_GOOD = 0.01  # by which the teacher's score of a chosen prompt may be below the best
DULL = {"still": PROMPTS}  # words that count as used from the start: a clip without motion looks like a picture
BYTES = 600_000  # of the file, where smaller clips and fewer frames can keep to it
HEIGHTS = (152, 136, 112, 96)  # pixels of a clip: the first is tried first, the next when the file is too large
FRAMES = 24  # longer clips are shown at a fraction of their rate
WIDTH = 880  # pixels, as GitHub shows a README; wider clips get a line each
MARGIN, GUTTER, LINE, LABEL, CAPTION, TITLE = 14, 8, 15, 12, 13, 15  # pixels; the last three are sizes of type
PAPER, INK, GREY, EDGE = (255, 255, 255), (25, 25, 25), (90, 90, 90), (190, 190, 190)
COLORS = 64  # of the palette that all frames share
STILL = 12  # a pixel that changes by less, of 255, stays as it was: without this, the codec's noise doubles the file
LAST_FRAME = 900  # milliseconds, before the picture starts again


@dataclass(frozen=True)
class Layout:
    """Where things are in the picture, in pixels. A tile is the clips of one prompt, side by side under its caption.

    clips: (left, top) of every clip, [prompts][models]. size: (width, height).
    """

    size: tuple[int, int]
    clip: tuple[int, int]
    clips: list[list[tuple[int, int]]]
    tile_width: int

    @classmethod
    def of(cls, prompts: int, models: int, width: int, height: int) -> "Layout":
        """`width` and `height` are those of a clip."""
        tile = models * (width + GUTTER) - GUTTER
        across = min(prompts, max(1, (WIDTH - MARGIN) // (tile + 2 * MARGIN)))
        header, captions = MARGIN + TITLE + LINE, 2 * LINE + LINE + 4
        clips = []
        for number in range(prompts):
            row, column = divmod(number, across)
            left = MARGIN + column * (tile + 2 * MARGIN)
            top = header + row * (captions + height + MARGIN) + captions
            clips.append([(left + model * (width + GUTTER), top) for model in range(models)])
        size = (across * (tile + 2 * MARGIN), clips[-1][0][1] + height + MARGIN)
        return cls(size, (width, height), clips, tile)


def write_comparison_gif(run: RunFiles) -> None:
    """Writes `comparison.gif` to the workdir, unless a prompt with clips of all models to compare is missing.

    The columns of each prompt are the teacher, the same model with rebuilt attention before any training, and the final
    model, all from the same noise. The prompts are chosen by the teacher's clips alone; see `choose_prompts`.
    """
    models, prompts = labels(run), run.prompts
    if run.config is None or len(models) < 2:
        return
    there = [n for n in range(len(prompts)) if all((run.videos / m / f"{n:04d}.mp4").exists() for m in models)]
    chosen = choose_prompts(prompts, there, run.evaluation)
    tiles = [[read_clip(run.videos / name / f"{n:04d}.mp4", HEIGHTS[0]) for name in models] for n in chosen]
    kept = {n: [clip[0] for clip in tile if clip] for n, tile in zip(chosen, tiles, strict=True) if all(tile)}
    if not kept:
        return
    captions, clips, picture = [caption(prompts[n], n) for n in kept], list(kept.values()), b""
    for height in HEIGHTS:
        picture = draw(title(run), captions, list(models.values()), clips, height, run.config.video.fps)
        if len(picture) <= BYTES:
            break
    with replacing(run.workdir / "comparison.gif") as temporary:
        temporary.write_bytes(picture)


def labels(run: RunFiles) -> dict[str, str]:
    """{model: its label} of the models in the picture, from left to right, of those that have clips."""
    control = run.config is not None and run.config.finetune.subject == "teacher"
    texts = {
        "teacher": "teacher",
        "not_distilled": "rebuilt, untrained",
        "finetuned": "teacher, fine-tuned" if control else "after surgery",
    }
    return {name: text for name, text in texts.items() if (run.videos / name).is_dir()}


def title(run: RunFiles) -> str:
    if run.plan is None:
        return "The same prompts and noise before and after the surgery"
    rates, share = run.plan["rates"], run.plan["share_of_teacher"]
    converted = sum(rate != 1 for rate in rates)
    work = f"{abs(1 - share):.0%} {'less' if share <= 1 else 'more'}"
    return f"{converted} of {len(rates)} attention layers rebuilt: {work} attention work"


def choose_prompts(prompts: Sequence[str], there: Sequence[int], evaluation: dict[str, Any] | None) -> list[int]:
    """Numbers of at most `PROMPTS` of the prompts `there`, in order.

    Where clips are scored, as those of sprites are, these are prompts that the teacher does about as well as its best,
    since a clip that the teacher gets wrong tells nothing about the surgery; of those, prompts of other backgrounds,
    colours, shapes and directions. Otherwise they are the first.
    """
    per_clip = (evaluation or {}).get("models", {}).get("teacher", {}).get("per_clip")
    if not per_clip:
        return list(there[:PROMPTS])
    score = {number: float(np.mean([values[number] for values in per_clip.values()])) for number in there}
    facts = {number: facts_of(prompts[number]) for number in there}
    left, chosen, said = sorted(there, key=lambda number: (-score[number], number)), list[int](), Counter(DULL)
    while left and len(chosen) < PROMPTS:
        good = [number for number in left if score[number] >= score[left[0]] - AS_GOOD]
        number = min(good, key=lambda number: (said[facts[number][-1]], sum(said[word] for word in facts[number])))
        left.remove(number)
        chosen.append(number)
        said.update(facts[number])
    return sorted(chosen)


def facts_of(prompt: str) -> tuple[str, ...]:
    """("red", "circle", "left", "grey") of the caption of a scene of sprites; the background is last."""
    try:
        sprites, ground = parse_caption(prompt)
    except InputError:
        return ("",)
    return (*(fact for sprite in sprites for fact in sprite), ground)


def caption(prompt: str, number: int) -> str:
    """The prompt, or its number where the font lacks its letters."""
    try:
        prompt.encode("latin-1")
    except UnicodeEncodeError:
        return f"prompt {number + 1}"
    return prompt


def draw(
    title: str, captions: Sequence[str], labels: Sequence[str], clips: list[list[np.ndarray]], height: int, fps: int
) -> bytes:
    """The picture as GIF, with clips of at most `height` pixels.

    clips: uint8 [prompts][models] of [F, h, w, 3]. fps: their frames per second.
    """
    whole, width = clips[0][0].shape[1:3]
    height = min(height, whole)
    layout = Layout.of(len(clips), len(labels), round(width * height / whole), height)
    page = draw_page(title, captions, labels, layout)
    count = min(len(clip) for tile in clips for clip in tile)
    numbers, frames = range(0, count, -(-count // FRAMES)), []
    for number in numbers:
        frame = page.copy()
        for tile, places in zip(clips, layout.clips, strict=True):
            for clip, place in zip(tile, places, strict=True):
                frame.paste(Image.fromarray(clip[number]).resize(layout.clip), place)
        frames.append(np.asarray(frame))
    return encode(hold_still(frames), round(1000 * numbers.step / fps))


def draw_page(title: str, captions: Sequence[str], labels: Sequence[str], layout: Layout) -> Image.Image:
    """Everything but the clips: title, captions, labels, and a thin frame around the place of each clip."""
    page = Image.new("RGB", layout.size, PAPER)
    pen, (width, height) = ImageDraw.Draw(page), layout.clip
    pen.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(TITLE))
    for text, places in zip(captions, layout.clips, strict=True):
        font, (left, top) = ImageFont.load_default(CAPTION), places[0]
        letters = max(8, int(layout.tile_width / (font.getlength("abcdefghij klm") / 14)))
        lines = textwrap.wrap(text, letters, max_lines=2, placeholder=" …")
        for number, line in enumerate(reversed(lines)):
            pen.text((left, top - 2 * LINE - 6 - number * LINE), line, INK, font)
        for label, (left, top) in zip(labels, places, strict=True):
            pen.text((left, top - LINE - 2), label, GREY, ImageFont.load_default(LABEL))
            pen.rectangle((left - 1, top - 1, left + width, top + height), outline=EDGE)
    return page


def hold_still(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The frames, in which pixels that change by less than `STILL` in every channel keep the value shown before."""
    held = [frames[0]]
    for frame in frames[1:]:
        change = np.abs(frame.astype(np.int16) - held[-1]).max(axis=-1, keepdims=True)
        held.append(np.where(change < STILL, held[-1], frame))
    return held


def encode(frames: Sequence[np.ndarray], duration: int) -> bytes:
    """uint8 frames [h, w, 3], each shown for `duration` milliseconds, as a GIF with one palette and no dithering."""
    sample = np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]])[::2, ::2]
    palette = Image.fromarray(sample).quantize(COLORS, Image.Quantize.MEDIANCUT, kmeans=3)
    first, *others = [Image.fromarray(each).quantize(palette=palette, dither=Image.Dither.NONE) for each in frames]
    result = io.BytesIO()
    durations = [duration] * len(others) + [LAST_FRAME]
    first.save(result, "GIF", save_all=True, append_images=others, duration=durations, loop=0, optimize=False)
    return result.getvalue()
