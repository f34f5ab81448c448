"""The stage `evaluate`: samples all models of a surgery from the same prompts and noise, and scores the videos.

With several processes, all sample, each with its part of a model; then each decodes, shows and scores its share of the
clips, one on each of its devices.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.data.batch_files import BatchFiles
from jsurgery.data.prompts import load_prompts
from jsurgery.data.shards import Record
from jsurgery.data.video_writer import write_video
from jsurgery.evaluate import sprites_score
from jsurgery.evaluate.sprites_reference import sprites_reference
from jsurgery.io.files import load_array, save_array, write_json
from jsurgery.runtime import processes
from jsurgery.runtime.garbage import free_dropped_models
from jsurgery.runtime.machine import describe_machine
from jsurgery.runtime.mesh import to_host
from jsurgery.runtime.preemption import Preemption
from jsurgery.runtime.progress import Progress
from jsurgery.surgery.finetune import validation_loss
from jsurgery.wan.pipeline import Pipeline
from jsurgery.wan.transformer import WanTransformer

SPEED = "speed"  # folder of NAME.json: the seconds of a sampling step of each model


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
    pipeline.embedder.forget()  # so that a resumed run computes the same bits
    pipeline.embedder.unpadded([*prompts, config.sampler.negative_prompt], config.text_length)
    if config.prompts == "sprites":
        processes.on_first(lambda: sprites_reference(config, pipeline, folder / "reference.json"))
    ranges = {name: (prompt_ranges or {}).get(name, range(len(prompts))) for name in models}
    teacher_latents = folder / f"{teacher}.npy"
    with Preemption("evaluate") as preemption:
        for name, load in models.items():
            if processes.on_first(functools.partial(is_finished, folder, name)):
                continue
            if name != teacher and not processes.on_first(teacher_latents.exists):
                current = pipeline.with_transformer(models[teacher]())
                files = sample_all(config, current, prompts, f"{teacher}_again", ranges[teacher], folder, preemption)
                processes.on_first(functools.partial(finish_latents, files, teacher_latents))
                del current
                free_dropped_models()
            current, numbers = pipeline.with_transformer(load()), ranges[name]
            files = sample_all(config, current, prompts, name, numbers, folder, preemption)
            scores = show_and_score(config, current, prompts, files, name, folder, preemption)
            result: dict[str, Any] = {}
            if validation_latents is not None:
                result["validation_loss"] = validation_loss(config, current.transformer, current, validation_latents)
            processes.on_first(functools.partial(finish_model, files, scores, name, teacher_latents, result))
            del current
            free_dropped_models()
    return processes.on_first(lambda: read_results(config, pipeline, list(models), folder))


def is_finished(folder: epath.Path, name: str) -> bool:
    """Whether a model has its results. If it has, batches that a killed run had no time to remove are removed."""
    finished = (folder / f"{name}.json").exists()
    if finished and unfinished(folder, name).exists():
        unfinished(folder, name).rmtree()
    return finished


def unfinished(folder: epath.Path, name: str) -> epath.Path:
    """The folder of a model's finished batches, as long as its results are not complete."""
    return folder / f"unfinished_{name}"


def sample_all(
    config: ConfigDict,
    pipeline: Pipeline,
    prompts: Sequence[str],
    name: str,
    numbers: range,
    folder: epath.Path,
    preemption: Preemption,
) -> BatchFiles:
    """Samples the prompts `numbers`, which also seed the noise, in batches that keep the whole mesh busy.

    A record holds `latents` float32 [T, H, W, C].
    """
    size = -(-config.evaluate.batch // pipeline.slots) * pipeline.slots
    files, seconds = BatchFiles(unfinished(folder, name), numbers, size), list[float]()

    def sample(items: range, progress: Progress) -> list[Record]:
        texts, ends = [prompts[item] for item in items], list[float]()
        show = progress.during(items.start - numbers.start, len(items), config.sampler.steps)

        def on_step(done: int) -> None:
            ends.append(time.perf_counter())
            show(done)

        latents = pipeline.sample(texts, config, seed=config.seed, first=items.start, on_step=on_step)[0]
        if len(items) == min(size, len(numbers)):
            seconds.extend(after - before for before, after in itertools.pairwise(ends))
        return [{"latents": z_TxHxWxC} for z_TxHxWxC in to_host(latents)]

    make_batches(files, sample, f"sample {name}", preemption)
    processes.on_first(lambda: write_step_seconds(seconds, min(size, len(numbers)), folder / SPEED / f"{name}.json"))
    return files


def write_step_seconds(seconds: Sequence[float], clips: int, file: epath.Path) -> None:
    """Writes quartiles of the time of a sampling step of a batch of `clips`, which the report shows.

    Nothing without two steps after one another. The first of a batch, which may compile, is not among them.
    """
    if seconds:
        quartiles = dict(zip(("low", "seconds", "high"), np.quantile(seconds, (0.25, 0.5, 0.75)).tolist(), strict=True))
        measured = quartiles | {"steps": len(seconds), "clips": clips}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, measured | {"machine": describe_machine()})


def show_and_score(
    config: ConfigDict,
    pipeline: Pipeline,
    prompts: Sequence[str],
    sampled: BatchFiles,
    name: str,
    folder: epath.Path,
    preemption: Preemption,
) -> BatchFiles:
    """Decodes what is shown or scored: each process its share of the clips, one on each of its devices.

    Sprites are scored, all of them; a record has the clip's scores. Of any model the first `config.evaluate.videos`
    clips are shown.
    """
    scored, numbers = config.prompts == "sprites", sampled.items
    wanted = numbers if scored else numbers[: config.evaluate.videos]
    devices = pipeline.vae.clips_at_once * jax.process_count() if wanted else 1
    files = BatchFiles(unfinished(folder, name) / "scores", wanted, max(config.evaluate.batch, devices))
    first = numbers.start

    def decode(items: range, _: Progress) -> list[Record]:
        def work() -> dict[str, dict[str, float]]:
            own, found = items[jax.process_index() :: jax.process_count()], {}
            latents = [record["latents"] for record in sampled.records(item - first for item in own)]
            for item, video in zip(own, pipeline.decode(np.stack(latents)) if own else (), strict=True):
                if item - first < config.evaluate.videos:
                    write_video(folder / "videos" / name / f"{item - first:04d}.mp4", video, config.video.fps)
                found[str(item)] = sprites_score.measure(video, prompts[item]) if scored else {}
            return found

        by_item: dict[str, dict[str, float]] = {}
        for found in processes.gather_messages(processes.on_all(work)):
            by_item |= found
        return [{key: np.float64(value) for key, value in by_item[str(item)].items()} for item in items]

    make_batches(files, decode, f"decode {name}", preemption)
    return files


def make_batches(
    files: BatchFiles, make: Callable[[range, Progress], list[Record]], label: str, preemption: Preemption
) -> None:
    """Makes the missing batches, which process 0 writes. Shows progress, and obeys signals after every batch."""
    finished, total = processes.on_first(files.finished), len(files.items)
    progress = Progress(label, total, start=min(total, len(finished) * files.size))
    for number, items in files.batches():
        if number not in finished:
            records = make(items, progress)
            processes.on_first(lambda number=number, records=records: files.write(number, records))
        done = items.stop - files.items.start
        progress.show(done, last=done == total)
        preemption.should_stop()
        preemption.stop_if_asked()


def finish_latents(files: BatchFiles, teacher_latents: epath.Path) -> None:
    save_array(teacher_latents, np.stack([record["latents"] for record in files.records()]))
    files.remove()


def finish_model(
    sampled: BatchFiles, scores: BatchFiles, name: str, teacher_latents: epath.Path, result: dict[str, Any]
) -> None:
    """Writes `NAME.json` of a model whose batches are all finished, and `teacher_latents` if it is the teacher.

    `result` is what else is known of the model.
    """
    latents = np.stack([record["latents"] for record in sampled.records()])
    if teacher_latents.stem == name:
        save_array(teacher_latents, latents)
    difference = latents - load_array(teacher_latents)[sampled.items.start : sampled.items.stop]
    result = {"latent_rmse": np.sqrt(np.mean(difference**2, axis=(1, 2, 3, 4))).tolist(), **result}
    per_clip = scores.records() if scores.items else []
    if per_clip and per_clip[0]:
        result["per_clip"] = {
            dimension: [float(record[dimension]) for record in per_clip] for dimension in sprites_score.DIMENSIONS
        }
    write_json(teacher_latents.with_name(f"{name}.json"), result, indent=None)
    sampled.remove()


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
