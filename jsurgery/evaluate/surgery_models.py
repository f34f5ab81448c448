"""The stage `evaluate`: samples all models of a surgery from the same prompts and noise, and scores the videos."""

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
from jsurgery.io.files import load_array, save_array, write_json
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
    """Runs `measure_models` and writes its results to `evaluation.json`, all in `folder`."""
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
    prompt_ranges: Mapping[str, range] | None = None,
) -> dict[str, dict[str, Any]]:
    """Samples and scores models; returns the measurements by name and writes them to NAME.json in `folder`.

    `models` maps a name to a function that loads the model. The first is the teacher: distances are to its latents from
    the same noise. A model whose NAME.json exists is not loaded. `prompt_ranges` gives the prompts of models that are
    not sampled on all prompts. Also writes clips for the report, `videos/NAME/0000.mp4` and so on.
    """
    prompts, teacher = evaluation_prompts(config), next(iter(models))
    pipeline.embedder.unpadded([*prompts, config.sampler.negative_prompt], config.text_length)
    sprites = config.prompts == "sprites"
    reference = sprites_reference(config, pipeline, folder / "reference.json") if sprites else None
    ranges = {name: (prompt_ranges or {}).get(name, range(len(prompts))) for name in models}
    for name, load in models.items():
        file, numbers = folder / f"{name}.json", ranges[name]
        if file.exists():
            continue
        teacher_file = folder / f"{teacher}.npy"
        if name != teacher and not teacher_file.exists():
            pipeline = pipeline.with_transformer(models[teacher]())
            save_array(teacher_file, sample_all(config, pipeline, prompts, teacher, ranges[teacher])[0])
        pipeline = pipeline.with_transformer(load())
        latents, videos = sample_all(config, pipeline, prompts, name, numbers)
        if name == teacher:
            save_array(teacher_file, latents)
        difference = latents - load_array(teacher_file)[numbers.start : numbers.stop]
        result: dict[str, Any] = {"latent_rmse": np.sqrt(np.mean(difference**2, axis=(1, 2, 3, 4))).tolist()}
        if validation_latents is not None:
            result["validation_loss"] = validation_loss(config, pipeline.transformer, pipeline, validation_latents)
        if sprites:
            per_clip = sprites_score.score(videos, prompts[numbers.start : numbers.stop])
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
    config: ConfigDict, pipeline: Pipeline, prompts: Sequence[str], name: str, numbers: range
) -> tuple[np.ndarray, np.ndarray]:
    """(latents [N, T, H, W, C], uint8 videos [N, F, H, W, 3]) of the prompts `numbers`, which also seed the noise."""
    latents, videos, progress = [], [], Progress(f"sample {name}", len(numbers))
    for first, batch in batched(prompts[numbers.start : numbers.stop], config.evaluate.batch):
        batch_latents = pipeline.sample(batch, config, seed=config.seed, first=numbers.start + first)[0]
        latents.append(np.asarray(batch_latents))
        videos.append(pipeline.decode(batch_latents))
        progress.show(first + len(batch), last=first + len(batch) == len(numbers))
    return np.concatenate(latents), np.concatenate(videos)
