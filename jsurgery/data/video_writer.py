"""Videos as files: mp4 (H.264), gif, or a png sheet of frames."""

import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.files import replacing_locally, temporary_name

SHEET_FRAMES = 9
LEAST_HUNDREDTHS = 2  # of a second, which a frame of a GIF lasts
BT709, LIMITED = 1, 1  # FFmpeg's numbers of the matrix, the primaries and the curve, and of the range 16 to 235
CRF = "16"  # of x264, for all mp4 files
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
    with replacing_locally(path, temporary_name(path.name, path.suffix)) as temporary:
        if path.suffix == ".mp4":
            _write_mp4(temporary, video_FxHxWx3, fps, comment)
        elif path.suffix == ".gif":
            chosen, durations = gif_frames(len(video_FxHxWx3), fps)
            first, *others = [Image.fromarray(video_FxHxWx3[number]) for number in chosen]
            options = {"append_images": others, "duration": durations, "loop": 0, "comment": comment}
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


def gif_frames(frames: int, fps: float) -> tuple[list[int], list[int]]:
    """(numbers of the frames to show, their durations in ms) in a GIF of `fps` frames a second.

    A GIF counts in hundredths of a second, so that durations differ by one of them and the mean rate is `fps`. Browsers
    show a frame of less than two hundredths for ten: above 50 frames a second some are left out instead.
    """
    ends = [round(100 * number / fps) for number in range(frames + 1)]
    chosen = [0]
    for number in range(1, frames):
        if ends[number] - ends[chosen[-1]] >= LEAST_HUNDREDTHS:
            chosen.append(number)
    starts = [ends[number] for number in chosen] + [max(ends[-1], ends[chosen[-1]] + LEAST_HUNDREDTHS)]
    return chosen, [10 * (after - before) for before, after in itertools.pairwise(starts)]


def encode_frames(
    container: Any, codec: str, video_FxHxWx3: np.ndarray, rate: Fraction, options: dict[str, str]
) -> None:
    """Encodes uint8 frames as yuv420p into a container of PyAV, with the colours of BT.709, and says so in the stream.

    Players guess the matrix of a stream that does not say it, by its height.
    """
    stream = _add_stream(container, codec, video_FxHxWx3.shape[1:3], rate, options)
    for pixels in video_FxHxWx3:
        container.mux(stream.encode(_yuv_frame(pixels)))
    container.mux(stream.encode())


@contextlib.contextmanager
def growing_mp4(
    path: epath.Path, size: tuple[int, int], fps: int, settings: dict[str, Any]
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends uint8 frames [F, H, W, 3] of `size` (H, W) to an mp4, which gets its name at the end.

    Until then it lies beside it as `temporary_name` says, and can be played at any time: every frame is a fragment of
    its own, written as it comes, all but the last one. For a path on an object store it lies on this machine.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_locally(path, temporary_name(path.name, path.suffix)) as temporary:
        options = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
        with temporary.open("wb", buffering=0) as file, av.open(file, "w", format="mp4", options=options) as container:
            container.metadata["comment"] = json.dumps(settings)
            # Without looking ahead, or else the encoder keeps the last two seconds.
            encoding = {"crf": CRF, "tune": "zerolatency"}
            stream = _add_stream(container, "libx264", size, Fraction(fps), encoding)

            def append(video_FxHxWx3: np.ndarray) -> None:
                for pixels in video_FxHxWx3:
                    container.mux(stream.encode(_yuv_frame(pixels)))

            yield append
            container.mux(stream.encode())


def _add_stream(container: Any, codec: str, size: tuple[int, ...], rate: Fraction, options: dict[str, str]) -> Any:
    """A stream for frames of `_yuv_frame`, which says what its colours are."""
    stream = container.add_stream(codec, rate=rate, options=options)
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED
    return stream


def _yuv_frame(pixels_HxWx3: np.ndarray) -> Any:
    """A frame of PyAV as yuv420p, with the colours of BT.709."""
    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HxWx3), format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")


def _write_mp4(path: pathlib.Path, video_FxHxWx3: np.ndarray, fps: int, comment: str) -> None:
    import av

    # A stream, because FFmpeg takes a name with a colon for an address.
    with path.open("wb") as file, av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = comment
        encode_frames(container, "libx264", video_FxHxWx3, Fraction(fps), {"crf": CRF})
