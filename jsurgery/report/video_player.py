"""The clips of a page. All models' clips of a prompt are one video, side by side, so that they stay in step."""

import base64
import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import av.error
import numpy as np
from etils import epath

from jsurgery.data.video_writer import encode_frames

PAGE_BYTES = 8_000_000  # of all videos together, before base64 adds a third
PROMPT_BYTES = 400_000  # share of a prompt's video; prompts are left out before they get less
CLIP_HEIGHT = 320  # pixels, of a clip in the page
BLOCK = 16  # pixels; clips start at multiples of it, so that no block of the codec holds two clips
SPEED = {"b:v": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}  # of VP9, which every browser plays
QUALITIES = (22, 34, 46, 56, 63)  # CRF of VP9: the first is tried first, the next when a video is too large


def embed(folders: dict[str, epath.Path], prompts: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row for each prompt with clips, the files that are missing or broken).

    folders: model -> folder of its clips `0000.mp4` and so on. A row has the prompt and its `number`, `video` (WebM as
    base64), the `width` and `height` of a clip, the `offset` in pixels from one clip to the next, `fps`, `frames`, and
    the `models` from left to right. If the page would grow too large, the last prompts are left out.
    """
    rows, faults = [], []
    for number, prompt in enumerate(prompts):
        clips, missing = {}, []
        for name, folder in folders.items():
            clip = read_clip(folder / f"{number:04d}.mp4", CLIP_HEIGHT)
            if clip is None:
                missing.append(f"{name}/{number:04d}.mp4")
            else:
                clips[name] = clip
        if clips:
            faults += missing
            rows.append({"number": number, "prompt": prompt, **join(clips)})
    if sum(len(row["video"]) for row in rows) > PAGE_BYTES:
        rows = rows[: max(1, PAGE_BYTES // PROMPT_BYTES)]
        share = PAGE_BYTES // len(rows)
        rows = [row | {"video": squeeze(row["video"], share)} for row in rows]
    while len(rows) > 1 and sum(len(row["video"]) for row in rows) > PAGE_BYTES:
        rows.pop()
    return [row | {"video": base64.b64encode(row["video"]).decode()} for row in rows], faults


def join(clips: dict[str, tuple[np.ndarray, Fraction]]) -> dict[str, Any]:
    """Clips as one video, all scaled to the size of the first and cut to the length of the shortest."""
    first, rate = next(iter(clips.values()))
    height, width = first.shape[1:3]
    frames = min(len(clip) for clip, _ in clips.values())
    both = abreast([fit(clip[:frames], height, width) for clip, _ in clips.values()])
    return {
        "video": encode(both, rate),
        "width": width,
        "height": height,
        "offset": both.shape[2] // len(clips),
        "fps": float(rate),
        "frames": frames,
        "models": list(clips),
    }


def abreast(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Videos of one size from left to right, each padded to a multiple of `BLOCK`."""
    height, width = videos[0].shape[1:3]
    margin = ((0, 0), (0, -height % BLOCK), (0, -width % BLOCK), (0, 0))
    return np.concatenate([np.pad(video, margin, mode="edge") for video in videos], axis=2)


def encode(video_FxHxWx3: np.ndarray, rate: Fraction, quality: int = QUALITIES[0]) -> bytes:
    """The uint8 video as WebM (VP9) of constant quality; `rate` in frames per second."""
    result = io.BytesIO()
    with av.open(result, "w", format="webm") as target:
        encode_frames(target, "libvpx-vp9", video_FxHxWx3, rate, SPEED | {"crf": str(quality)})
    return result.getvalue()


def squeeze(video: bytes, size: int) -> bytes:
    """The video in at most `size` bytes, or at the worst quality if that is not enough."""
    frames, rate = decode(video)
    for quality in QUALITIES[1:]:
        if len(video) <= size:
            break
        video = encode(frames, rate, quality)
    return video


def read_clip(file: epath.Path, height: int) -> tuple[np.ndarray, Fraction] | None:
    """`decode` of a file; None if it is missing or broken."""
    try:
        return decode(file.read_bytes(), height)
    except (av.error.FFmpegError, OSError, IndexError, ValueError):
        return None


def decode(clip: bytes, height: int | None = None) -> tuple[np.ndarray, Fraction]:
    """(uint8 [F, h, w, 3], frames per second) of a video file, scaled down to at most `height` pixels."""
    with av.open(io.BytesIO(clip)) as source:
        rate = source.streams.video[0].average_rate or Fraction(16)
        frames = list(source.decode(video=0))  # type: ignore[attr-defined]
    height = min(height or frames[0].height, frames[0].height)
    width = round(frames[0].width * height / frames[0].height)
    return np.stack([frame.reformat(width, height, "rgb24").to_ndarray() for frame in frames]), rate


def fit(video_FxHxWx3: np.ndarray, height: int, width: int) -> np.ndarray:
    if video_FxHxWx3.shape[1:3] == (height, width):
        return video_FxHxWx3
    frames = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in video_FxHxWx3)
    return np.stack([frame.reformat(width, height, "rgb24").to_ndarray() for frame in frames])
