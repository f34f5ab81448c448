"""`jsurgery encode` on a folder of good and bad files, killed in between; its latents compared with diffusers."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from jsurgery.data.shards import Records, array_text

FRAMES, HEIGHT, WIDTH = 5, 32, 48
SIZES = [(32, 48), (64, 96), (40, 66), (48, 64), (36, 48)]
RATES = [16, 24, 12, 30, 8]
BAD = {
    "cut.mp4": "a file that was not written to its end",
    "text.mp4": "a page instead of a video",
    "empty.mp4": "a file of nothing",
    "frameless.mp4": "a video without frames",
    "silent.mov": "",
}


def write_video(path, fps, height, width, frames, codec="mpeg4"):
    """Textures that change from frame to frame. What a lossy codec makes of them is read back from the file."""
    with av.open(str(path), "w", format=None if path.suffix != ".avi" else "mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = height, width
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        down, across = np.mgrid[:height, :width]
        for t in range(frames):
            pixels = np.stack([down * 5 + 9 * t, across * 4 - 7 * t, (down + across) * 3 + t], -1) % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """25 valid clips, one with the suffix of another format, and the five of BAD."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "valid").mkdir()
    for number, (fps, size) in enumerate((fps, size) for fps in RATES for size in SIZES):
        suffix, codec = (".mov", "png") if size == SIZES[0] else (".avi" if number == 7 else ".mp4", "mpeg4")
        path = folder / "valid" / f"{number:02d}{suffix}"
        write_video(path, fps, *size, 2 * FRAMES * fps // 16 + 2, codec)
        path.with_suffix(".txt").write_text(f"caption {number}")
    whole = (folder / "valid" / "01.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("<html>not found</html>")
    (folder / "empty.mp4").write_bytes(b"")
    with av.open(str(folder / "frameless.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        container.start_encoding()
    write_video(folder / "silent.mov", 16, 32, 48, 9, "png")
    for name, caption in BAD.items():
        (folder / name).with_suffix(".txt").write_text(caption)
    assert len([path for path in folder.rglob("*") if path.suffix in (".mp4", ".mov", ".avi")]) == 30
    return folder


def command(tiny_pipeline, videos, workdir):
    fields = {
        "model.path": tiny_pipeline, "video.frames": FRAMES, "video.height": HEIGHT, "video.width": WIDTH,
        "video.fps": 16, "data.clips_per_shard": 6, "data.batch": 2, "data.workers": 1, "data.max_crop": 0.5,
        "data.max_skipped": 0.7,
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    arguments = ["encode", "--config=tiny", f"--videos={videos}", f"--workdir={workdir}", *overrides]
    return [sys.executable, "-m", "jsurgery", *arguments]


@pytest.fixture(scope="module")
def encoded(tiny_pipeline, videos, tmp_path_factory):
    """(folder, shards that existed when the first run was killed, stderr of the second run, which finished)."""
    workdir = tmp_path_factory.mktemp("run")
    folder = workdir / "encoded"
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    first = subprocess.Popen(
        command(tiny_pipeline, videos, workdir), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not list(folder.glob("reports/*.json")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, "it ended before it was killed"
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.array_record")}
    second = subprocess.run(command(tiny_pipeline, videos, workdir), env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    return folder, shards, second.stderr


def records(folder):
    found = Records(folder / f"{FRAMES}x{HEIGHT}x{WIDTH}")
    return [found[i] for i in range(len(found))]


def test_a_killed_run_resumes_without_losing_or_repeating_clips(encoded):
    folder, shards, stderr = encoded
    assert 0 < len(shards) < 5, "expected some of the five shards"
    assert all(path.stat().st_mtime_ns == time for path, time in shards.items())
    captions = [array_text(record["caption"]) for record in records(folder)]
    assert sorted(captions) == sorted(f"caption {number}" for number in range(25))
    assert "5 of 30 clips skipped" in stderr and not list(folder.rglob("*.tmp"))


def test_every_bad_file_is_listed(encoded, videos):
    skipped = (encoded[0] / "skipped.jsonl").read_text().splitlines()
    assert len(skipped) == len(BAD) and all(any(f"/{name}" in line for line in skipped) for name in BAD)
    assert "no caption" in next(line for line in skipped if "silent.mov" in line)


def test_latents_equal_diffusers(encoded, tiny_pipeline):
    """For the clips that need no crop and no resize, with frames chosen here as the nearest in time."""
    vae = AutoencoderKLWan.from_pretrained(tiny_pipeline / "vae").eval()
    mean, scale = (torch.tensor(vae.config[f"latents_{name}"]).reshape(1, -1, 1, 1, 1) for name in ("mean", "std"))
    compared = 0
    for record in records(encoded[0]):
        assert record["latents"].shape == (2, 4, 6, 4) and record["latents"].dtype == np.float16
        path = pathlib.Path(array_text(record["path"]))
        if path.suffix != ".mov":
            continue
        fps = RATES[int(path.stem) // len(SIZES)]
        with av.open(str(path)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        chosen = [int(np.argmin([abs(j * 16 - i * fps) for j in range(len(frames))])) for i in range(FRAMES)]
        video = torch.from_numpy(frames[chosen]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            expected = (vae.encode(video).latent_dist.mode() - mean) / scale
        expected = expected[0].permute(1, 2, 3, 0).numpy()
        assert np.abs(record["latents"] - expected).max() < 1e-4 + np.abs(expected).max() * 2**-11  # float16
        compared += 1
    assert compared == len(RATES)
