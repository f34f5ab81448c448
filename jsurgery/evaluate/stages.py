"""evaluate: the same prompts and noise through every stage of the surgery, scored and compared with the teacher."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.data import sprites
from jsurgery.evaluate import sprites_score
from jsurgery.evaluate.video_file import write_video
from jsurgery.runtime.progress import Progress
from jsurgery.runtime.stages import write_json
from jsurgery.surgery.finetune import validation_loss
from jsurgery.surgery.trace import load_prompts
from jsurgery.wan.pipeline import Pipeline, batched
from jsurgery.wan.transformer import WanTransformer

CALIBRATION_CLIPS = 48


def evaluate(
    config: ConfigDict,
    pipeline: Pipeline,
    models: dict[str, Callable[[], WanTransformer]],
    validation_latents: epath.Path | None,
    folder: epath.Path,
) -> None:
    """Leaves `evaluation.json` and, for the report, `videos/NAME/0000.mp4` in `folder`.

    `models` maps a name to what loads it, "teacher" first: distances are to its latents and videos at equal noise. A
    model that was sampled already (its file is there) is not sampled again.
    """
    prompts = load_prompts(config, config.evaluate.prompts, skip=config.trace.prompts)
    teacher_latents, results = None, {}
    measured = config.prompts == "sprites"
    reference = calibrate_sprites(config, pipeline) if measured else None
    for name, load in models.items():
        file = folder / f"{name}.json"
        samples = folder / f"{name}.npy"
        if file.exists() and samples.exists():
            results[name], latents = json.loads(file.read_text()), np.load(samples)
        else:
            pipeline.transformer = load()
            latents, videos = sample_all(config, pipeline, prompts, name)
            result: dict[str, Any] = {}
            if validation_latents is not None:
                result["validation_loss"] = validation_loss(config, pipeline.transformer, pipeline, validation_latents)
            if measured:
                per_clip = sprites_score.score(videos, prompts)
                result["per_clip"] = {dimension: values.tolist() for dimension, values in per_clip.items()}
            for number in range(min(config.evaluate.videos, len(videos))):
                write_video(folder / "videos" / name / f"{number:04d}.mp4", videos[number], config.video.fps)
            np.save(samples, latents)
            write_json(file, result)
            results[name] = result
        if teacher_latents is None:
            teacher_latents = latents
        distance = np.sqrt(np.mean((latents - teacher_latents) ** 2, axis=(1, 2, 3, 4)))
        results[name]["latent_rmse"] = distance.tolist()
        if reference is not None:
            per_clip = {dimension: np.array(values) for dimension, values in results[name]["per_clip"].items()}
            rng = np.random.default_rng(config.seed)
            results[name]["score"] = sprites_score.summarize(per_clip, *reference, rng)
    write_json(folder / "evaluation.json", {"prompts": prompts, "models": results})


def sample_all(config: ConfigDict, pipeline: Pipeline, prompts: list[str], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(latents, videos uint8) of every prompt."""
    latents, videos, progress = [], [], Progress(f"sample {name}", len(prompts))
    for first, batch in batched(prompts, config.evaluate.batch):
        drawn = pipeline.sample(batch, config, seed=config.seed, first=first)[0]
        latents.append(np.asarray(drawn))
        videos.append(pipeline.decode(drawn))
        progress.show(first + len(batch), last=first + len(batch) == len(prompts))
    return np.concatenate(latents), np.concatenate(videos)


def calibrate_sprites(config: ConfigDict, pipeline: Pipeline) -> tuple[dict[str, float], dict[str, float]]:
    """What real clips score after the VAE's round trip, and what they score under shuffled captions."""
    video = config.video
    scenes = [
        sprites.scene_at(config.seed + 2, i, two_sprites=config.data.two_sprites) for i in range(CALIBRATION_CLIPS)
    ]
    clips = [sprites.render(scene, video.frames, video.height, video.width) for scene in scenes]

    def round_trip(clip: np.ndarray) -> np.ndarray:
        return pipeline.decode(pipeline.encode(sprites.to_float(clip)[None]))[0]

    return sprites_score.calibrate(clips, [scene.caption for scene in scenes], np.random.default_rng(0), round_trip)
