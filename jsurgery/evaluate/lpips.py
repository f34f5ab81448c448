"""LPIPS of video frames: their distance in the features of AlexNet (Zhang et al., 2018, arXiv:1801.03924, eq. 1)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jsurgery.errors import InputError
from jsurgery.evaluate.video_metrics import check_same_shape
from jsurgery.io.safetensors import open_tensors

LAYERS = ((0, 3, 64, 11, 4, 2), (3, 64, 192, 5, 1, 2), (6, 192, 384, 3, 1, 1), (8, 384, 256, 3, 1, 1),
          (10, 256, 256, 3, 1, 1))  # fmt: skip
# Each: number in torch's Sequential, input channels, output channels, kernel size, stride, padding.
POOLED = (3, 6)  # layers after a 3 x 3 max pooling of stride 2
SHIFT, SCALE = np.array([-0.030, -0.088, -0.188, 0.458, 0.448, 0.450], np.float32).reshape(2, 1, 1, 1, 3)
SMALLEST = 31  # pixels on a side; of smaller frames nothing is left in the last layers

Weights = Mapping[str, jax.Array]


def load_lpips(path: epath.PathLike) -> Weights:
    """The tensors of `lpips.LPIPS(net="alex")` in a safetensors file.

    Raises InputError if a tensor is missing or has another shape.
    """
    tensors, weights = open_tensors(path), {}
    for index, (number, channels, features, size, _, _) in enumerate(LAYERS):
        expected = {
            f"{number}.weight": ([f"net.slice{index + 1}.{number}.weight"], (features, channels, size, size)),
            f"{number}.bias": ([f"net.slice{index + 1}.{number}.bias"], (features,)),
            f"{number}.importance": ([f"{name}.model.1.weight" for name in (f"lin{index}", f"lins.{index}")],
                                     (1, features, 1, 1)),
        }  # fmt: skip
        for part, (names, shape) in expected.items():
            name = next((name for name in names if name in tensors), None)
            actual = None if name is None else tuple(tensors[name].shape)
            if name is None or actual != shape:
                raise InputError(f"--lpips={path}: expected {names[0]} of shape {list(shape)}, found {actual}")
            weights[part] = jnp.asarray(np.asarray(tensors[name], np.float32))
    return weights


def lpips(weights: Weights, video: np.ndarray, other: np.ndarray) -> np.ndarray:
    """LPIPS distance [F] between the frames of two uint8 videos [F, H, W, 3]; 0 for equal frames."""
    check_same_shape(video, other)
    if min(video.shape[1:3]) < SMALLEST:
        raise InputError(f"video: expected at least {SMALLEST} pixels on each side, found {video.shape[1:3]}")
    return np.array([_distance(weights, a[None], b[None])[0] for a, b in zip(video, other, strict=True)], float)


@jax.jit
def _distance(weights: Weights, a_BxHxWx3: jax.Array, b_BxHxWx3: jax.Array) -> jax.Array:
    total = jnp.zeros(len(a_BxHxWx3))
    for (number, *_), a, b in zip(LAYERS, _features(weights, a_BxHxWx3), _features(weights, b_BxHxWx3), strict=True):
        total += jnp.einsum("bhwc,c->bhw", (a - b) ** 2, weights[f"{number}.importance"].ravel()).mean(axis=(1, 2))
    return total


def _features(weights: Weights, image_BxHxWx3: jax.Array) -> list[jax.Array]:
    """The features of every layer, normalised to length 1 at each pixel."""
    x = (image_BxHxWx3 / 127.5 - 1 - SHIFT) / SCALE
    features = []
    for number, _, _, _, stride, padding in LAYERS:
        if number in POOLED:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        kernel, margin = weights[f"{number}.weight"], [(padding, padding)] * 2
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), margin, dimension_numbers=("NHWC", "OIHW", "NHWC")
        )
        x = jax.nn.relu(x + weights[f"{number}.bias"].reshape(1, 1, 1, -1))
        features.append(x / (jnp.sqrt((x**2).sum(axis=-1, keepdims=True)) + 1e-10))
    return features
