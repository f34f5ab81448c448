"""The reference of the sprites score: packaged for the configs of the demo, measured once for others."""

import json

import pytest

from jsurgery.evaluate.sprites_reference import calibrate_sprites, packaged_reference, sprites_reference
from jsurgery.evaluate.sprites_score import DIMENSIONS
from jsurgery.load_config import load_config
from jsurgery.wan.pipeline import Pipeline, load_pipeline

SIZE = {"video.frames": "5", "video.height": "64", "video.width": "48"}


@pytest.mark.parametrize("seed", range(3))
def test_the_demo_has_a_packaged_reference(seed):
    upper, chance = packaged_reference(load_config("tiny", {"seed": str(seed)}))
    assert list(upper) == list(chance) and all(chance[name] < value <= 1 for name, value in upper.items())


def test_another_vae_size_or_seed_has_no_packaged_reference(tiny_pipeline):
    for other in ({"model.path": str(tiny_pipeline)}, {"video.width": "176"}, {"seed": "77"}):
        assert packaged_reference(load_config("tiny", other)) is None, other


def test_the_packaged_reference_equals_a_measurement():
    """On two clips. Fails if a change to the sprites, the score or the VAE makes the packaged values stale."""
    config = load_config("tiny")
    measured = calibrate_sprites(config, load_pipeline(config.model.path), clips=2)
    for found, expected in zip(measured, packaged_reference(config, clips=2), strict=True):
        assert found == pytest.approx(expected, abs=0.01), "run python -m jsurgery.evaluate.sprites_reference 0 1 2"


def test_the_reference_is_measured_once(tiny_pipeline, tmp_path):
    config = load_config("tiny", SIZE | {"model.path": str(tiny_pipeline)})
    pipeline, file = load_pipeline(config.model.path), tmp_path / "reference.json"
    found = sprites_reference(config, pipeline, file)
    assert json.loads(file.read_text()) == list(found) and len(found[0]) == len(DIMENSIONS)
    without_vae = Pipeline(pipeline.embedder, lambda: pytest.fail("loaded"), lambda: pytest.fail("loaded"))
    assert sprites_reference(config, without_vae, file) == found, "expected it to be read from the file"
