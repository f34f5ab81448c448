"""Sprites: procedural captioned videos, in which everything that a caption says can be measured on the pixels.

A scene is one or two flat shapes over a flat background, each still or moving at constant velocity. A scene is kept in
units of the frame, so one scene renders at any size and length. Clips are made on demand from (seed, index); a split is
a range of indices.
"""

import itertools
import re
from dataclasses import dataclass

import numpy as np

from jsurgery.errors import InputError

SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (220, 35, 35),
    "green": (30, 170, 60),
    "blue": (40, 70, 225),
    "yellow": (245, 220, 40),
    "pink": (250, 105, 200),
    "cyan": (40, 215, 230),
}
BACKGROUNDS = {"black": (12, 12, 12), "grey": (128, 128, 128), "white": (240, 240, 240), "brown": (110, 68, 32)}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "still": (0, 0)}  # (y, x)

FRAMES, HEIGHT, WIDTH = 17, 192, 160
TRAVEL = (0.45, 0.6)  # range of `Sprite.travel`
DIAMETER = {1: (0.30, 0.38), 2: (0.26, 0.32)}  # range of `Sprite.size`, by the number of sprites

_MENTION = re.compile(rf"a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) (?:stays (still)|moves (left|right|up|down))")
_BACKGROUND = re.compile(rf"a ({'|'.join(BACKGROUNDS)}) background")


@dataclass(frozen=True)
class Sprite:
    """One moving shape, in units of the frame.

    size: the diameter (side of the bounding box), relative to the shorter side of the frame.
    travel: the distance covered in the clip, relative to the frame's width (left, right) or height (up, down).
    start: (y, x) in [0, 1]. Of all positions that keep the whole path inside the frame, 0 is the uppermost or leftmost
        and 1 the lowest or rightmost.
    """

    shape: str
    color: str
    direction: str
    size: float
    travel: float
    start: tuple[float, float]

    def centers(self, frames: int, height: int, width: int) -> np.ndarray:
        """Centre of the bounding box in every frame, [frames, (y, x)], in pixels."""
        extent = np.array([height, width], float)
        displacement = np.array(DIRECTIONS[self.direction]) * self.travel * extent
        diameter = self.diameter(height, width)
        room = extent - diameter - np.abs(displacement)
        first = diameter / 2 + np.array(self.start) * room + np.maximum(-displacement, 0)
        return first + np.linspace(0, 1, frames)[:, None] * displacement

    def diameter(self, height: int, width: int) -> float:
        """Side of the bounding box, in pixels."""
        return self.size * min(height, width)


@dataclass(frozen=True)
class Scene:
    """One or two sprites of different colours, drawn in order, over a background."""

    sprites: tuple[Sprite, ...]
    background: str

    @property
    def caption(self) -> str:
        """Text that says the colour, shape and direction of every sprite, and the background."""
        return _caption([(s.color, s.shape, s.direction) for s in self.sprites], self.background)


def _caption(mentions, background: str) -> str:
    phrases = [
        f"a {color} {shape} " + ("stays still" if direction == "still" else f"moves {direction}")
        for color, shape, direction in mentions
    ]
    return f"{' and '.join(phrases)} over a {background} background"


def parse_caption(caption: str) -> tuple[list[tuple[str, str, str]], str]:
    """Inverse of `Scene.caption`: [(color, shape, direction), ...] in drawing order, and the background.

    Raises InputError for text that is not the caption of a scene.
    """
    sprites, _, background = caption.partition(" over ")
    phrases = sprites.split(" and ")
    mentions = [m for m in map(_MENTION.fullmatch, phrases) if m]
    ground = _BACKGROUND.fullmatch(background)
    colors = {m[1] for m in mentions}
    if not ground or len(phrases) > 2 or len(colors) < len(phrases):
        raise InputError(
            "caption: expected one or two sprites of different colours, such as "
            f"'a red circle moves left over a grey background', found {caption!r}"
        )
    return [(m[1], m[2], m[3] or m[4]) for m in mentions], ground[1]


def all_captions() -> list[str]:
    """Every caption that a scene can have: 360 of one sprite, then 27,000 of two."""
    ones = list(itertools.product(COLORS, SHAPES, DIRECTIONS))
    pairs = [(a, b) for a, b in itertools.product(ones, ones) if a[0] != b[0]]
    return [_caption(m, background) for m in [(one,) for one in ones] + pairs for background in BACKGROUNDS]


def sample_scene(rng: np.random.Generator, *, two_sprites: float = 0.25) -> Scene:
    """A random scene; it has two sprites with probability `two_sprites`.

    Two sprites may cross, but their bounding boxes are apart in at least half of the frames (at the default size), so
    that the attributes of the sprite below can always be seen.
    """
    count = 2 if rng.random() < two_sprites else 1
    background = str(rng.choice(list(BACKGROUNDS)))
    colors = rng.choice(list(COLORS), size=count, replace=False)
    shapes = rng.choice(SHAPES, size=count)
    directions = rng.choice(list(DIRECTIONS), size=count)
    while True:
        sprites = tuple(
            Sprite(
                shape=str(shape),
                color=str(color),
                direction=str(direction),
                size=float(rng.uniform(*DIAMETER[count])),
                travel=0.0 if direction == "still" else float(rng.uniform(*TRAVEL)),
                start=(float(rng.random()), float(rng.random())),
            )
            for color, shape, direction in zip(colors, shapes, directions, strict=True)
        )
        if count == 1 or _touching(*sprites).mean() <= 0.5:
            return Scene(sprites, background)


def _touching(a: Sprite, b: Sprite) -> np.ndarray:
    gap = np.abs(a.centers(FRAMES, HEIGHT, WIDTH) - b.centers(FRAMES, HEIGHT, WIDTH)).max(axis=1)
    return gap < (a.diameter(HEIGHT, WIDTH) + b.diameter(HEIGHT, WIDTH)) / 2


def scene_at(seed: int, index: int, *, two_sprites: float = 0.25) -> Scene:
    """Scene number `index` of the endless set `seed`: the same one on every machine."""
    return sample_scene(np.random.default_rng([seed, index]), two_sprites=two_sprites)


def coverage(shape: str, y: np.ndarray, x: np.ndarray, diameter: float | np.ndarray) -> np.ndarray:
    """Fraction of a pixel that the shape covers, in [0, 1]; (y, x): the pixel's offset from the bounding box's centre.

    Computed from the signed distance to the edge, so that edges are one pixel soft.
    """
    radius = diameter / 2
    if shape == "circle":
        distance = np.hypot(y, x) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(y), np.abs(x)) - radius
    else:
        distance = np.maximum(y - radius, (2 * np.abs(x) - y - radius) / np.sqrt(5))
    return np.clip(0.5 - distance, 0, 1)


def render(scene: Scene, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """The scene as a uint8 video [frames, height, width, 3]; later sprites lie on top of earlier ones."""
    row = np.tile(np.array(BACKGROUNDS[scene.background], np.uint8), width)
    video = np.tile(row, frames * height).reshape(frames, height, width, 3)
    for sprite in scene.sprites:
        diameter = sprite.diameter(height, width)
        side = int(np.ceil(diameter)) + 3
        centers = sprite.centers(frames, height, width)
        corners = np.clip(np.floor(centers - diameter / 2).astype(int) - 1, 0, np.array([height, width]) - side)
        offsets = corners[:, :, None] + np.arange(side) + 0.5 - centers[:, :, None]
        alpha_FxSxS = coverage(sprite.shape, offsets[:, 0, :, None], offsets[:, 1, None, :], diameter)
        color = np.array(COLORS[sprite.color], np.float32)
        for frame, (top, left), alpha in zip(video, corners, alpha_FxSxS[..., None].astype(np.float32), strict=True):
            window = frame[top : top + side, left : left + side]
            window[:] = np.rint(window + alpha * (color - window))
    return video


def to_float(video: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] to float32 in [-1, 1]."""
    return np.asarray(video, np.float32) / 127.5 - 1


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Float in [-1, 1] (values beyond are clipped) to uint8."""
    return np.rint((np.clip(video, -1, 1) + 1) * 127.5).astype(np.uint8)
