"""The command `synthesize`: samples the teacher and writes its latents and text embeddings to shards."""

import hashlib
import json
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsurgery.data.batch_files import BatchFiles
from jsurgery.data.latents import clip_record
from jsurgery.data.shards import Record, shard_path, write_shard
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.runtime import processes
from jsurgery.runtime.mesh import batch_shards, check_heads, make_mesh
from jsurgery.runtime.mesh_choice import sampling_batch
from jsurgery.runtime.preemption import Preemption
from jsurgery.runtime.progress import Progress
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.wan.lora import check_loras, loras_of, with_lora_hashes
from jsurgery.wan.memory import on_sampling_mesh
from jsurgery.wan.model_folder import check_pipeline, model_path
from jsurgery.wan.model_sizes import find_sizes
from jsurgery.wan.pipeline import Pipeline, configured_pipeline
from jsurgery.wan.video_size import check_size

FIELDS = ("seed", "video", "text_length", "model.dtype", "model.vae_dtype", "sampler", "data.clips_per_shard")


def synthesize_clips(config: ConfigDict, prompts: Sequence[str], workdir: epath.PathLike) -> epath.Path:
    """Samples a clip for every prompt into shards; returns their folder, `workdir`/synthesized.

    `config.data.path` may name that folder. A record holds `latents` float16 [T, H, W, C], `text` float16 [L, D], L
    being the prompt's length in tokens, and `caption`, as those of `encode` do. A clip's noise depends only on the seed
    and the prompt's number. A shard has `data.clips_per_shard` clips, of which `data.batch` are sampled at once, or
    more to keep the whole mesh busy. Of H hosts, host h makes the shards h, h + H, h + 2 H and so on. Existing shards
    are kept, and so are finished batches of an unfinished shard. `config.mesh` describes the devices of one host.
    """
    model = check_pipeline(config.model.path)
    check_loras(model, loras_of(config))
    check_size(model, config.video.frames, config.video.height, config.video.width)
    batch = sampling_batch(len(prompts), jax.local_device_count(), config.data.batch)
    placed = on_sampling_mesh("synthesize", config, find_sizes(config, ""), batch)
    mesh = make_mesh(placed.mesh, jax.local_devices())
    check_heads(mesh, model.num_attention_heads, config.mesh.exchange, model.rates)
    prompts_hash = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
    identity = with_lora_hashes(folder_fingerprint(model_path(config.model.path)), loras_of(config))
    stage = StageFolder(workdir, "synthesized", config, FIELDS, prompts=prompts_hash, teacher=identity)
    work = lambda: make_shards(config, prompts, stage.folder, mesh)
    stage.run(lambda: processes.on_all(work), all_processes=True)
    return stage.folder


def make_shards(config: ConfigDict, prompts: Sequence[str], folder: epath.Path, mesh: Mesh) -> None:
    """Makes the missing ones of this host's shards. A signal ends the work after the batch in which it came."""
    clips, slots = config.data.clips_per_shard, batch_shards(mesh)
    size = -(-config.data.batch // slots) * slots
    own_shards = range(jax.process_index(), -(-len(prompts) // clips), jax.process_count())
    files = {
        shard: BatchFiles(folder / f"unfinished_{shard:05d}", range(len(prompts))[shard * clips :][:clips], size)
        for shard in own_shards
    }
    missing = {shard: files[shard] for shard in own_shards if not shard_path(folder, shard).exists()}
    for shard in files.keys() - missing.keys():
        files[shard].remove()  # a run was killed when it had just written the shard
    if not missing:
        return
    pipeline = configured_pipeline(config, mesh)
    own = [prompts[item] for of_shard in missing.values() for item in of_shard.items]
    pipeline.embedder.say_cut([*own, config.sampler.negative_prompt], config.text_length)
    batches = {shard: dict(of_shard.batches()) for shard, of_shard in missing.items()}
    left = {shard: batches[shard].keys() - of_shard.finished() for shard, of_shard in missing.items()}
    total = sum(len(items) for of_shard in batches.values() for items in of_shard.values())
    done = total - sum(len(batches[shard][number]) for shard, numbers in left.items() for number in numbers)
    progress = Progress("synthesize", total, start=done)
    with Preemption("synthesize", alone=True) as preemption:
        for shard, of_shard in missing.items():
            texts = {number: [prompts[item] for item in batches[shard][number]] for number in sorted(left[shard])}
            if texts:  # all prompts of the shard, so that a resumed run computes the same bits
                pipeline.embedder.forget()
                words = [prompts[item] for item in of_shard.items]
                pipeline.embedder.unpadded([*words, config.sampler.negative_prompt], config.text_length)
            for number, batch in texts.items():
                on_step = progress.during(done, len(batch), config.sampler.steps)
                of_shard.write(number, records(config, pipeline, batch, batches[shard][number].start, on_step))
                done += len(batch)
                progress.show(done, last=done == total)
                preemption.should_stop()
                preemption.stop_if_asked()
            write_shard(shard_path(folder, shard), of_shard.records())
            of_shard.remove()


def records(
    config: ConfigDict, pipeline: Pipeline, prompts: Sequence[str], first: int, on_step: Callable[[int], None]
) -> list[Record]:
    """Samples one batch of prompts, numbered from `first` on; returns their records. `on_step` as in `sample`."""
    sampled, _ = pipeline.sample(prompts, config, seed=config.seed, first=first, on_step=on_step)
    texts = pipeline.embedder.unpadded(prompts, config.text_length)
    return [clip_record(*clip) for clip in zip(np.asarray(sampled), texts, prompts, strict=True)]
