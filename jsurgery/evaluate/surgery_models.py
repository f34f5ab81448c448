"""The stage `evaluate`: samples all models of a surgery from the same prompts and noise, and scores the videos.

With several processes, all sample, each with its part of a model. Then each decodes, shows and scores its share of the
clips, one on each of its devices.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.data.batch_files import BatchFiles
from jsurgery.data.prompts import load_prompts
from jsurgery.data.video_writer import write_video
from jsurgery.evaluate import sprites_score
from jsurgery.evaluate.sprites_reference import sprites_reference
from jsurgery.io.files import load_array, save_array, write_json
from jsurgery.runtime import processes
from jsurgery.runtime.garbage import free_dropped_models
from jsurgery.runtime.mesh import to_host
from jsurgery.runtime.preemption import Preemption
from jsurgery.runtime.progress import Progress
from jsurgery.surgery.finetune import validation_loss
from jsurgery.wan.pipeline import Pipeline
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
    content = {"prompts": evaluation_prompts(config), "models": results}
    processes.on_first(lambda: write_json(folder / "evaluation.json", content))


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

    `models` maps a name to a function that loads the model; one at a time is kept here. The first is the teacher:
    distances are to its latents from the same noise. A model whose NAME.json exists is not loaded, and finished batches
    of the others are not sampled again. `prompt_ranges` gives the prompts of models that are not sampled on all
    prompts. Also writes clips for the report, `videos/NAME/0000.mp4` and so on.
    Raises Terminated or Interrupted after the batch in which a signal came.
    """
    prompts, teacher = evaluation_prompts(config), next(iter(models))
    pipeline.embedder.unpadded([*prompts, config.sampler.negative_prompt], config.text_length)
    if config.prompts == "sprites":
        processes.on_first(lambda: sprites_reference(config, pipeline, folder / "reference.json"))
    ranges = {name: (prompt_ranges or {}).get(name, range(len(prompts))) for name in models}
    teacher_latents = folder / f"{teacher}.npy"
    with Preemption("evaluate") as preemption:
        for name, load in models.items():
            if processes.on_first((folder / f"{name}.json").exists):
                continue
            if name != teacher and not processes.on_first(teacher_latents.exists):
                current = pipeline.with_transformer(models[teacher]())
                files = sample_all(config, current, prompts, f"{teacher}_again", ranges[teacher], folder, preemption)
                processes.on_first(lambda files=files: finish_latents(files, teacher_latents))
                del current
                free_dropped_models()
            current = pipeline.with_transformer(load())
            files = sample_all(config, current, prompts, name, ranges[name], folder, preemption, score=True)
            result: dict[str, Any] = {}
            if validation_latents is not None:
                result["validation_loss"] = validation_loss(config, current.transformer, current, validation_latents)
            finish = lambda name=name, files=files, result=result: finish_model(files, name, teacher_latents, result)
            processes.on_first(finish)
            del current
            free_dropped_models()
    return processes.on_first(lambda: read_results(config, pipeline, list(models), folder))


def sample_all(
    config: ConfigDict,
    pipeline: Pipeline,
    prompts: Sequence[str],
    name: str,
    numbers: range,
    folder: epath.Path,
    preemption: Preemption,
    *,
    score: bool = False,
) -> BatchFiles:
    """Samples the prompts `numbers`, which also seed the noise, in batches that keep the whole mesh busy.

    A record holds `latents` float32 [T, H, W, C] and, with `score`, the clip's scores.
    """
    size = -(-config.evaluate.batch // pipeline.slots) * pipeline.slots
    files = BatchFiles(folder / f"unfinished_{name}", numbers, size)
    finished = processes.on_first(files.finished)
    progress = Progress(f"sample {name}", len(numbers), start=min(len(numbers), len(finished) * size))
    for batch, items in files.batches():
        if batch not in finished:
            texts = [prompts[item] for item in items]
            latents = to_host(pipeline.sample(texts, config, seed=config.seed, first=items.start)[0])
            rows: list[dict[str, float]] = [{} for _ in items]
            if score:
                first = items.start - numbers.start
                rows = show_and_score(config, pipeline, texts, latents, first, folder / "videos" / name)
            records = [
                {"latents": z, **{key: np.float64(value) for key, value in row.items()}}
                for z, row in zip(latents, rows, strict=True)
            ]
            processes.on_first(lambda batch=batch, records=records: files.write(batch, records))
        done = items.stop - numbers.start
        progress.show(done, last=done == len(numbers))
        preemption.should_stop()
        preemption.stop_if_asked()
    return files


def show_and_score(
    config: ConfigDict,
    pipeline: Pipeline,
    texts: Sequence[str],
    latents_BxTxHxWxC: np.ndarray,
    first: int,
    folder: epath.Path,
) -> list[dict[str, float]]:
    """Scores of every clip of a batch; none unless the prompts are those of sprites. Others are only shown.

    The first `config.evaluate.videos` clips of a model are written to `folder`; `first` is the number of the batch's
    first clip. Clips that are neither shown nor scored are not decoded. Each process works on its share.
    """
    scored = config.prompts == "sprites"
    wanted = [row for row in range(len(texts)) if scored or first + row < config.evaluate.videos]
    own = wanted[jax.process_index() :: jax.process_count()]

    def work() -> dict[str, dict[str, float]]:
        found = {}
        for row, video in zip(own, pipeline.decode(latents_BxTxHxWxC[own]) if own else (), strict=True):
            if first + row < config.evaluate.videos:
                write_video(folder / f"{first + row:04d}.mp4", video, config.video.fps)
            found[str(row)] = sprites_score.measure(video, texts[row]) if scored else {}
        return found

    by_row: dict[str, dict[str, float]] = {}
    for found in processes.gather_messages(processes.on_all(work)):
        by_row |= found
    return [by_row.get(str(row), {}) for row in range(len(texts))]


def finish_latents(files: BatchFiles, teacher_latents: epath.Path) -> None:
    save_array(teacher_latents, np.stack([record["latents"] for record in files.records()]))
    files.remove()


def finish_model(files: BatchFiles, name: str, teacher_latents: epath.Path, result: dict[str, Any]) -> None:
    """Writes `NAME.json` of a model whose batches are all finished, and `teacher_latents` if it is the teacher."""
    records = files.records()
    latents = np.stack([record.pop("latents") for record in records])
    if teacher_latents.stem == name:
        save_array(teacher_latents, latents)
    difference = latents - load_array(teacher_latents)[files.items.start : files.items.stop]
    result["latent_rmse"] = np.sqrt(np.mean(difference**2, axis=(1, 2, 3, 4))).tolist()
    if records[0]:
        result["per_clip"] = {
            dimension: [float(record[dimension]) for record in records] for dimension in sprites_score.DIMENSIONS
        }
    write_json(teacher_latents.with_name(f"{name}.json"), result, indent=None)
    files.remove()


def read_results(
    config: ConfigDict, pipeline: Pipeline, names: Sequence[str], folder: epath.Path
) -> dict[str, dict[str, Any]]:
    """The measurements of all models, with the sprites score of each, its bounds and its interval."""
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    if config.prompts == "sprites":
        reference = sprites_reference(config, pipeline, folder / "reference.json")
        for result in results.values():
            per_clip = {dimension: np.array(values) for dimension, values in result["per_clip"].items()}
            result["score"] = sprites_score.summarize(per_clip, *reference, np.random.default_rng(config.seed))
    return results
