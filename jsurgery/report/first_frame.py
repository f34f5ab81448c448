"""The first frame that a run samples, shown in its page while the run goes on."""

import base64
import io

import numpy as np
from etils import epath
from PIL import Image, PngImagePlugin

from jsurgery.io.files import replacing

FILE = "first_frame.png"


def write_first_frame(workdir: epath.Path, frame_HxWx3: np.ndarray, prompt: str) -> epath.Path:
    """Writes the uint8 frame to `workdir` as PNG, with its prompt in the metadata; returns the file."""
    text, picture = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_itxt("prompt", prompt)
    Image.fromarray(frame_HxWx3).save(picture, format="png", pnginfo=text)
    file = workdir / FILE
    with replacing(file) as temporary:
        temporary.write_bytes(picture.getvalue())
    return file


def read_first_frame(workdir: epath.Path) -> dict[str, str] | None:
    """`picture` (PNG as base64) and its `prompt`; None if the file is missing or not from `write_first_frame`."""
    try:
        content = (workdir / FILE).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            prompt = str(image.info["prompt"])
    except (OSError, KeyError, SyntaxError, ValueError):
        return None
    return {"picture": base64.b64encode(content).decode(), "prompt": prompt}
