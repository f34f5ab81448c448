"""Reading of clips that PyAV writes here losslessly, compared with NumPy on the written frames."""

import csv
import json
import pathlib
import struct
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jsurgery.data.clip_index import find_clips
from jsurgery.data.prompts import read_prompts
from jsurgery.data.video_reader import (
    Bucket,
    Clip,
    ClipLimits,
    Skipped,
    buckets_of,
    crop_box,
    decode_in_processes,
    fit,
    nearest_frames,
    read_clip,
)
from jsurgery.errors import InputError

TICKS = 600  # per second


def write_mov(path, frames, times, pixel_aspect=None):
    """Writes PNG in QuickTime, which keeps pixels and timestamps (in ticks) exactly."""
    with av.open(str(path), "w", format="mov") as container:
        stream = container.add_stream("png", rate=TICKS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        stream.codec_context.time_base = Fraction(1, TICKS)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for pixels, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = int(time), Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def noise(frames, height, width):
    """Low contrast, so that resizing never clips: with clipping, the order of the axes would matter."""
    return np.random.default_rng(0).integers(96, 160, (frames, height, width, 3), dtype=np.uint8)


def nearest(times, fps, count):
    """Indices into `times` (ticks), the earlier of two equally near times."""
    return [int(np.argmin([abs(fps * time - TICKS * i) for time in times])) for i in range(count)]


def resized(frame, box, height, width):
    """Separable cubic convolution (a = -1/2), whose kernel is widened for downscaling."""

    def weights(pixels, start, stop, new_pixels):
        scale = (stop - start) / new_pixels
        centres = start + (np.arange(new_pixels) + 0.5) * scale
        x = np.abs(np.arange(pixels) + 0.5 - centres[:, None]) / max(scale, 1)
        w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        return w / w.sum(1, keepdims=True)

    left, top, right, bottom = box
    across = weights(frame.shape[1], left, right, width)
    down = weights(frame.shape[0], top, bottom, height)
    return np.einsum("ow,ph,hwc->poc", across, down, frame.astype(float))


def read(path, frames=5, height=32, width=48, fps=16, max_crop=0.5, max_upscale=1.5, several=False):
    class Video:
        pass

    Video.frames, Video.height, Video.width = frames, height, width
    return read_clip(Clip(str(path), "a caption"), ClipLimits(buckets_of(Video, several), fps, max_crop, max_upscale))


def skip_reason(path, **limits):
    with pytest.raises(Skipped) as raised:
        read(path, **limits)
    return str(raised.value)


@pytest.mark.parametrize("seed", range(20))
def test_nearest_frames_equal_a_search_of_all_frames(seed):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.integers(1, 90, 30)) * 5
    times -= times[0]
    fps = int(rng.integers(1, 31))
    timed = [(Fraction(int(time), TICKS), i) for i, time in enumerate(times)]
    end = Fraction(int(3 * times[-1] - times[-2]), 2 * TICKS)  # half a frame after the last one
    expected = nearest(times, fps, int(end * fps) + 1)
    assert list(nearest_frames(timed, fps, 10_000)) == expected
    assert list(nearest_frames(iter(timed), fps, 7)) == expected[:7]


def test_nearest_frames_of_no_frame_and_of_one():
    assert list(nearest_frames([], 16, 5)) == []
    assert list(nearest_frames([(Fraction(0), "only")], 16, 5)) == ["only"]


@pytest.mark.parametrize(
    ("height", "width", "to_height", "to_width", "aspect"),
    [(33, 51, 16, 32, 1), (61, 47, 32, 48, 1), (21, 29, 32, 48, 1), (40, 40, 32, 48, 2), (101, 33, 16, 16, 0.5)],
)
def test_crop_and_resize_equal_numpy(height, width, to_height, to_width, aspect):
    frame = noise(1, height, width)[0]
    left, top, right, bottom = box = crop_box(height, width, to_height, to_width, aspect)
    assert left >= 0 and top >= 0 and right <= width and bottom <= height
    assert np.isclose((right - left) * aspect / (bottom - top), to_width / to_height)
    assert np.isclose(right - left, width) or np.isclose(bottom - top, height)
    assert abs(left + right - width) < 2 and abs(top + bottom - height) < 2
    found = fit(frame, to_height, to_width, aspect)
    assert found.shape == (to_height, to_width, 3) and found.dtype == np.uint8
    assert np.abs(found - resized(frame, box, to_height, to_width)).max() < 2


@pytest.mark.parametrize("step", [25, 24, 75, 37.5, 20])  # ticks: 24, 25, 8, 16 and 30 frames a second
def test_other_frame_rates_and_sizes_are_resampled(tmp_path, step):
    frames, times = noise(9, 35, 57), [round(step * i) for i in range(9)]
    write_mov(tmp_path / "clip.mov", frames, times)
    chosen = frames[nearest(times, 16, 5)]
    expected = np.stack([resized(frame, crop_box(35, 57, 32, 48), 32, 48) for frame in chosen])
    assert np.abs(read(tmp_path / "clip.mov") - expected).max() < 2


def test_a_varying_frame_rate_is_resampled(tmp_path):
    frames, times = noise(9, 32, 53), [0, 30, 40, 90, 100, 130, 131, 210, 240]
    write_mov(tmp_path / "clip.mov", frames, times)
    chosen = nearest(times, 16, 5)
    assert chosen == [0, 2, 3, 4, 6]
    assert np.array_equal(read(tmp_path / "clip.mov"), frames[chosen][:, :, 2:50])


def test_a_clip_begins_with_its_first_frame_at_any_timestamp(tmp_path):
    frames = noise(5, 32, 48)
    write_mov(tmp_path / "clip.mov", frames, [300 + 38 * i for i in range(5)])
    assert np.array_equal(read(tmp_path / "clip.mov"), frames)


def test_the_rotation_of_the_container_is_applied(tmp_path):
    """The matrix that an upright telephone writes: x' = -y, y' = x, a quarter turn clockwise."""
    frames = noise(5, 48, 32)
    write_mov(tmp_path / "clip.mov", frames, range(0, 190, 38))
    content = bytearray((tmp_path / "clip.mov").read_bytes())
    matrix = content.index(b"tkhd") + 44
    assert struct.unpack(">9i", content[matrix : matrix + 36])[:2] == (1 << 16, 0)
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    (tmp_path / "clip.mov").write_bytes(content)
    found = read(tmp_path / "clip.mov")
    expected = np.zeros((5, 32, 48, 3), np.uint8)
    for y in range(48):
        expected[:, :, 47 - y] = frames[:, y]
    assert np.array_equal(found, expected)


def test_non_square_pixels_are_made_square(tmp_path):
    frames = noise(5, 32, 24)
    write_mov(tmp_path / "clip.mov", frames, range(0, 190, 38), pixel_aspect=Fraction(2))
    expected = np.stack([resized(frame, (0, 0, 24, 32), 32, 48) for frame in frames])
    assert np.abs(read(tmp_path / "clip.mov") - expected).max() < 2


def test_clips_beyond_the_limits_are_skipped(tmp_path):
    write_mov(tmp_path / "upright.mov", noise(5, 96, 32), range(0, 190, 38))
    reason = skip_reason(tmp_path / "upright.mov")
    assert "78% of each frame" in reason and "32x96" in reason
    assert read(tmp_path / "upright.mov", max_crop=0.8).shape == (5, 32, 48, 3)
    write_mov(tmp_path / "small.mov", noise(5, 16, 24), range(0, 190, 38))
    assert skip_reason(tmp_path / "small.mov") == "24x16: too small for 48x32"
    assert read(tmp_path / "small.mov", max_upscale=2.0).shape == (5, 32, 48, 3)
    assert skip_reason(tmp_path / "upright.mov", frames=9, max_crop=0.8) == "5 frames at 16 a second, expected 9"


def test_the_bucket_fits_the_length_and_shape_of_the_clip(tmp_path):
    class Video:
        frames, height, width = 17, 32, 48

    sizes = [(32, 48), (48, 32), (32, 32)]
    assert set(buckets_of(Video, True)) == {Bucket(f, h, w) for f in (17, 9, 5) for h, w in sizes}
    assert buckets_of(Video, False) == [Bucket(17, 32, 48)]
    for number, (count, height, width, bucket) in enumerate(
        [(17, 64, 40, (17, 48, 32)), (16, 41, 43, (9, 32, 32)), (8, 35, 51, (5, 32, 48))]
    ):
        path = tmp_path / f"{number}.mov"
        write_mov(path, noise(count, height, width), [round(37.5 * i) for i in range(count)])
        assert read(path, frames=17, several=True).shape == (*bucket, 3)
    assert "expected 5" in skip_reason(write_short(tmp_path), frames=17, several=True)


def write_short(folder):
    write_mov(folder / "short.mov", noise(4, 32, 48), range(0, 150, 38))
    return folder / "short.mov"


def write_audio(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_files_without_readable_video_are_skipped(tmp_path):
    write_mov(tmp_path / "valid.mov", noise(9, 32, 48), range(0, 342, 38))
    content = (tmp_path / "valid.mov").read_bytes()
    (tmp_path / "head.mov").write_bytes(content[: len(content) // 2])  # without the index, which is at the end
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_audio(tmp_path / "audio.mp4")
    assert skip_reason(tmp_path / "audio.mp4") == "no video stream"
    assert "No such file" in skip_reason(tmp_path / "missing.mp4")
    assert "directory" in skip_reason(tmp_path)
    for name in ("head.mov", "text.mp4", "empty.mp4"):
        assert "Invalid" in skip_reason(tmp_path / name)
    assert read(tmp_path / "valid.mov").shape == (5, 32, 48, 3)


def test_a_truncated_file_gives_its_whole_frames(tmp_path):
    with av.open(str(tmp_path / "whole.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "bgr0"
        for pixels in noise(9, 32, 48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) * 6 // 10])
    assert np.array_equal(read(tmp_path / "whole.mkv"), noise(9, 32, 48)[:5])
    assert np.array_equal(read(tmp_path / "cut.mkv"), noise(9, 32, 48)[:5])  # it still has five whole frames
    assert skip_reason(tmp_path / "cut.mkv", frames=9)


def test_a_playlist_named_mp4_opens_no_other_file(tmp_path):
    write_mov(tmp_path / "clip.mov", noise(5, 32, 48), range(0, 190, 38))
    playlist = tmp_path / "list.mp4"
    playlist.write_text("ffconcat version 1.0\nfile clip.mov\n")
    with av.open(str(playlist)) as container:  # FFmpeg alone follows the playlist
        assert len(list(container.decode(video=0))) == 5
    assert skip_reason(playlist)


def rows(*captions):
    return [{"path": f"{number}.mp4", "cap": caption} for number, caption in enumerate(captions)]


def test_captions_of_a_folder_are_text_files_beside_the_videos(tmp_path):
    (tmp_path / "deeper").mkdir()
    for name in ("b.mp4", "a.MKV", "deeper/c.mov", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text("\ufeffa red circle\n")
    (tmp_path / "a.txt").write_text(" \n")
    found = find_clips(str(tmp_path))
    assert [(clip.path.removeprefix(f"{tmp_path}/"), clip.caption) for clip in found] == [
        ("a.MKV", ""),
        ("b.mp4", "a red circle"),
        ("deeper/c.mov", ""),
    ]
    assert [clip.problem for clip in found] == ["no caption", "", "no caption"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_format_of_an_index_is_read(tmp_path, suffix):
    captions = ['a "red", round\u2028circle', "", "née Ünal"]
    index = tmp_path / f"clips.{suffix}"
    if suffix == "jsonl":
        index.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows(*captions)) + "\n")
    elif suffix == "json":
        index.write_text(json.dumps(rows(*captions)))
    elif suffix == "csv":
        with index.open("w", newline="") as file:
            writer = csv.DictWriter(file, ("path", "cap"))
            writer.writeheader()
            writer.writerows(rows(*captions))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(*captions)), index)
    found = find_clips(str(index))
    assert [clip.caption for clip in found] == captions
    assert [clip.problem for clip in found] == ["", "no caption", ""]
    assert found[2].path == str(tmp_path / "2.mp4")
    assert find_clips(str(index), "/elsewhere")[0].path == "/elsewhere/0.mp4"


def test_parquet_without_pyarrow_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "clips.parquet").touch()
    with pytest.raises(InputError, match="needs pyarrow"):
        find_clips(str(tmp_path / "clips.parquet"))


def test_captions_under_other_names_and_in_lists_are_read(tmp_path):
    index = tmp_path / "clips.jsonl"
    given = [{"cap": ["first", "second"]}, {"caption": "other"}, {"text": "third"}, {"cap": []}, {"cap": 3}, {}]
    index.write_text("".join(json.dumps({"path": "clip.mp4"} | row) + "\n" for row in given))
    assert [clip.caption for clip in find_clips(str(index))] == ["first", "other", "third", "", "", ""]


def test_paths_outside_the_folder_are_problems(tmp_path):
    index = tmp_path / "in" / "clips.jsonl"
    index.parent.mkdir()
    inside = ["a.mp4", "./b/../a.mp4", str(tmp_path / "in" / "a.mp4")]
    outside = ["../a.mp4", "b/../../a.mp4", "/etc/passwd", str(tmp_path / "inner.mp4")]
    index.write_text("".join(json.dumps({"path": path, "cap": "x"}) + "\n" for path in inside + outside))
    found = find_clips(str(index))
    assert [bool(clip.problem) for clip in found] == [False] * 3 + [True] * 4
    assert found[3].problem == f"outside of {tmp_path / 'in'}"
    with pytest.raises(Skipped, match="outside"):
        read_clip(found[3], ClipLimits([], 16, 0, 0))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("clips.jsonl", '{"path"\n{', ["row 1", "JSON", "file_name"]),
        ("clips.jsonl", '{"cap": "b"}', ["a column with a path", "video", "found cap"]),
        ("clips.jsonl", '{"video": "b"}', ["a column with a caption", "prompt", "found video"]),
        ("clips.jsonl", "[1]", ["row 1", "an object"]),
        ("clips.jsonl", "", ["found none"]),
        ("clips.json", "{}", ["JSON list"]),
        ("clips.csv", 'path,cap\n"a,b', ["CSV", "row 1"]),
        ("clips.csv", "a,b", ["found none"]),
        ("clips.csv", "id,cap\na,b", ["a column with a path", "found id, cap"]),
        ("clips.jsonl", b"\xff\xfe", ["found none"]),
        ("clips.xml", "", [".jsonl"]),
    ],
)
def test_a_bad_index_is_refused(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as raised:
        find_clips(str(tmp_path / name))
    assert name in str(raised.value) and all(part in str(raised.value) for part in parts), raised.value


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("clips.csv", b"video,prompt\n0.mp4,a cat\n1.mp4,a dog\n"),
        ("clips.csv", b"file_name;text\r\n0.mp4;a cat\r\n1.mp4;a dog\r\n"),
        ("clips.tsv", b"id\tVideo_Path\tCaption\n9\t0.mp4\ta cat\n8\t1.mp4\ta dog\n"),
        ("clips.csv", "path,cap\n0.mp4,a cat\n1.mp4,a dog\n".encode("utf-16")),
        ("clips.jsonl", b'\xef\xbb\xbf{"file": "0.mp4", "description": "a cat"}\n{"file": "1.mp4", "text": "a dog"}'),
        ("CLIPS.JSON", b'[{"filepath": "0.mp4", "prompt": ["a cat"]}, {"filepath": "1.mp4", "prompt": "a dog"}]'),
    ],
)
def test_an_index_as_people_write_it_is_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    found = find_clips(str(tmp_path / name))
    assert found == [(f"{tmp_path}/0.mp4", "a cat", ""), (f"{tmp_path}/1.mp4", "a dog", "")]


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("clips.jsonl", b'{"path": "1.mp4", "cap', "expected JSON"),
        ("clips.jsonl", b'{"cap": "no path"}', "expected a path"),
        ("clips.jsonl", b'{"path": "https://a/1.mp4", "cap": "x"}', "an address, not a file"),
        ("clips.jsonl", b'{"path": "gs://b/1.mp4", "cap": "x"}', "outside of"),
        ("clips.jsonl", b'{"path": "1.mp4", "cap": "caf\xe9"}', "caption is not UTF-8"),
        ("clips.csv", b'"1.mp4,never closed', "expected CSV"),
        ("clips.csv", b"1.mp4,a cat, and a dog", "more values than columns"),
        ("clips.csv", b"1.mp4", "no caption"),
    ],
)
def test_a_bad_row_is_named_and_others_go_on(tmp_path, name, row, problem):
    good = [f'{{"path": "{i}.mp4", "cap": "x"}}' if name.endswith("jsonl") else f"{i}.mp4,x" for i in (0, 2)]
    head = [] if name.endswith("jsonl") else [b"path,cap"]
    (tmp_path / name).write_bytes(b"\n".join([*head, good[0].encode(), row, good[1].encode()]))
    found = find_clips(str(tmp_path / name))
    assert [clip.problem for clip in (found[0], found[2])] == ["", ""] and found[2].path == f"{tmp_path}/2.mp4"
    assert problem in found[1].problem, found[1]


def test_hidden_files_and_other_containers_are_counted(tmp_path, capsys):
    for name in ("a.mp4", "._a.mp4", ".ipynb_checkpoints/a.mp4", "__MACOSX/a.mp4", "b.ts", "c.gif", "d.ts", "e.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "circle").symlink_to(tmp_path)
    assert [clip.path for clip in find_clips(str(tmp_path))] == [f"{tmp_path}/a.mp4"]
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: 1 .gif, 2 .ts, 3 hidden left out" in line


@pytest.mark.parametrize(("curve", "problem"), [(16, "HDR"), (18, "HDR"), (1, None)])
def test_an_hdr_clip_is_skipped_with_the_reason(tmp_path, curve, problem):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.color_trc = curve
        for pixels in noise(5, 32, 48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    read = lambda: read_clip(Clip(str(path), "x"), ClipLimits([Bucket(5, 32, 48)], 16, 0.4, 1.5))
    if problem is None:
        assert read().shape == (5, 32, 48, 3)
        return
    with pytest.raises(Skipped, match=problem):
        read()


def test_the_picture_of_a_cover_is_not_the_video(tmp_path):
    """It may be the first stream of a file."""
    frames = np.repeat(noise(1, 32, 48), 5, 0)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        cover, video = container.add_stream("mjpeg", rate=1), container.add_stream("ffv1", rate=8)
        for stream, pixel_format in ((cover, "yuvj420p"), (video, "bgr0")):
            stream.height, stream.width, stream.pix_fmt = 32, 48, pixel_format
        cover.disposition = av.stream.Disposition.attached_pic
        for stream, pictures in ((cover, [np.full((32, 48, 3), 255, np.uint8)]), (video, frames)):
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    limits = ClipLimits([Bucket(5, 32, 48)], 8, 0.4, 1.5)
    np.testing.assert_array_equal(read_clip(Clip(str(tmp_path / "a.mkv"), "x"), limits), frames)


@pytest.mark.parametrize(("alpha", "problem"), [(255, None), (0, "transparent")])
def test_a_transparent_clip_is_skipped(tmp_path, alpha, problem):
    frames = noise(5, 32, 48)
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "rgba"
        for pixels in frames:
            with_alpha = np.dstack([pixels, np.full((32, 48), 255, np.uint8)])
            with_alpha[:16, :, 3] = alpha
            container.mux(stream.encode(av.VideoFrame.from_ndarray(with_alpha, format="rgba")))
        container.mux(stream.encode())
    limits, clip = ClipLimits([Bucket(5, 32, 48)], 8, 0.4, 1.5), Clip(str(tmp_path / "a.mov"), "x")
    if problem is None:
        np.testing.assert_array_equal(read_clip(clip, limits), frames)
    else:
        with pytest.raises(Skipped, match=problem):
            read_clip(clip, limits)


@pytest.mark.parametrize(
    ("listed", "content"),
    [
        ("metadata.csv", "file_name,text\na.mp4,one\nb.mp4,two\n"),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "one"}\n{"file_name": "b.mp4", "text": "two"}\n'),
        ("prompt.txt", "one\ntwo\n"),
    ],
)
def test_captions_of_a_folder_in_a_list_of_their_own(tmp_path, listed, content):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / listed).write_text(content)
    if listed == "prompt.txt":
        (tmp_path / "videos.txt").write_text("a.mp4\nb.mp4\n")
    expected = [Clip(str(tmp_path / f"{name}.mp4"), caption) for name, caption in (("a", "one"), ("b", "two"))]
    assert find_clips(str(tmp_path)) == expected
    (tmp_path / "a.txt").write_text("its own")  # captions beside the videos are those that count
    assert [clip.caption for clip in find_clips(str(tmp_path))] == ["its own", ""]
    if listed == "prompt.txt":
        (tmp_path / "a.txt").unlink()
        (tmp_path / listed).write_text("one\n")
        with pytest.raises(InputError, match="videos.txt: 2 lines, but prompt.txt has 1"):
            find_clips(str(tmp_path))


def test_a_json_index_may_be_one_list_in_an_object(tmp_path):
    rows = [{"video_path": "a.mp4", "caption": "one", "height": 480}]
    (tmp_path / "i.json").write_text(json.dumps({"data": rows}))
    assert find_clips(str(tmp_path / "i.json")) == [Clip(str(tmp_path / "a.mp4"), "one")]


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_as_editors_of_windows_write_them(tmp_path, code):
    (tmp_path / "p.txt").write_bytes("a red circle\r\n\r\né漢\r\n".encode(code))
    assert read_prompts(str(tmp_path / "p.txt")) == ["a red circle", "é漢"]


def test_an_empty_folder_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="found none"):
        find_clips(str(tmp_path))
    with pytest.raises(InputError, match="no such file"):
        find_clips(str(tmp_path / "clips.jsonl"))


def test_decoding_processes_keep_the_order_and_survive_a_crash():
    slow = "__import__('time').sleep(0.3) or 0"
    skip = "(_ for _ in ()).throw(__import__('jsurgery.data.video_reader', fromlist=['Skipped']).Skipped('no'))"
    crash = "__import__('os')._exit(1)"
    found = list(decode_in_processes(eval, [slow, "1", skip, "3", crash, "5", "6"], workers=2))
    assert [str(result) for result in found] == ["0", "1", "no", "3", "the decoder crashed", "5", "6"]
    assert isinstance(found[2], Skipped) and isinstance(found[4], Skipped)


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="needs /proc")
def test_decoding_processes_end_when_their_parent_is_killed():
    code = """if True:
        from jsurgery.data.video_reader import decode_in_processes
        for pid in decode_in_processes(eval, ["__import__('os').getpid()", "__import__('time').sleep(60)"], 1):
            print(pid, flush=True)
    """
    root = str(pathlib.Path(__file__).parents[2])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, **pipes) as parent:
        assert parent.stdout is not None
        worker = pathlib.Path("/proc") / parent.stdout.readline().strip()
        assert worker.name.isdecimal() and alive(worker)
        parent.kill()
    deadline = time.monotonic() + 30
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(worker)


def alive(process):
    try:
        return bool((process / "cmdline").read_bytes())  # empty for a zombie
    except OSError:
        return False
