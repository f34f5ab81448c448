"""Video metrics, compared with scikit-image and on videos constructed to have known values."""

import math

import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.registration import optical_flow_ilk

from jsurgery.errors import InputError
from jsurgery.evaluate.video_metrics import flicker, flow, motion, mse, psnr, ssim


@pytest.fixture
def texture():
    """A function from points to the grey values of a smooth random image."""
    values = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(220, 260)), 3)
    values = 255 * (values - values.min()) / np.ptp(values)
    return lambda points: ndimage.map_coordinates(values, points, order=3)


@pytest.mark.parametrize("shape", [(3, 32, 48, 3), (2, 37, 53, 3), (1, 12, 11, 3)])
def test_ssim_and_psnr_equal_scikit_image(shape):
    rng = np.random.default_rng(0)
    smooth = 255 * ndimage.gaussian_filter(rng.uniform(size=shape), (0, 2, 2, 0))
    video = smooth.astype(np.uint8)
    other = np.clip(smooth + rng.normal(0, 12, shape) + rng.normal(0, 9, (shape[0], 1, 1, 1)), 0, 255).astype(np.uint8)
    options = {"channel_axis": -1, "gaussian_weights": True, "use_sample_covariance": False, "data_range": 255}
    expected = [structural_similarity(a, b, **options) for a, b in zip(video, other, strict=True)]
    assert ssim(video, other) == pytest.approx(expected, abs=1e-9) and max(expected) < 0.95
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(video, other, strict=True)]
    assert [psnr(error) for error in mse(video, other)] == pytest.approx(expected, abs=1e-9)
    assert psnr(mse(video, other).mean()) == pytest.approx(peak_signal_noise_ratio(video, other), abs=1e-9)


def test_a_video_compared_with_itself_is_perfect():
    video = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    assert not mse(video, video).any() and psnr(mse(video, video)[0]) == math.inf
    assert ssim(video, video) == pytest.approx([1, 1], abs=1e-12)


def test_different_shapes_and_small_frames_are_refused():
    video = np.zeros((2, 16, 24, 3), np.uint8)
    with pytest.raises(InputError, match=r"found \[2, 16, 24, 3\] and \[1, 16, 24, 3\]"):
        mse(video, video[:1])
    with pytest.raises(InputError, match="more than 10 pixels"):
        ssim(video[:, :10], video[:, :10])


def test_flicker_ignores_a_steady_change_of_brightness():
    level = np.arange(0, 90, 10)
    steady = np.broadcast_to(level[:, None, None, None], (9, 16, 16, 3)).astype(np.uint8)
    assert flicker(steady) == 0 and flicker(steady[:2]) == 0
    flickering = steady + np.uint8(7) * (np.arange(9) % 2).astype(np.uint8)[:, None, None, None]
    assert flicker(flickering) == pytest.approx(28 / 2)  # steps of 10 + 7 and 10 - 7 in turn
    assert flicker(np.flip(flickering, axis=0)) == pytest.approx(flicker(flickering))


@pytest.mark.parametrize("shift", [(0, 0), (0.5, -0.25), (2, 3), (5, -4), (-9, 0)])
def test_flow_of_a_shifted_texture_is_the_shift(texture, shift):
    grid = np.indices((95, 128)) + 40.0
    first, second = texture(grid), texture(grid - np.array(shift, float)[:, None, None])
    found = flow(first, second)
    assert found.mean(axis=(1, 2)) == pytest.approx(shift, abs=0.06)
    assert np.hypot(*found).mean() == pytest.approx(math.hypot(*shift), rel=0.03, abs=1e-9)
    if math.hypot(*shift) < 7:  # scikit-image's Lucas-Kanade fails for larger shifts
        expected = np.hypot(*optical_flow_ilk(first / 255, second / 255)).mean()
        assert np.hypot(*found).mean() == pytest.approx(expected, rel=0.03, abs=1e-9)


def test_motion_is_in_pixels_at_the_resolution_of_the_video(texture):
    def video(height, width, step):
        scale = 96 / height
        grid = (np.indices((height, width)) + 0.5) * scale + 20
        frames = [texture(grid - np.array([0, step * scale * frame])[:, None, None]) for frame in range(4)]
        return np.repeat(np.clip(frames, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)

    assert motion(video(96, 128, 2)) == pytest.approx(2, rel=0.05)
    assert motion(video(192, 250, 4)) == pytest.approx(4, rel=0.05)  # the same video at twice the size
    assert motion(video(96, 128, 0)) == 0 and motion(video(96, 128, 2)[:1]) == 0
