"""What the sprites score is measured against: what real clips score after the VAE's round trip, and what chance does.

Both depend on the VAE, the video's size, the share of clips with two sprites and the seed alone. For the bundled VAE
and the seeds of the demo they are kept with the package; for anything else they are measured, a minute or two.

    python -m jsurgery.evaluate.sprites_reference 0 1 2     # measures these seeds of config `tiny` anew and keeps them
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

KEPT = pathlib.Path(__file__).parents[1] / "assets" / "sprites_references.json"  # no part of the teacher's own folder
CALIBRATION_CLIPS = 48
ENCODED_AT_ONCE = 4  # as `encode_sprites` does, so that the compiled encoder is the same
Reference = tuple[dict[str, float], dict[str, float]]  # (upper, chance), by dimension


def sprites_reference(config: ConfigDict, pipeline: Pipeline, file: epath.Path) -> Reference:
    """(upper, chance): from `file`, which gets them, from what is kept with the package, or measured now."""
    if not file.exists():
        write_json(file, kept(config) or calibrate_sprites(config, pipeline))
    upper, chance = json.loads(file.read_text())
    return upper, chance


def kept(config: ConfigDict, clips: int = CALIBRATION_CLIPS) -> Reference | None:
    """What the package has for this config; None where the VAE, the size, the share or the seed is another."""
    wanted = described(config, clips)
    for entry in json.loads(KEPT.read_text()):
        if all(entry[name] == value for name, value in wanted.items()):
            return entry["upper"], entry["chance"]
    return None


def described(config: ConfigDict, clips: int) -> dict[str, Any]:
    """All that a reference depends on but the code of `sprites` and `sprites_score`, which a test watches."""
    size = {name: config.video[name] for name in ("frames", "height", "width")}
    vae = folder_fingerprint(pipeline_folder(model_path(config.model.path)) / "vae")
    return {"vae": vae, **size, "two_sprites": config.data.two_sprites, "seed": config.seed, "clips": clips}


def calibrate_sprites(config: ConfigDict, pipeline: Pipeline, clips: int = CALIBRATION_CLIPS) -> Reference:
    """What `clips` real clips score after the VAE's round trip, and what they score under shuffled captions."""
    video, progress = config.video, Progress("calibrate the score", clips)
    scenes = [sprites.scene_at(config.seed + 2, i, two_sprites=config.data.two_sprites) for i in range(clips)]
    seen = []
    for first, batch in batched(scenes, ENCODED_AT_ONCE):
        real = np.stack([sprites.render(scene, video.frames, video.height, video.width) for scene in batch])
        seen += list(pipeline.decode(pipeline.encode(sprites.to_float(real))))
        progress.show(first + len(batch), last=first + len(batch) == clips)
    return sprites_score.calibrate(seen, [scene.caption for scene in scenes], np.random.default_rng(0))


def main(seeds: list[str]) -> None:
    entries = json.loads(KEPT.read_text()) if KEPT.exists() else []
    for seed, clips in [("0", 2), *((seed, CALIBRATION_CLIPS) for seed in seeds)]:
        config = load_config("tiny", {"seed": seed})
        wanted = described(config, clips)
        entries = [entry for entry in entries if any(entry[name] != value for name, value in wanted.items())]
        upper, chance = calibrate_sprites(config, load_pipeline(config.model.path), clips)
        entries.append({**wanted, "upper": upper, "chance": chance})
        write_json(epath.Path(KEPT), entries)


if __name__ == "__main__":
    main(sys.argv[1:])
