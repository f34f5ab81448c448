"""The sprites score: whether a generated video shows what its caption says, measured on the pixels alone.

Six dimensions per clip, each in [0, 1]:

color       the mentioned colours are there as blobs of plausible size, and no others
shape       the blob is best explained by the mentioned shape
direction   the blob moves along the mentioned axis in the mentioned direction, or stays still
background  share of the pixels around the sprites that is nearest to the mentioned background
flicker     1 is steady: the background and each sprite's colour and area stay as they are between adjacent frames
motion      the blob moves as far as the caption calls for (about half of the frame, or not at all)

A sprite of the wrong colour is still judged for its shape and motion: it is matched to a blob of another colour. Two
sprites count equally. Frames in which they touch are left out, because one may hide a part of the other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from jsurgery.data.sprites import BACKGROUNDS, COLORS, DIAMETER, DIRECTIONS, SHAPES, coverage, parse_caption, to_uint8
from jsurgery.errors import InputError

DIMENSIONS = ("color", "shape", "direction", "background", "flicker", "motion")

WORKING_SIZE = 80  # videos are averaged down to about this many pixels on the shorter side
AREA = (
    0.2 * min(DIAMETER[2]) ** 2,
    2 * max(DIAMETER[1]) ** 2,
)  # least and most of a blob, over the shorter side squared
SEEN = 1 / 3  # share of the frames in which a colour must have a blob to count as a sprite
APART = 1 / 4  # frames with contact are left out if at least this share of the frames is free of it
STILL = 0.12  # of the frame: a smaller displacement counts as still
FULL_WAY, LONG_WAY = (0.0, 0.4), (1.0, 0.7)  # displacements of a moving sprite that score 0 and 1: too short, too long
STILL_WAY = (0.25, 0.05)  # likewise of a still sprite
SAME_SHAPE = 0.6  # smallest IoU with the best template at which a blob has its shape
FLICKER_RANGE = 0.2  # mean change between adjacent frames (1 is black to white) that scores 0

_WITHIN_FRAME = np.zeros((3, 3, 3), bool)  # neighbours within a frame, none across frames
_WITHIN_FRAME[1] = True
_BACKGROUND_COLORS = np.array(list(BACKGROUNDS.values()), np.float32)
_SPRITE_COLORS = np.array(list(COLORS.values()), np.float32)


@dataclass(frozen=True)
class _Track:
    """The largest blob of one colour in every frame.

    Without a blob of plausible size, a frame's mask is empty, its area 0, its centre and colour NaN.
    """

    mask: np.ndarray  # [F, h, w]
    area: np.ndarray  # [F], pixels
    center: np.ndarray  # [F, (y, x)], pixels
    color: np.ndarray  # [F, 3]

    @property
    def visible(self) -> np.ndarray:
        return self.area > 0


def measure(video: np.ndarray, caption: str) -> dict[str, float]:
    """Score of one clip [F, H, W, 3], uint8 or float in [-1, 1], per dimension in [0, 1].

    Raises InputError for a video of another shape or with values that are not finite, and for text that is not a
    caption of `data.sprites`.
    """
    mentions, background = parse_caption(caption)
    planes = _working_copy(video)
    size = np.array(planes.shape[2:])
    labels = _label_pixels(planes)
    tracks = {}
    for index, color in enumerate(COLORS):
        track = _track(planes, labels == index)
        if track is not None and track.visible.mean() >= SEEN:
            tracks[color] = track

    grown = {color: ndimage.binary_dilation(track.mask, _WITHIN_FRAME, 2) for color, track in tracks.items()}
    around = ~np.any([np.zeros(labels.shape, bool), *grown.values()], axis=0)

    mentioned = [color for color, _, _ in mentions]
    others = [track.visible for color, track in tracks.items() if color not in mentioned]
    intruded = np.mean(np.any(others, axis=0)) if others else 0.0
    per_sprite = []
    for color, (_, shape, direction) in zip(_match(mentioned, tracks), mentions, strict=True):
        if color is None:
            per_sprite.append((0, 0, 0, 0))
            continue
        track, clean = tracks[color], _clean_frames(color, tracks, grown)
        displacement = _displacement(track, clean) / size
        correct = _shape(track, clean) == shape, _direction(displacement) == direction
        per_sprite.append((*correct, _sprite_steadiness(track, clean), _motion(displacement, direction)))
    shape, direction, steadiness, motion = np.mean(per_sprite, axis=0)

    return {
        "color": float(np.mean([color in tracks for color in mentioned]) * (1 - intruded)),
        "shape": float(shape),
        "direction": float(direction),
        "background": _background_share(planes, around, background),
        "flicker": float(0.5 * _background_steadiness(planes, around) + 0.5 * steadiness),
        "motion": float(motion),
    }


def score(videos: Iterable[np.ndarray], captions: Sequence[str]) -> dict[str, np.ndarray]:
    """`measure` of every clip: dimension -> [clips]."""
    per_clip = [measure(video, caption) for video, caption in zip(videos, captions, strict=True)]
    return {dimension: np.array([clip[dimension] for clip in per_clip]) for dimension in DIMENSIONS}


def calibrate(
    videos: Sequence[np.ndarray],
    captions: Sequence[str],
    rng: np.random.Generator,
) -> tuple[dict[str, float], dict[str, float]]:
    """(upper, chance): mean scores of real clips with their own captions, and with shuffled ones.

    The clips should have passed the VAE's encoder and decoder, whose errors generated clips have too. The chance of
    flicker is 0, because captions say nothing about it.
    """
    shuffled = [captions[int(index)] for index in rng.permutation(len(captions))]
    upper = {dimension: float(values.mean()) for dimension, values in score(videos, captions).items()}
    chance = {dimension: float(values.mean()) for dimension, values in score(videos, shuffled).items()}
    return upper, chance | {"flicker": 0.0}


def summarize(
    per_clip: dict[str, np.ndarray],
    upper: dict[str, float],
    chance: dict[str, float],
    rng: np.random.Generator,
    resamples: int = 2000,
) -> dict[str, dict[str, float | None]]:
    """Per dimension and for "total" (their mean): mean, low, high, upper, chance, normalized.

    low, high: 95 % percentile bootstrap interval of the mean; clips, one per prompt, are resampled whole.
    normalized: (mean - chance) / (upper - chance); 1 for real clips, 0 for clips that ignore their captions, None if
    real clips score no more than chance.
    """
    scores = np.stack([per_clip[dimension] for dimension in DIMENSIONS], axis=1)
    table = np.concatenate([scores, scores.mean(axis=1, keepdims=True)], axis=1)
    picks = rng.integers(len(table), size=(resamples, len(table)))
    low, high = np.quantile(table[picks].mean(axis=1), [0.025, 0.975], axis=0)
    uppers = [upper[dimension] for dimension in DIMENSIONS]
    chances = [chance[dimension] for dimension in DIMENSIONS]
    summary = {}
    for index, (name, top, floor) in enumerate(
        zip((*DIMENSIONS, "total"), [*uppers, np.mean(uppers)], [*chances, np.mean(chances)], strict=True)
    ):
        mean = table[:, index].mean()
        values = {"mean": mean, "low": low[index], "high": high[index], "upper": top, "chance": floor}
        summary[name] = {key: float(value) for key, value in values.items()}
        summary[name]["normalized"] = float((mean - floor) / (top - floor)) if top > floor else None
    return summary


def _working_copy(video: np.ndarray) -> np.ndarray:
    """Colour planes [3, F, h, w], float32 in [0, 255], averaged down over square cells."""
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or video.shape[0] < 2 or min(video.shape[1:3]) < 16:
        raise InputError(f"video: expected [F >= 2, H >= 16, W >= 16, 3], found {list(video.shape)}")
    if video.dtype != np.uint8:
        if not np.isfinite(video).all():
            raise InputError("video: expected finite values in [-1, 1], found NaN or infinity")
        video = to_uint8(video)
    cell = max(1, round(min(video.shape[1:3]) / WORKING_SIZE))
    height, width = (side // cell for side in video.shape[1:3])
    planes_3xFxHxW = video.transpose(3, 0, 1, 2)[..., : height * cell, : width * cell]
    total = np.zeros((3, len(video), height, width), np.float32)
    for y in range(cell):
        for x in range(cell):
            total += planes_3xFxHxW[..., y::cell, x::cell]
    return total / cell**2


def _label_pixels(planes: np.ndarray) -> np.ndarray:
    """Index of the sprite colour of every pixel [F, h, w], -1 for none.

    A pixel is explained as a mixture of the background (the frame's median colour) and one sprite colour, and gets the
    label if the sprite's part exceeds one half. So a soft edge gets its sprite's colour: half red on white is not pink.
    """
    ground = np.median(planes.reshape(*planes.shape[:2], -1)[..., ::3], axis=-1)[..., None, None]
    offset = planes - ground
    labels = np.full(planes.shape[1:], -1)
    explained = np.zeros(planes.shape[1:], np.float32)  # squared distance from the ground that the best colour explains
    for index, color in enumerate(_SPRITE_COLORS):
        toward = color[:, None, None, None] - ground
        norm = (toward**2).sum(axis=0)
        along = (offset * toward).sum(axis=0)
        share = np.clip(along / norm, 0, 1)
        gain = share * (2 * along - share * norm)
        better = gain > explained
        explained = np.where(better, gain, explained)
        labels = np.where(better, np.where(share > 0.5, index, -1), labels)
    return labels


def _track(planes: np.ndarray, mask: np.ndarray) -> _Track | None:
    count, height, width = mask.shape
    unit = min(height, width) ** 2
    if mask.sum() < AREA[0] * unit:
        return None
    blobs = np.empty(mask.shape, np.int32)
    ndimage.label(mask, _WITHIN_FRAME, output=blobs)
    track = _Track(
        mask=np.zeros_like(mask),
        area=np.zeros(count),
        center=np.full((count, 2), np.nan),
        color=np.full((count, 3), np.nan),
    )
    for frame, blobs_HxW in enumerate(blobs):
        areas = np.bincount(blobs_HxW.ravel())
        areas[0] = 0
        areas[(areas < AREA[0] * unit) | (areas > AREA[1] * unit)] = 0
        if areas.any():
            inside = blobs_HxW == areas.argmax()
            track.mask[frame] = inside
            track.area[frame] = areas.max()
            track.center[frame] = np.argwhere(inside).mean(axis=0)
            track.color[frame] = planes[:, frame, inside].mean(axis=1)
    return track


def _match(mentioned: Sequence[str], tracks: dict[str, _Track]) -> list[str | None]:
    """Colour of each mentioned sprite's track: its own, else the largest spare track, else None."""
    spare = sorted((c for c in tracks if c not in mentioned), key=lambda c: -tracks[c].area.sum())
    return [color if color in tracks else (spare.pop(0) if spare else None) for color in mentioned]


def _clean_frames(color: str, tracks: dict[str, _Track], grown: dict[str, np.ndarray]) -> np.ndarray:
    """Mask [F] of frames in which the sprite is visible and touches no other; if those are few, of all visible ones."""
    visible = tracks[color].visible
    touched = np.zeros_like(visible)
    for other in tracks:
        if other != color:
            touched |= (grown[color] & tracks[other].mask).any(axis=(1, 2))
    clean = visible & ~touched
    return clean if clean.mean() >= APART else visible


def _displacement(track: _Track, clean: np.ndarray) -> np.ndarray:
    """(y, x) over the whole clip, in pixels: least-squares velocity over the clean frames, times the clip's length."""
    time = np.flatnonzero(clean).astype(float)
    time -= time.mean()
    center = track.center[clean]
    velocity = time @ center / max(time @ time, 1.0)
    return velocity * (len(clean) - 1)


def _direction(displacement: np.ndarray) -> str | None:
    length = np.abs(displacement)
    if length.max() < STILL:
        return "still"
    step = np.where(length == length.max(), np.sign(displacement), 0)
    return next((name for name, unit in DIRECTIONS.items() if tuple(step) == unit), None)


def _motion(displacement: np.ndarray, direction: str) -> float:
    length = float(np.hypot(*displacement))
    if direction == "still":
        return _ramp(length, *STILL_WAY)
    return min(_ramp(length, *FULL_WAY), _ramp(length, *LONG_WAY))


def _ramp(value: float, zero: float, one: float) -> float:
    return float(np.clip((value - zero) / (one - zero), 0, 1))


def _shape(track: _Track, clean: np.ndarray) -> str | None:
    """The shape whose template, of the blob's area and centroid, overlaps it best over the clean frames.

    Area and centroid survive the blur that rounds off corners and shortens bounding boxes.
    """
    height, width = track.mask.shape[1:]
    mask = track.mask[clean]
    area = track.area[clean, None, None].astype(np.float32)
    center_y, center_x = track.center[clean].T.astype(np.float32)[..., None, None]
    y = np.arange(height, dtype=np.float32)[:, None] - center_y
    x = np.arange(width, dtype=np.float32) - center_x
    fill = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}  # area relative to the diameter squared
    drop = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6}  # of the centroid below the box's centre, in diameters
    overlap = {}
    for shape in SHAPES:
        diameter = np.sqrt(area / fill[shape])
        template = coverage(shape, y + drop[shape] * diameter, x, diameter)
        common = (template * mask).sum(axis=(1, 2))
        overlap[shape] = np.mean(common / (template.sum(axis=(1, 2)) + area[:, 0, 0] - common))
    best = max(overlap, key=overlap.__getitem__)
    return best if overlap[best] >= SAME_SHAPE else None


def _background_share(planes: np.ndarray, around: np.ndarray, background: str) -> float:
    if not around[:, ::2, ::2].any():
        return 0.0
    palette = np.concatenate([_BACKGROUND_COLORS, _SPRITE_COLORS])
    pixels = planes[..., ::2, ::2][:, around[:, ::2, ::2]]  # a quarter of the pixels is enough
    nearest = ((palette**2).sum(axis=1)[:, None] - 2 * palette @ pixels).argmin(axis=0)
    return float(np.mean(nearest == list(BACKGROUNDS).index(background)))


def _background_steadiness(planes: np.ndarray, around: np.ndarray) -> float:
    both = around[1:] & around[:-1]
    if not both.any():
        return 0.0
    change = np.abs(np.diff(planes, axis=1)).mean(axis=0)[both].mean() / 255
    return _ramp(float(change), FLICKER_RANGE, 0)


def _sprite_steadiness(track: _Track, clean: np.ndarray) -> float:
    """Mean over adjacent clean frames: 1 minus the changes of colour and area; 0 where the blob appears or vanishes."""
    seen = track.visible
    pairs = clean[1:] & clean[:-1]
    pops = (clean[1:] & ~seen[:-1]) | (clean[:-1] & ~seen[1:])
    if not (pairs | pops).any():
        return 0.0
    color = np.abs(np.diff(track.color, axis=0))[pairs].mean(axis=1) / 255
    area = np.abs(np.diff(track.area))[pairs] / track.area[seen].mean()
    steady = np.clip(1 - color / FLICKER_RANGE - area, 0, 1)
    return float(steady.sum() / (pairs | pops).sum())
