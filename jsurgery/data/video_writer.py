"""Videos as files: mp4 (H.264), gif, or a png sheet of frames."""

import json
import os
import pathlib
from fractions import Fraction
from typing import Any

import numpy as np
from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.files import replacing_locally

SHEET_FRAMES = 9
SUFFIXES = (".mp4", ".gif", ".png")


def check_suffix(path: pathlib.PurePath) -> None:
    if path.suffix not in SUFFIXES:
        raise InputError(f"--output={path}: expected a name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


def write_video(
    path: str | os.PathLike[str], video_FxHxWx3: np.ndarray, fps: int, settings: dict[str, Any] | None = None
) -> None:
    """Writes uint8 frames in the format of the path's suffix; `settings` go into the file's metadata as JSON.

    The file appears under its name once it is complete.
    """
    from PIL import Image, PngImagePlugin

    path = epath.Path(path)
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    comment = json.dumps(settings or {})
    # The writers choose the format by the suffix.
    with replacing_locally(path, f".{path.name}{path.suffix}") as temporary:
        if path.suffix == ".mp4":
            _write_mp4(temporary, video_FxHxWx3, fps, comment)
        elif path.suffix == ".gif":
            first, *others = [Image.fromarray(frame) for frame in video_FxHxWx3]
            options = {"append_images": others, "duration": 1000 // fps, "loop": 0, "comment": comment}
            first.save(temporary, save_all=True, **options)
        else:
            chosen = np.linspace(0, len(video_FxHxWx3) - 1, min(SHEET_FRAMES, len(video_FxHxWx3))).round().astype(int)
            info = PngImagePlugin.PngInfo()
            info.add_text("settings", comment)
            Image.fromarray(np.concatenate(list(video_FxHxWx3[chosen]), axis=1)).save(temporary, pnginfo=info)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that `write_video` stored in a file; empty for any other file."""
    import av
    import av.error
    from PIL import Image

    path = epath.Path(path)
    try:
        if path.suffix == ".mp4":
            with path.open("rb") as stream, av.open(stream) as container:
                comment = container.metadata.get("comment", "")
        else:
            with path.open("rb") as stream, Image.open(stream) as image:
                comment = image.info.get("settings" if path.suffix == ".png" else "comment", "")
        settings = json.loads(comment)
    except (av.error.FFmpegError, OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _write_mp4(path: pathlib.Path, video_FxHxWx3: np.ndarray, fps: int, comment: str) -> None:
    import av

    with av.open(str(path), "w") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "16"})
        stream.height, stream.width = video_FxHxWx3.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in video_FxHxWx3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
