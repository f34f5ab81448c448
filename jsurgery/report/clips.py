"""The clips of a page: mp4 files as data URIs, re-encoded when they are too large for one page; and side by side."""

import base64
import io

import av
import numpy as np
from etils import epath

PAGE_BYTES = 8_000_000  # of all clips together, before base64 adds a third
CLIP_BYTES = 120_000  # a clip is never squeezed below this: later prompts are left out instead
CLIP_HEIGHT = 320  # of a clip that is re-encoded
GRID_HEIGHT = 192  # of a clip in the grid


def embed_rows(folder: epath.Path, names: list[str], count: int) -> list[dict[str, str]]:
    """The clips `folder/NAME/0000.mp4`, ... of `count` prompts as name -> data URI; as many prompts as fit a page."""
    rows = []
    for number in range(count):
        files = {name: folder / name / f"{number:04d}.mp4" for name in names}
        clips = {name: file.read_bytes() for name, file in files.items() if file.exists()}
        if not clips:
            break
        rows.append(clips)
    if sum(len(clip) for clips in rows for clip in clips.values()) > PAGE_BYTES:
        rows = rows[: max(1, PAGE_BYTES // (CLIP_BYTES * len(names)))]
        share = PAGE_BYTES // sum(map(len, rows))
        rows = [{name: shrink(clip, share) for name, clip in clips.items()} for clips in rows]
    return [{name: data_uri(clip) for name, clip in clips.items()} for clips in rows]


def side_by_side(folder: epath.Path, names: list[str], count: int) -> np.ndarray | None:
    """One video of the clips: uint8 [F, rows * h, columns * w, 3], a row for each model and a column for each prompt.

    Only prompts of which every model has a clip; None where there is none.
    """
    columns = []
    for number in range(count):
        files = [folder / name / f"{number:04d}.mp4" for name in names]
        if all(file.exists() for file in files):
            columns.append(np.concatenate([read_frames(file.read_bytes(), GRID_HEIGHT) for file in files], axis=1))
    return np.concatenate(columns, axis=2) if columns else None


def read_frames(clip: bytes, height: int) -> np.ndarray:
    """uint8 [F, h, w, 3], scaled down to at most `height`."""
    with av.open(io.BytesIO(clip)) as source:
        frames = list(source.decode(video=0))  # type: ignore[attr-defined]
    height = min(height, frames[0].height)
    width = round(frames[0].width * height / frames[0].height)
    return np.stack([frame.reformat(width, height, "rgb24").to_ndarray() for frame in frames])


def data_uri(clip: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(clip).decode()


def shrink(clip: bytes, size: int) -> bytes:
    """The clip in about `size` bytes at most; as it is when it is no larger."""
    if len(clip) <= size:
        return clip
    with av.open(io.BytesIO(clip)) as source:
        rate = source.streams.video[0].average_rate
        frames = list(source.decode(video=0))  # type: ignore[attr-defined]
    assert rate  # of every clip that `write_video` wrote
    height = min(CLIP_HEIGHT, frames[0].height)
    width = round(frames[0].width * height / frames[0].height / 2) * 2
    bits_per_second = int(0.85 * 8 * size * float(rate) / len(frames))
    limit = {"maxrate": str(bits_per_second), "bufsize": str(bits_per_second // 2)}
    result = io.BytesIO()
    with av.open(result, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=rate, options=limit)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", bits_per_second
        for number, frame in enumerate(frames):
            smaller = frame.reformat(width, height, "yuv420p")
            smaller.pts, smaller.time_base = number, 1 / rate
            target.mux(stream.encode(smaller))
        target.mux(stream.encode())
    return result.getvalue()
