import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from jsurgery.data import sprites
from jsurgery.data.sprites import Scene, Sprite
from jsurgery.errors import InputError
from jsurgery.evaluate import sprites_score
from jsurgery.evaluate.sprites_score import DIMENSIONS, measure, score

SCENES = [sprites.scene_at(5, index, two_sprites=0.4) for index in range(150)]
CAPTIONS = [scene.caption for scene in SCENES]
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
CIRCLE = Sprite("circle", "red", "left", 0.34, 0.5, (0.4, 0.6))


@pytest.fixture(scope="module")
def videos():
    return [sprites.render(scene) for scene in SCENES]


@pytest.fixture(scope="module")
def real_scores(videos):
    return score(videos, CAPTIONS)


def means(per_clip):
    return {dimension: values.mean() for dimension, values in per_clip.items()}


def degrade(video, rng, sigma):
    """Blur, noise and a colour shift, as a small VAE causes them."""
    blurred = ndimage.gaussian_filter(sprites.to_float(video), (0, sigma, sigma, 0))
    return blurred + 0.05 * rng.standard_normal(video.shape, np.float32) + np.float32([0.08, -0.06, 0.05])


def other_name(name, names, step=1):
    names = list(names)
    return names[(names.index(name) + step) % len(names)]


def test_rendered_clips_score_near_one(real_scores):
    pairs = np.array([len(scene.sprites) == 2 for scene in SCENES])
    for dimension in DIMENSIONS:
        assert real_scores[dimension][pairs].mean() >= 0.97 and real_scores[dimension][~pairs].mean() >= 0.97, dimension
        assert real_scores[dimension].min() >= 0 and real_scores[dimension].max() <= 1


def test_blur_noise_and_a_colour_shift_cost_little(videos):
    rng = np.random.default_rng(0)
    degraded = [degrade(video, rng, 2) for video in videos[:24]]
    assert min(means(score(degraded, CAPTIONS[:24])).values()) >= 0.9


@pytest.mark.parametrize("degraded", [False, True])
def test_clips_of_small_and_odd_sizes_score_high(degraded):
    rng = np.random.default_rng(1)
    for frames, height, width in ((9, 96, 80), (5, 101, 75)):
        clips = [sprites.render(scene, frames, height, width) for scene in SCENES[:25]]
        if degraded:
            clips = [degrade(clip, rng, 1) for clip in clips]
        found = means(score(clips, CAPTIONS[:25]))
        assert min(found.values()) >= (0.9 if degraded else 0.96), found


@pytest.mark.parametrize("dimension", ["color", "shape", "direction", "background"])
def test_a_wrong_word_lowers_only_its_own_dimension(videos, dimension):
    for index in range(12):
        scene = SCENES[index]
        first, rest = scene.sprites[0], scene.sprites[1:]
        if dimension == "background":
            wrong = replace(scene, background=other_name(scene.background, sprites.BACKGROUNDS))
        elif dimension == "color":
            free = next(c for c in sprites.COLORS if c not in [s.color for s in scene.sprites])
            wrong = replace(scene, sprites=(replace(first, color=free), *rest))
        elif dimension == "shape":
            wrong = replace(scene, sprites=(replace(first, shape=other_name(first.shape, sprites.SHAPES)), *rest))
        else:
            wrong = replace(scene, sprites=(replace(first, direction=OPPOSITE.get(first.direction, "still")), *rest))
            if first.direction == "still":
                continue
        found = measure(videos[index], wrong.caption)
        expected = 0.0 if len(scene.sprites) == 1 or dimension in ("background", "color") else 0.5
        assert found.pop(dimension) == pytest.approx(expected, abs=0.02), wrong.caption
        assert min(found.values()) >= 0.9, (wrong.caption, found)


def test_reversed_and_frozen_clips_lose_direction_and_motion(videos):
    moving = [i for i in range(60) if all(s.direction != "still" for s in SCENES[i].sprites)][:12]
    reversed_clips = means(score([videos[i][::-1] for i in moving], [CAPTIONS[i] for i in moving]))
    assert reversed_clips.pop("direction") == 0
    assert min(reversed_clips.values()) >= 0.97
    frozen = means(score([videos[i][:1].repeat(17, axis=0) for i in moving], [CAPTIONS[i] for i in moving]))
    assert frozen["motion"] < 0.05 and frozen["direction"] < 0.05
    assert frozen["background"] >= 0.97 and frozen["flicker"] >= 0.97


def test_the_motion_score_grows_with_the_path_of_the_sprite():
    clips = {travel: sprites.render(Scene((replace(CIRCLE, travel=travel),), "grey")) for travel in (0.06, 0.2, 0.5)}
    found = {travel: measure(clip, Scene((CIRCLE,), "grey").caption) for travel, clip in clips.items()}
    assert found[0.06]["motion"] < 0.2 and found[0.2]["motion"] == pytest.approx(0.5, abs=0.05)
    assert found[0.5]["motion"] == 1
    assert found[0.06]["direction"] == 0 and found[0.2]["direction"] == 1
    assert measure(clips[0.5], "a red circle stays still over a grey background")["motion"] == 0


def test_noise_and_brightness_changes_lower_only_flicker(videos, real_scores):
    rng = np.random.default_rng(2)
    clean = [sprites.to_float(video) for video in videos[:10]]
    flickering = {
        "noise": [clip + 0.3 * rng.standard_normal(clip.shape, np.float32) for clip in clean],
        "brightness": [clip + rng.normal(0, 0.15, (17, 1, 1, 1)) for clip in clean],
    }
    for name, clips in flickering.items():
        found = means(score(clips, CAPTIONS[:10]))
        assert found.pop("flicker") < real_scores["flicker"].mean() - 0.1, name
        assert min(found.values()) >= 0.9, (name, found)


def test_a_sprite_that_comes_and_goes_flickers():
    clip = sprites.render(Scene((CIRCLE,), "grey"))
    clip[1::2] = sprites.BACKGROUNDS["grey"]
    found = measure(clip, Scene((CIRCLE,), "grey").caption)
    assert found["flicker"] == pytest.approx(0.5) and found["direction"] == 1


def test_crossing_sprites_score_high():
    first = Sprite("triangle", "red", "right", 0.3, 0.6, (0.5, 0.5))
    for second in (
        Sprite("circle", "blue", "left", 0.3, 0.6, (0.5, 0.5)),
        Sprite("square", "pink", "down", 0.3, 0.6, (0.5, 0.8)),
        Sprite("circle", "cyan", "down", 0.26, 0.6, (0.5, 0.1)),  # crosses the path at another time
        Sprite("square", "green", "still", 0.3, 0.0, (0.0, 0.5)),
    ):
        for background in sprites.BACKGROUNDS:
            scene = Scene((first, second), background)
            assert min(measure(sprites.render(scene), scene.caption).values()) >= 0.95, scene.caption


def test_missing_and_extra_sprites_lower_color(videos):
    pair = next(i for i in range(150) if len(SCENES[i].sprites) == 2)
    first_alone = Scene(SCENES[pair].sprites[:1], SCENES[pair].background)
    missing = measure(sprites.render(first_alone), CAPTIONS[pair])
    assert missing["color"] == missing["shape"] == missing["direction"] == 0.5
    assert measure(videos[pair], first_alone.caption)["color"] < 0.2


def test_blank_and_random_videos_score_low():
    rng = np.random.default_rng(3)
    blank = np.full((17, 192, 160, 3), 128, np.uint8)
    noise = rng.uniform(-1, 1, (17, 192, 160, 3))
    caption = Scene((CIRCLE,), "grey").caption
    found = measure(blank, caption)
    assert found["color"] == found["shape"] == found["direction"] == found["motion"] == 0 and found["background"] == 1
    assert np.mean(list(found.values())) <= 0.3
    assert np.mean(list(measure(noise, caption).values())) <= 0.2


def test_calibration_by_real_clips_and_chance(videos, real_scores):
    single = [i for i, scene in enumerate(SCENES) if len(scene.sprites) == 1][:60]
    clips, captions = [videos[i] for i in single], [CAPTIONS[i] for i in single]
    upper, chance = sprites_score.calibrate(clips, captions, np.random.default_rng(4))
    assert upper == pytest.approx({d: real_scores[d][single].mean() for d in DIMENSIONS})
    for dimension, expected in {"color": 1 / 6, "shape": 1 / 3, "direction": 1 / 5, "background": 1 / 4}.items():
        assert chance[dimension] == pytest.approx(expected, abs=0.15), dimension
    assert chance["flicker"] == 0

    summary = sprites_score.summarize(real_scores, upper, chance, np.random.default_rng(5))
    assert list(summary) == [*DIMENSIONS, "total"]
    assert summary["total"]["mean"] == pytest.approx(np.mean([real_scores[d].mean() for d in DIMENSIONS]))
    for row in summary.values():
        assert row["low"] <= row["mean"] <= row["high"]
        assert row["normalized"] == pytest.approx(1, abs=0.03)


def test_the_bootstrap_interval_equals_the_normal_interval_of_a_mean():
    rng = np.random.default_rng(6)
    per_clip = {dimension: rng.random(400) for dimension in DIMENSIONS}
    summary = sprites_score.summarize(per_clip, dict.fromkeys(DIMENSIONS, 1.0), dict.fromkeys(DIMENSIONS, 0.5), rng)
    for dimension in DIMENSIONS:
        half = 1.96 * per_clip[dimension].std() / 20
        row = summary[dimension]
        assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.1)
        assert row["normalized"] == pytest.approx(2 * row["mean"] - 1)


def test_no_normalized_score_where_real_clips_score_as_chance():
    per_clip = {dimension: np.linspace(0, 1, 5) for dimension in DIMENSIONS}
    same = dict.fromkeys(DIMENSIONS, 0.5)
    summary = sprites_score.summarize(per_clip, same | {"color": 1.0}, same, np.random.default_rng(7))
    assert summary["shape"]["normalized"] is None and summary["color"]["normalized"] == pytest.approx(0)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((17, 192, 160), np.uint8), r"found \[17, 192, 160\]"),
        (np.zeros((1, 192, 160, 3), np.uint8), "F >= 2"),
        (np.full((2, 32, 32, 3), np.nan, np.float32), "finite"),
    ],
)
def test_bad_videos_are_refused(video, message):
    with pytest.raises(InputError, match=message):
        measure(video, Scene((CIRCLE,), "grey").caption)
    with pytest.raises(InputError, match="caption"):
        measure(np.zeros((2, 32, 32, 3), np.uint8), "a dog")
