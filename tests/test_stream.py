"""`jsurgery sample --stream`: its frames, its file while it grows and after a kill, and what it refuses."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from flax import nnx

from jsurgery import stream
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.cli import main
from jsurgery.data.video_writer import growing_mp4, read_settings
from jsurgery.sample import VideoRequest, sampling_config
from jsurgery.stream import stream_frames
from jsurgery.wan.checkpoint import save_transformer
from jsurgery.wan.pipeline import load_pipeline
from jsurgery.wan.transformer import WanTransformer
from tests.conftest import TINY_TRANSFORMER, random_module

SIZE = ["--height=32", "--width=48", "--steps=2"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tiny_pipeline):
    """`tiny_pipeline` with two causal chunked blocks, of one latent frame a chunk."""
    folder = tmp_path_factory.mktemp("stream") / "converted"
    shutil.copytree(tiny_pipeline, folder)
    shutil.rmtree(folder / "transformer")
    config = dataclasses.replace(TINY_TRANSFORMER, hybrid=HybridConfig(("C1O1", "C1O0")))
    model = random_module(lambda: WanTransformer(config, rngs=nnx.Rngs(0)), np.random.default_rng(0))
    save_transformer(model, folder / "transformer")
    return folder


def frames_in(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_frames_are_those_of_the_whole_video(converted):
    fields = {"video.frames": "29", "video.height": "32", "video.width": "48", "sampler.steps": "2"}
    config = sampling_config(None, {"model.path": str(converted), "sampler.noise": "frame"} | fields)
    pipeline = load_pipeline(str(converted))
    latents, _ = pipeline.sample(["a red circle"], config, sources=[(5, 2)])
    expected = pipeline.decode(latents)[0].astype(int)
    pieces = list(stream_frames(pipeline, config, VideoRequest(None, "a red circle", 5, 2)))
    assert [len(piece) for piece in pieces] == [1, *[4] * 7]
    assert np.abs(np.concatenate(pieces) - expected).max() <= 1 and expected.std() > 20


def test_the_command(converted, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    command = ["sample", f"--model={converted}", f"--prompts_file={tmp_path}/prompts.txt", "--frames=13", *SIZE]
    assert main([*command, "--stream", f"--output={tmp_path}/videos"]) == 0
    output = capsys.readouterr()
    files = [tmp_path / "videos" / name for name in ("0000.mp4", "0001.mp4")]
    assert output.out.split()[:2] == list(map(str, files)) and sorted((tmp_path / "videos").iterdir()) == files
    # In every block: S and z of 2 heads of 12 channels with 24 features, and 2 x 3 tokens of keys and values in one.
    carried = 2 * 2 * (2 * 2 * 24 * 13 * 4 + 6 * 2 * 2 * 12 * 4)
    assert f"4 chunks of 1 latent frame; {carried:,} bytes" in output.err
    assert "sample 2/2, chunks: 4/4" in output.err
    assert [len(frames_in(file)) for file in files] == [13, 13]
    assert read_settings(files[1])["noise"] == "frame"

    assert main([*command, "--config.sampler.noise=frame", f"--output={tmp_path}/videos"]) == 0
    assert "2 of 2 videos are finished already" in capsys.readouterr().err


def refused(capsys, code, *arguments):
    assert main(["sample", "--stream", "--prompt=a red circle", "--frames=13", *SIZE, *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_a_stream_cannot_do_is_refused_early(converted, tiny_pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stream, "configured_pipeline", None)
    model = f"--model={converted}"
    assert f"{tiny_pipeline}: block 0 is softmax; --stream needs causal" in refused(
        capsys, 2, f"--model={tiny_pipeline}"
    )
    assert "expected a name that ends in .mp4 for --stream" in refused(capsys, 2, model, "--output=a.gif")
    assert "expected 'frame' for --stream" in refused(capsys, 2, model, "--config.sampler.noise=video")
    assert "time axis has 1025 positions" in refused(capsys, 2, model, f"--frames={4 * 1025 - 3}")
    monkeypatch.setattr(stream, "device_memory", lambda device: 2**20)
    assert "--stream: expected at most 95% of 0 GiB a device, found" in refused(capsys, 3, model)
    assert not any(tmp_path.iterdir())


def test_a_dry_run(converted, capsys):
    command = ["sample", "--stream", f"--model={converted}", "--prompt=x", "--dry_run", "--config=wan_1_3b@v5e-8"]
    assert main([*command, "--frames=1021"]) == 0
    output = capsys.readouterr().out
    assert "256 chunks of 1 latent frame" in output and "| streaming |" in output and "1 device |" in output
    assert main([*command, "--config.sampler.steps=1000000", "--config.trace.keep_steps=1"]) == 3
    assert "does not fit" in capsys.readouterr().out


def test_a_growing_file_can_be_played_at_any_time(tmp_path):
    path, colours = tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 256, (8, 1, 1, 3), np.uint8)
    video = np.broadcast_to(colours, (8, 32, 48, 3))
    with growing_mp4(path, (32, 48), 16, {"prompt": "x"}) as append:
        for number in range(4):
            append(video[2 * number : 2 * number + 2])
            assert len(frames_in(tmp_path / ".a.mp4.mp4")) == 2 * number + 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"] and read_settings(path) == {"prompt": "x"}
    errors = [np.abs(one.astype(int) - other).max() for one, other in zip(frames_in(path), video, strict=True)]
    assert max(errors) < 8 and np.ptp(colours, axis=0).min() > 100


def test_a_kill_leaves_what_was_finished(converted, tmp_path):
    """A real process, killed while it streams 1001 chunks, far from its end."""
    command = [sys.executable, "-m", "jsurgery", "sample", "--stream", f"--model={converted}", "--prompt=a red circle"]
    command += ["--frames=4001", *SIZE, f"--output={tmp_path}/out.mp4"]
    growing = tmp_path / ".out.mp4.mp4"
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (growing.exists() and growing.stat().st_size > 30_000):
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [file.name for file in tmp_path.iterdir()] == [growing.name]
    found = frames_in(growing)
    assert 5 < len(found) < 4001 and read_settings(growing)["prompt"] == "a red circle"
