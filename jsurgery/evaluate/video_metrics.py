"""Metrics of uint8 videos [F, H, W, 3]: the similarity of two videos, and the flicker and motion of a single one."""

import itertools
import math
from typing import Any

import numpy as np
from scipy import ndimage

from jsurgery.errors import InputError

PEAK = 255.0
SIGMA, MARGIN = 1.5, 5  # SSIM: of the Gaussian window; pixels at the edge where it does not fit
WORKING_SIZE = 96  # flow: frames are averaged down to about this many pixels on the shorter side
REACH = 2.0  # flow: sigma of the neighbourhood that is taken to move alike, in pixels of the averaged frames
NOISE = 1.0  # flow: squared gradients of grey levels below about this value count as noise


def mse(video: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean squared difference of every frame [F], in squared grey levels (0 to 255)."""
    check_same_shape(video, other)
    return np.array([np.mean((a.astype(float) - b) ** 2) for a, b in zip(video, other, strict=True)])


def psnr(error: float | np.floating) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared difference; infinite for equal frames."""
    return 10 * math.log10(PEAK**2 / error) if error > 0 else math.inf


def ssim(video: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Structural similarity of every frame [F], 1 for equal ones: the mean over colours (Wang et al., 2004)."""
    check_same_shape(video, other)
    if min(video.shape[1:3]) <= 2 * MARGIN:
        raise InputError(f"video: expected more than {2 * MARGIN} pixels on each side, found {video.shape[1:3]}")
    return np.array([_ssim(a.astype(float), b.astype(float)) for a, b in zip(video, other, strict=True)])


def flicker(video: np.ndarray) -> float:
    """Mean absolute second difference in time, in grey levels.

    0 for a still video, for one that brightens evenly, and for fewer than three frames.
    """
    if len(video) < 3:
        return 0.0
    triples = zip(video[:-2], video[1:-1], video[2:], strict=True)
    return float(np.mean([np.abs(a.astype(np.int16) - 2 * b.astype(np.int16) + c).mean() for a, b, c in triples]))


def motion(video: np.ndarray) -> float:
    """Mean length of the optical flow between adjacent frames, in pixels a frame.

    Flat regions count as still, because no motion can be seen in them. The motion of a single frame is 0.
    """
    cell = max(1, round(min(video.shape[1:3]) / WORKING_SIZE))
    height, width = (side // cell * cell for side in video.shape[1:3])
    grey = [_cells(frame[:height, :width].mean(axis=-1), cell) for frame in video]
    lengths = [np.hypot(*flow(first, second)).mean() for first, second in itertools.pairwise(grey)]
    return float(cell * np.mean(lengths)) if lengths else 0.0


def flow(first: np.ndarray, second: np.ndarray, iterations: int = 3) -> np.ndarray:
    """(y, x) displacement [2, H, W] of each pixel of the grey image `first` [H, W] in the image `second`.

    Lucas and Kanade's least squares over a Gaussian neighbourhood, from coarse to fine.
    """
    levels = [(first, second)]
    while min(levels[-1][0].shape) >= 24:
        one, two = levels[-1]
        levels.append((_halve(one), _halve(two)))
    displacement = np.zeros((2, *levels[-1][0].shape))
    for one, two in reversed(levels):
        displacement = _enlarge(displacement, one.shape)
        grid, last = np.indices(one.shape), np.array(one.shape)[:, None, None] - 1
        for _ in range(iterations):
            points = grid + displacement
            inside = np.all((points >= 0) & (points <= last), axis=0)
            moved = np.where(inside, ndimage.map_coordinates(two, points, order=1, mode="nearest"), one)
            displacement += np.clip(_step(one, moved, inside), -1, 1)
        displacement = np.stack([ndimage.median_filter(axis, 5) for axis in displacement])
    return displacement


def check_same_shape(video: np.ndarray, other: np.ndarray) -> None:
    if video.shape != other.shape or video.ndim != 4 or video.shape[-1] != 3:
        raise InputError(f"videos: expected two of [F, H, W, 3], found {list(video.shape)} and {list(other.shape)}")


def _ssim(a_HxWx3: np.ndarray, b_HxWx3: np.ndarray) -> float:
    def around(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, SIGMA, radius=MARGIN, axes=(0, 1))[MARGIN:-MARGIN, MARGIN:-MARGIN]

    mean_a, mean_b = around(a_HxWx3), around(b_HxWx3)
    variance_a, variance_b = around(a_HxWx3**2) - mean_a**2, around(b_HxWx3**2) - mean_b**2
    covariance = around(a_HxWx3 * b_HxWx3) - mean_a * mean_b
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float(np.mean(alike / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))))


def _step(one: np.ndarray, moved: np.ndarray, known: Any) -> np.ndarray:
    """The displacement [2, H, W] that explains the difference of two images to first order, from the `known` pixels."""
    y, x = np.array(np.gradient((one + moved) / 2)) * known
    t = moved - one
    yy, xx, xy, yt, xt = (ndimage.gaussian_filter(product, REACH) for product in (y * y, x * x, x * y, y * t, x * t))
    yy, xx = yy + NOISE, xx + NOISE
    return np.stack([xy * xt - xx * yt, xy * yt - yy * xt]) / (yy * xx - xy**2)


def _enlarge(displacement: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resamples and scales a displacement field to an image of another size."""
    factors = np.divide(shape, displacement.shape[1:])[:, None, None]
    points = (np.indices(shape) + 0.5) / factors - 0.5
    return factors * np.stack([ndimage.map_coordinates(axis, points, order=1, mode="nearest") for axis in displacement])


def _halve(image: np.ndarray) -> np.ndarray:
    height, width = (side // 2 * 2 for side in image.shape)
    return _cells(ndimage.gaussian_filter(image, 0.5)[:height, :width], 2)


def _cells(image: np.ndarray, cell: int) -> np.ndarray:
    """Means over square cells."""
    height, width = (side // cell for side in image.shape)
    return image.reshape(height, cell, width, cell).mean(axis=(1, 3))
