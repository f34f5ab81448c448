"""Reads the image that a video begins with, and brings it to the video's size."""

import hashlib
import io
from typing import NamedTuple

import numpy as np
from etils import epath

from jsurgery.data.video_reader import crop_box, fit
from jsurgery.errors import InputError
from jsurgery.runtime.progress import say


class GivenImage(NamedTuple):
    """An image in a video's size.

    Attributes:
      pixels: uint8 [H, W, 3].
      sha256: of the file.
    """

    pixels: np.ndarray
    sha256: str


def read_image(file: str, height: int, width: int) -> GivenImage:
    """The image in a file, turned upright, scaled to cover `height` x `width` pixels and cropped at the centre.

    Says so in a line if that cuts something off. Raises InputError for a file that is missing or not an image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = epath.Path(file)
    if not path.is_file():
        raise InputError(f"--image={file}: no such file")
    expected = f"--image={file}: expected an image, such as a PNG or JPEG file"
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError:
        raise InputError(expected) from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{expected} ({reason[:200]})") from None
    left, top, right, bottom = crop_box(pixels.shape[0], pixels.shape[1], height, width)
    kept_width, kept_height = round(right - left), round(bottom - top)
    if (kept_height, kept_width) != pixels.shape[:2]:
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        say(f"{file}: cropped from {size} to {kept_width}x{kept_height}, the aspect of a {width}x{height} video")
    return GivenImage(fit(pixels, height, width), hashlib.sha256(content).hexdigest())
