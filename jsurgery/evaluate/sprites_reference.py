"""The two reference points of the sprites score: real clips after the VAE's encoder and decoder, and chance.

Both depend only on the VAE, the video's size, the probability of two sprites, and the seed. The package holds them for
the bundled VAE and the demo's seeds. For anything else they are measured, which takes a minute or two.

    python -m jsurgery.evaluate.sprites_reference 0 1 2     # measures these seeds of `tiny` and updates the package
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.data import sprites
from jsurgery.evaluate import sprites_score
from jsurgery.io.files import write_json
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.load_config import load_config
from jsurgery.runtime.progress import Progress
from jsurgery.wan.model_folder import model_path, pipeline_folder
from jsurgery.wan.pipeline import Pipeline, batched, load_pipeline

PACKAGED = pathlib.Path(__file__).parents[1] / "assets" / "sprites_references.json"
CALIBRATION_CLIPS = 48
ENCODED_AT_ONCE = 4  # as `encode_sprites` does, so that the compiled encoder is the same
Reference = tuple[dict[str, float], dict[str, float]]  # (upper, chance), by dimension


def sprites_reference(config: ConfigDict, pipeline: Pipeline, file: epath.Path) -> Reference:
    """(upper, chance): from `file`, else from the package, else measured; `file` holds them afterwards."""
    if not file.exists():
        write_json(file, packaged_reference(config) or calibrate_sprites(config, pipeline))
    upper, chance = json.loads(file.read_text())
    return upper, chance


def packaged_reference(config: ConfigDict, clips: int = CALIBRATION_CLIPS) -> Reference | None:
    """The package's reference for this config; None if it has none."""
    settings = reference_settings(config, clips)
    for entry in json.loads(PACKAGED.read_text()):
        if all(entry[name] == value for name, value in settings.items()):
            return entry["upper"], entry["chance"]
    return None


def reference_settings(config: ConfigDict, clips: int) -> dict[str, Any]:
    """Everything a reference depends on, except the code of `sprites` and `sprites_score`; a test checks that."""
    size = {name: config.video[name] for name in ("frames", "height", "width")}
    vae = folder_fingerprint(pipeline_folder(model_path(config.model.path)) / "vae")
    return {"vae": vae, **size, "two_sprites": config.data.two_sprites, "seed": config.seed, "clips": clips}


def calibrate_sprites(config: ConfigDict, pipeline: Pipeline, clips: int = CALIBRATION_CLIPS) -> Reference:
    """Mean scores of `clips` real clips after the VAE's round trip: with their own captions, and with shuffled ones."""
    video, progress = config.video, Progress("calibrate the score", clips)
    scenes = [sprites.scene_at(config.seed + 2, i, two_sprites=config.data.two_sprites) for i in range(clips)]
    decoded = []
    for first, batch in batched(scenes, ENCODED_AT_ONCE):
        real = np.stack([sprites.render(scene, video.frames, video.height, video.width) for scene in batch])
        decoded += list(pipeline.decode(pipeline.encode(sprites.to_float(real))))
        progress.show(first + len(batch), last=first + len(batch) == clips)
    return sprites_score.calibrate(decoded, [scene.caption for scene in scenes], np.random.default_rng(0))


def main(seeds: list[str]) -> None:
    entries = json.loads(PACKAGED.read_text()) if PACKAGED.exists() else []
    for seed, clips in [("0", 2), *((seed, CALIBRATION_CLIPS) for seed in seeds)]:
        config = load_config("tiny", {"seed": seed})
        settings = reference_settings(config, clips)
        entries = [entry for entry in entries if any(entry[name] != value for name, value in settings.items())]
        upper, chance = calibrate_sprites(config, load_pipeline(config.model.path), clips)
        entries.append({**settings, "upper": upper, "chance": chance})
        write_json(epath.Path(PACKAGED), entries)


if __name__ == "__main__":
    main(sys.argv[1:])
