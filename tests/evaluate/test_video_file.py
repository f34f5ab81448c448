import json

import av
import numpy as np
import pytest
from PIL import Image

from jsurgery.data import sprites
from jsurgery.errors import InputError
from jsurgery.evaluate.video_file import write_video


@pytest.fixture(scope="module")
def clip():
    return sprites.render(sprites.scene_at(0, 0), 9, 64, 48)


def test_mp4_holds_the_frames_and_the_settings(clip, tmp_path):
    write_video(tmp_path / "a.mp4", clip, 8, {"seed": 3})
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert json.loads(container.metadata["comment"]) == {"seed": 3}
        assert container.streams.video[0].average_rate == 8
    assert frames.shape == clip.shape
    assert np.abs(frames.astype(int) - clip).mean() < 6  # yuv420 and lossy
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_gif_and_sheet(clip, tmp_path):
    write_video(tmp_path / "a.gif", clip, 8)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 9
    write_video(tmp_path / "a.png", clip, 8, {"seed": 4})
    sheet = Image.open(tmp_path / "a.png")
    assert sheet.size == (9 * 48, 64) and json.loads(sheet.text["settings"]) == {"seed": 4}
    assert np.array_equal(np.asarray(sheet)[:, :48], clip[0])


def test_other_suffix(clip, tmp_path):
    with pytest.raises(InputError, match=r"\.mp4, \.gif or \.png"):
        write_video(tmp_path / "a.webm", clip, 8)
