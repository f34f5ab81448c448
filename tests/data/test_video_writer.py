import json

import av
import numpy as np
import pytest
from PIL import Image

from jsurgery.data import sprites, video_writer
from jsurgery.data.video_writer import read_settings, write_video
from jsurgery.errors import InputError


@pytest.fixture(scope="module")
def clip():
    return sprites.render(sprites.scene_at(0, 0), 9, 64, 48)


def test_mp4_has_the_frames_and_the_settings(clip, tmp_path):
    write_video(tmp_path / "a.mp4", clip, 8, {"seed": 3})
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert json.loads(container.metadata["comment"]) == {"seed": 3}
        assert container.streams.video[0].average_rate == 8
    assert frames.shape == clip.shape
    assert np.abs(frames.astype(int) - clip).mean() < 6  # yuv420 and lossy
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_gif_has_all_frames_and_png_shows_them_side_by_side(clip, tmp_path):
    write_video(tmp_path / "a.gif", clip, 8)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 9
    write_video(tmp_path / "a.png", clip, 8, {"seed": 4})
    sheet = Image.open(tmp_path / "a.png")
    assert sheet.size == (9 * 48, 64) and json.loads(sheet.text["settings"]) == {"seed": 4}
    assert np.array_equal(np.asarray(sheet)[:, :48], clip[0])


@pytest.mark.parametrize("fps", [16, 24, 30, 50, 60, 120, 12.5])
def test_a_gif_lasts_as_long_as_its_video(tmp_path, fps):
    rng = np.random.default_rng(0)
    write_video(tmp_path / "a.gif", rng.integers(0, 255, (41, 8, 8, 3), np.uint8), fps)
    durations = []
    with Image.open(tmp_path / "a.gif") as animation:
        for number in range(animation.n_frames):
            animation.seek(number)
            durations.append(animation.info["duration"])
    assert min(durations) >= 20 and max(durations) - min(durations) <= 10
    assert abs(sum(durations) - 1000 * 41 / fps) <= 10 and (len(durations) == 41) == (fps <= 50)


def test_colours_are_those_of_bt_709_and_said_to_be(tmp_path):
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [180, 120, 40]], np.uint8)
    write_video(tmp_path / "a.mp4", np.repeat(np.repeat(colours[None, None], 64, 1), 16, 2).repeat(2, 0), 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (1, 1)
    y, u, v = (np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size).astype(float) for plane in frame.planes)
    for number, (red, green, blue) in enumerate(colours / 255):
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        found = y[30, 16 * number + 8], u[15, 8 * number + 4], v[15, 8 * number + 4]
        expected = 16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748
        np.testing.assert_allclose(found, expected, atol=3)


def test_another_suffix_is_refused(clip, tmp_path):
    with pytest.raises(InputError, match=r"\.mp4, \.gif or \.png"):
        write_video(tmp_path / "a.webm", clip, 8)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_settings_are_read_back(clip, tmp_path, suffix):
    settings = {"prompt": 'ein "roter" Kreis, 红色的圆圈\n' * 20, "seed": 3, "shift": 0.1}
    write_video(tmp_path / f"a{suffix}", clip[:2], 8, settings)
    assert read_settings(tmp_path / f"a{suffix}") == settings
    (tmp_path / f"b{suffix}").write_bytes((tmp_path / f"a{suffix}").read_bytes()[:40])
    assert read_settings(tmp_path / f"b{suffix}") == {}


def test_an_image_of_another_program_has_no_settings(clip, tmp_path):
    Image.fromarray(clip[0]).save(tmp_path / "a.png")
    assert read_settings(tmp_path / "a.png") == {}


def test_an_interrupted_write_leaves_the_finished_file(clip, tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", clip[:2], 8, {"seed": 1})

    def write_half(path, *rest):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(video_writer, "_write_mp4", write_half)
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(KeyboardInterrupt):
            write_video(tmp_path / name, clip, 8, {"seed": 2})
    assert read_settings(tmp_path / "a.mp4") == {"seed": 1} and not (tmp_path / "b.mp4").exists()
