"""evaluate: the same prompts and noise through every stage of the surgery, scored and compared with the teacher."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.data.prompts import load_prompts
from jsurgery.data.video_writer import write_video
from jsurgery.evaluate import sprites_score
from jsurgery.evaluate.sprites_reference import sprites_reference
from jsurgery.io.files import save_array, write_json
from jsurgery.runtime.progress import Progress
from jsurgery.surgery.finetune import validation_loss
from jsurgery.wan.pipeline import Pipeline, batched
from jsurgery.wan.transformer import WanTransformer


def evaluate(
    config: ConfigDict,
    pipeline: Pipeline,
    models: dict[str, Callable[[], WanTransformer]],
    validation_latents: epath.Path | None,
    folder: epath.Path,
) -> None:
    """Leaves `evaluation.json`, and what `measure_models` does, in `folder`."""
    results = measure_models(config, pipeline, models, validation_latents, folder)
    write_json(folder / "evaluation.json", {"prompts": evaluation_prompts(config), "models": results})


def evaluation_prompts(config: ConfigDict) -> list[str]:
    return load_prompts(config, config.evaluate.prompts, skip=config.trace.prompts)


def measure_models(
    config: ConfigDict,
    pipeline: Pipeline,
    models: Mapping[str, Callable[[], WanTransformer]],
    validation_latents: epath.Path | None,
    folder: epath.Path,
    shares: Mapping[str, range] | None = None,
) -> dict[str, dict[str, Any]]:
    """What was measured of every model's samples, by name; leaves it, and for the report `videos/NAME/0000.mp4`, too.

    `models` maps a name to what loads it, the teacher first: distances are to its latents at equal noise. A model that
    was measured already (NAME.json is there) is not loaded. `shares` names the prompts of models that are not sampled
    on all of them.
    """
    prompts, teacher = evaluation_prompts(config), next(iter(models))
    sprites = config.prompts == "sprites"
    reference = sprites_reference(config, pipeline, folder / "reference.json") if sprites else None
    shares = {name: (shares or {}).get(name, range(len(prompts))) for name in models}
    for name, load in models.items():
        file, share = folder / f"{name}.json", shares[name]
        if file.exists():
            continue
        teacher_file = folder / f"{teacher}.npy"
        if name != teacher and not teacher_file.exists():
            pipeline = dataclasses.replace(pipeline, transformer=models[teacher]())
            save_array(teacher_file, sample_all(config, pipeline, prompts, teacher, shares[teacher])[0])
        pipeline = dataclasses.replace(pipeline, transformer=load())
        latents, videos = sample_all(config, pipeline, prompts, name, share)
        if name == teacher:
            save_array(teacher_file, latents)
        difference = latents - np.load(teacher_file)[share.start : share.stop]
        result: dict[str, Any] = {"latent_rmse": np.sqrt(np.mean(difference**2, axis=(1, 2, 3, 4))).tolist()}
        if validation_latents is not None:
            result["validation_loss"] = validation_loss(config, pipeline.transformer, pipeline, validation_latents)
        if sprites:
            per_clip = sprites_score.score(videos, prompts[share.start : share.stop])
            result["per_clip"] = {dimension: values.tolist() for dimension, values in per_clip.items()}
        for number in range(min(config.evaluate.videos, len(videos))):
            write_video(folder / "videos" / name / f"{number:04d}.mp4", videos[number], config.video.fps)
        write_json(file, result, indent=None)
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in models}
    if reference is not None:
        for result in results.values():
            per_clip = {dimension: np.array(values) for dimension, values in result["per_clip"].items()}
            result["score"] = sprites_score.summarize(per_clip, *reference, np.random.default_rng(config.seed))
    return results


def sample_all(
    config: ConfigDict, pipeline: Pipeline, prompts: Sequence[str], name: str, share: range
) -> tuple[np.ndarray, np.ndarray]:
    """(latents, videos uint8) of the prompts of a share; a prompt's noise is the same in any."""
    latents, videos, progress = [], [], Progress(f"sample {name}", len(share))
    for first, batch in batched(prompts[share.start : share.stop], config.evaluate.batch):
        drawn = pipeline.sample(batch, config, seed=config.seed, first=share.start + first)[0]
        latents.append(np.asarray(drawn))
        videos.append(pipeline.decode(drawn))
        progress.show(first + len(batch), last=first + len(batch) == len(share))
    return np.concatenate(latents), np.concatenate(videos)
