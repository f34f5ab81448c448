import numpy as np
import pytest

from jsurgery.data import sprites
from jsurgery.data.sprites import Scene, Sprite
from jsurgery.errors import InputError

SCENES = [sprites.scene_at(3, index, two_sprites=0.5) for index in range(200)]


def of_color(frame, color, tolerance=4):
    return (np.abs(frame.astype(int) - sprites.COLORS[color]) <= tolerance).all(-1)


def test_captions_have_the_documented_form():
    circle = Sprite("circle", "red", "left", 0.3, 0.5, (0.5, 0.5))
    square = Sprite("square", "blue", "still", 0.3, 0.0, (0.5, 0.5))
    assert Scene((circle,), "grey").caption == "a red circle moves left over a grey background"
    assert Scene((square,), "black").caption == "a blue square stays still over a black background"
    both = "a red circle moves left and a blue square stays still over a white background"
    assert Scene((circle, square), "white").caption == both


def test_parsing_a_caption_gives_its_scene():
    captions = sprites.all_captions()
    assert len(set(captions)) == len(captions) == 6 * 3 * 5 * 4 + 6 * 5 * 3**2 * 5**2 * 4
    for scene in SCENES:
        assert scene.caption in captions
        parsed = [(s.color, s.shape, s.direction) for s in scene.sprites]
        assert sprites.parse_caption(scene.caption) == (parsed, scene.background)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a red circle moves left",
        "a red circle moves sideways over a grey background",
        "a red circle moves still over a grey background",
        "a purple circle moves left over a grey background",
        "a red circle moves left over a grey background.",
        "a red circle moves left and a red square moves up over a grey background",
        "a red circle moves left and a blue square moves up and a cyan square moves up over a grey background",
    ],
)
def test_text_of_another_form_is_refused(text):
    with pytest.raises(InputError, match="caption: expected"):
        sprites.parse_caption(text)


def test_a_scene_depends_on_its_index_and_seed_alone():
    assert sprites.scene_at(3, 7, two_sprites=0.5) == SCENES[7]
    assert len({repr(scene) for scene in SCENES}) == len(SCENES)
    assert sprites.scene_at(4, 7, two_sprites=0.5) != SCENES[7]


def test_sampled_attributes_are_uniform_and_in_range():
    all_sprites = [s for scene in SCENES for s in scene.sprites]
    for attribute, names in (("color", sprites.COLORS), ("shape", sprites.SHAPES), ("direction", sprites.DIRECTIONS)):
        counts = [sum(getattr(s, attribute) == name for s in all_sprites) for name in names]
        assert min(counts) > 0.5 * len(all_sprites) / len(names)
    assert 70 < sum(len(scene.sprites) == 2 for scene in SCENES) < 130
    assert all(0.45 <= s.travel <= 0.6 for s in all_sprites if s.direction != "still")
    assert all(0.30 <= scene.sprites[0].size <= 0.38 for scene in SCENES if len(scene.sprites) == 1)
    pairs = [scene.sprites for scene in SCENES if len(scene.sprites) == 2]
    assert all(0.26 <= s.size <= 0.32 for pair in pairs for s in pair)
    assert all(a.color != b.color for a, b in pairs)


@pytest.mark.parametrize(("frames", "height", "width"), [(17, 192, 160), (9, 96, 80), (5, 47, 101)])
def test_sprites_stay_inside_and_move_as_the_caption_says(frames, height, width):
    for scene in SCENES[:60]:
        for sprite in scene.sprites:
            centers = sprite.centers(frames, height, width)
            radius = sprite.diameter(height, width) / 2
            assert (centers >= radius - 1e-9).all() and (
                centers <= [height - radius + 1e-9, width - radius + 1e-9]
            ).all()
            np.testing.assert_allclose(np.diff(centers, 2, axis=0), 0, atol=1e-9)
        sprite = scene.sprites[-1]
        video = sprites.render(scene, frames, height, width)
        assert video.shape == (frames, height, width, 3) and video.dtype == np.uint8
        first, last = (np.argwhere(of_color(frame, sprite.color)).mean(axis=0) for frame in video[[0, -1]])
        expected = np.array(sprites.DIRECTIONS[sprite.direction]) * sprite.travel * [height, width]
        np.testing.assert_allclose(last - first, expected, atol=1)


@pytest.mark.parametrize("shape", sprites.SHAPES)
def test_coverage_matches_supersampling(shape):
    side, diameter, fine = 31, 22.3, 16
    grid = (np.arange(side * fine) + 0.5) / fine - 15.2
    y, x = grid[:, None], grid[None, :]
    radius = diameter / 2
    inside = {
        "circle": y**2 + x**2 <= radius**2,
        "square": (abs(y) <= radius) & (abs(x) <= radius),
        "triangle": (y <= radius) & (abs(x) <= (y + radius) / 2),
    }[shape]
    expected = inside.reshape(side, fine, side, fine).mean(axis=(1, 3))
    grid = np.arange(side) + 0.5 - 15.2
    found = sprites.coverage(shape, grid[:, None], grid[None, :], diameter)
    assert np.abs(found - expected).max() < 0.3  # at a corner
    assert np.abs(found - expected).mean() < 0.003
    assert abs(found.sum() / expected.sum() - 1) < 0.01


def test_the_sprite_mentioned_last_lies_on_top():
    first = Sprite("square", "red", "right", 0.3, 0.6, (0.5, 0.5))
    last = Sprite("square", "blue", "left", 0.3, 0.6, (0.5, 0.5))
    middle = sprites.render(Scene((first, last), "white"))[8]
    assert of_color(middle, "blue").sum() > 40**2 and not of_color(middle, "red").any()
    swapped = sprites.render(Scene((last, first), "white"))[8]
    assert of_color(swapped, "red").sum() > 40**2 and not of_color(swapped, "blue").any()


def test_a_sprite_is_hidden_in_some_frames_but_not_most():
    hidden = []
    for scene in SCENES[:80]:
        if len(scene.sprites) == 2:
            color = scene.sprites[0].color
            alone = sprites.render(Scene(scene.sprites[:1], scene.background), 9)
            both = sprites.render(scene, 9)
            pixels = [[of_color(frame, color).sum() for frame in video] for video in (alone, both)]
            hidden.append(np.mean(np.greater(*pixels)))
    assert max(hidden) <= 0.6 and sum(share > 0 for share in hidden) >= 5


def test_float_videos_convert_back_exactly():
    video = sprites.render(SCENES[0], 5, 48, 32)
    as_float = sprites.to_float(video)
    assert as_float.dtype == np.float32 and as_float.min() >= -1 and as_float.max() <= 1
    np.testing.assert_array_equal(sprites.to_uint8(as_float), video)
    np.testing.assert_array_equal(sprites.to_uint8(np.array([-2.0, 2.0])), [0, 255])
