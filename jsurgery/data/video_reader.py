"""Decodes clips to a size, a length and a frame rate.

Imports no JAX: the worker processes that decode load this file.
"""

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import av
import av.error
import numpy as np
from etils import epath
from PIL import Image

HDR_CURVES = (16, 18)  # FFmpeg's numbers of PQ (SMPTE 2084) and HLG, whose values are not those of BT.709
Item = TypeVar("Item")


class Clip(NamedTuple):
    path: str
    caption: str
    problem: str = ""  # why the clip cannot be used, if that is known before decoding


class Bucket(NamedTuple):
    """A size and length that clips are brought to."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class ClipLimits(NamedTuple):
    """The buckets and frame rate that clips are converted to, and how far the conversion may change their frames."""

    buckets: Sequence[Bucket]
    fps: int
    max_crop: float  # fraction of a frame that may be cut off
    max_upscale: float  # factor by which a frame's sides may be enlarged


class Skipped(Exception):
    """A clip that is left out. The message is the reason."""


def buckets_of(video: Any, several: bool) -> list[Bucket]:
    """The bucket of `video` (frames, height, width). With `several`, also half and a quarter of its length, and every
    length also with height and width exchanged and as a square of about the same area."""
    target = Bucket(video.frames, video.height, video.width)
    if not several:
        return [target]
    side = max(16, 16 * round((target.height * target.width) ** 0.5 / 16))
    sizes = [(target.height, target.width), (target.width, target.height), (side, side)]
    groups = (target.frames - 1) // 4
    lengths = [target.frames, *(4 * (groups >> halvings) + 1 for halvings in (1, 2) if groups >> halvings)]
    return list(dict.fromkeys(Bucket(frames, *size) for frames in lengths for size in sizes))


def read_clip(clip: Clip, limits: ClipLimits) -> np.ndarray:
    """Decodes a clip from its start: uint8 [F, H, W, 3], in the size of the bucket that keeps most of a frame.

    Of that size's buckets it takes the longest that the clip fills. Frames are turned upright, scaled to cover the
    bucket and cropped at the centre. Raises Skipped if the clip fits no bucket within the limits, or if the file is not
    an intact video.
    """
    if clip.problem:
        raise Skipped(clip.problem)
    try:
        # No protocol is allowed: a file with a video's name may be a playlist that opens other files.
        with (
            epath.Path(clip.path).open("rb") as file,
            av.open(file, options={"protocol_whitelist": "none"}) as container,
        ):
            stream: Any = container.streams.best("video")  # not simply the first, which may be the picture of a cover
            if stream is None:
                raise Skipped("no video stream")
            if stream.codec_context.color_trc in HDR_CURVES:
                raise Skipped("HDR (PQ or HLG); convert it to BT.709 first")
            return _to_bucket(container, stream, limits)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Skipped(" ".join(f"{type(error).__name__}: {reason}".split())) from None


def _to_bucket(container: Any, stream: Any, limits: ClipLimits) -> np.ndarray:
    stored_aspect = float(stream.sample_aspect_ratio or 1)
    longest = max(bucket.frames for bucket in limits.buckets)
    size, frames, shown, fitted = None, [], None, None
    for frame in nearest_frames(timed_frames(container, stream), limits.fps, longest):
        if frame is not shown:  # in a slow video a frame is repeated: convert it once
            shown, turns = frame, round(frame.rotation / 90) % 4
            pixels = np.rot90(_opaque(frame), turns)
            pixel_aspect = 1 / stored_aspect if turns % 2 else stored_aspect
            size = size or choose_size(pixels.shape[0], pixels.shape[1], limits, pixel_aspect)
            fitted = fit(pixels, *size, pixel_aspect)
        frames.append(fitted)
    if size is None:
        raise Skipped("no frames")
    lengths = [bucket.frames for bucket in limits.buckets if bucket[1:] == size]
    if len(frames) < min(lengths):
        raise Skipped(f"{len(frames)} frames at {limits.fps} a second, expected {min(lengths)}")
    return np.stack(frames[: max(length for length in lengths if length <= len(frames))])


def _opaque(frame: av.VideoFrame) -> np.ndarray:
    """A frame as uint8 [H, W, 3]. Raises Skipped for one that is transparent, whose colours are anything there."""
    if not any(component.is_alpha for component in frame.format.components):
        return frame.to_ndarray(format="rgb24")
    pixels = frame.to_ndarray(format="rgba")
    if pixels[..., 3].min() < 255:
        raise Skipped(f"transparent ({frame.format.name}); lay it over a background first")
    return pixels[..., :3]


def choose_size(height: int, width: int, limits: ClipLimits, pixel_aspect: float = 1.0) -> tuple[int, int]:
    """(height, width) of the bucket that keeps most of a frame. Raises Skipped beyond the limits."""

    def kept_fraction(size: tuple[int, int]) -> float:
        left, top, right, bottom = crop_box(height, width, *size, pixel_aspect)
        return (right - left) * (bottom - top) / (height * width)

    size = max(((bucket.height, bucket.width) for bucket in limits.buckets), key=kept_fraction)
    if 1 - kept_fraction(size) > limits.max_crop:
        raise Skipped(f"{width}x{height}: {1 - kept_fraction(size):.0%} of each frame would be cut off")
    _, top, _, bottom = crop_box(height, width, *size, pixel_aspect)
    if size[0] > (bottom - top) * limits.max_upscale * (1 + 1e-9):
        raise Skipped(f"{width}x{height}: too small for {size[1]}x{size[0]}")
    return size


def timed_frames(container: Any, stream: Any) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Yields (seconds since the first frame, frame) of a stream.

    A frame that is not later than the frame before it is dropped.
    """
    first = last = None
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise Skipped("damaged frames")
        if frame.pts is None:
            raise Skipped("frames without timestamps")
        time = frame.pts * frame.time_base
        first = time if first is None else first
        if last is None or time > last:
            yield time - first, frame
            last = time


def nearest_frames(timed: Iterable[tuple[Fraction, Item]], fps: int, count: int) -> Iterator[Item]:
    """Yields at most `count` frames: number i is the nearest to second i / fps, and of two the earlier.

    Stops where the video ends; its last frame is assumed to last as long as the frame before it.
    """
    number, before, gap = 0, None, Fraction(0)
    for time, frame in timed:
        if before is not None:
            gap = time - before[0]
            while number < count and Fraction(number, fps) <= before[0] + gap / 2:
                yield before[1]
                number += 1
        if number == count:
            return
        before = time, frame
    while before is not None and number < count and Fraction(number, fps) <= before[0] + gap / 2:
        yield before[1]
        number += 1


def crop_box(
    height: int, width: int, to_height: int, to_width: int, pixel_aspect: float = 1.0
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred part of a frame that has the aspect of the target.

    It begins at a whole pixel, so that a frame that is cropped but not scaled is not blurred.
    """
    scale = max(to_height / height, to_width / (width * pixel_aspect))
    box_height, box_width = to_height / scale, to_width / (scale * pixel_aspect)
    left, top = max(0.0, (width - box_width) // 2), max(0.0, (height - box_height) // 2)
    return left, top, min(float(width), left + box_width), min(float(height), top + box_height)


def fit(frame_HxWx3: np.ndarray, height: int, width: int, pixel_aspect: float = 1.0) -> np.ndarray:
    """Crops a frame at the centre to the target's aspect and resizes it: bicubic, antialiased where it shrinks."""
    box = crop_box(frame_HxWx3.shape[0], frame_HxWx3.shape[1], height, width, pixel_aspect)
    image = Image.fromarray(np.ascontiguousarray(frame_HxWx3))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def decode_in_processes(
    work: Callable[[Item], np.ndarray], items: Iterable[Item], workers: int
) -> Generator[np.ndarray | Skipped, None, None]:
    """Yields `work(item)` of every item, in order, or the reason why the item was skipped.

    The `workers` processes run ahead of the consumer by at most two items each. When a process dies, its item is tried
    again in a process of its own, and skipped if that dies too; the other items continue in new processes.
    """
    remaining, alone = collections.deque(items), False
    context = multiprocessing.get_context("spawn")  # a forked JAX may hang
    while remaining:
        ahead = 1 if alone else 2 * workers
        pool = ProcessPoolExecutor(1 if alone else workers, mp_context=context, initializer=_end_with_parent)
        try:
            results = collections.deque(pool.submit(work, item) for item in itertools.islice(remaining, ahead))
            while results:
                try:
                    result = results.popleft().result()
                except Skipped as reason:
                    result = reason
                except BrokenProcessPool:
                    if not alone:
                        raise
                    result = Skipped("the decoder crashed")
                remaining.popleft()
                yield result
                if not alone and len(remaining) >= ahead:
                    results.append(pool.submit(work, remaining[ahead - 1]))
            alone = False
        except BrokenProcessPool:
            alone = True
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Makes a pool process end with its parent, also when the parent is killed. Ctrl-C is left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
