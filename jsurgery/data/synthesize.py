"""The command `synthesize`: samples the teacher and writes its latents and text embeddings to shards."""

import hashlib
import json
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsurgery.data.shards import Record, shard_path, text_array, write_shard
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.runtime import processes
from jsurgery.runtime.mesh import check_heads, make_mesh
from jsurgery.runtime.preemption import Preemption
from jsurgery.runtime.progress import Progress
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.wan.model_folder import check_pipeline, model_path
from jsurgery.wan.pipeline import Pipeline, batched, load_pipeline
from jsurgery.wan.video_size import check_size

FIELDS = ("seed", "video", "text_length", "model.dtype", "sampler", "data.clips_per_shard")


def synthesize_clips(config: ConfigDict, prompts: Sequence[str], workdir: epath.PathLike) -> epath.Path:
    """Samples a clip for every prompt into shards; returns their folder, `workdir`/synthesized.

    `config.data.path` may name that folder. A record holds `latents` float16 [T, H, W, C], `text` float16 [L, D], L
    being the prompt's length in tokens, and `caption`, as those of `encode` do. A clip's noise depends only on the seed
    and the prompt's number. A shard has `data.clips_per_shard` clips, of which `data.batch` are sampled at once. Of H
    hosts, host h makes the shards h, h + H, h + 2 H and so on. Existing shards are kept. `config.mesh` describes the
    devices of one host.
    """
    model = check_pipeline(config.model.path)
    check_size(model, config.video.frames, config.video.height, config.video.width)
    mesh = make_mesh(config.mesh, jax.local_devices())
    check_heads(mesh, model.num_attention_heads, config.mesh.exchange)
    prompts_hash = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
    identity = folder_fingerprint(model_path(config.model.path))
    stage = StageFolder(workdir, "synthesized", config, FIELDS, prompts=prompts_hash, teacher=identity)
    work = lambda: make_shards(config, prompts, stage.folder, mesh)
    stage.run(lambda: processes.on_all(work), all_processes=True)
    return stage.folder


def make_shards(config: ConfigDict, prompts: Sequence[str], folder: epath.Path, mesh: Mesh) -> None:
    """Makes the missing ones of this host's shards."""
    size, hosts = config.data.clips_per_shard, jax.process_count()
    own_shards = range(jax.process_index(), -(-len(prompts) // size), hosts)
    missing = [shard for shard in own_shards if not shard_path(folder, shard).exists()]
    if not missing:
        return
    pipeline = load_pipeline(config.model.path, jnp.dtype(config.model.dtype), mesh, config.mesh.exchange)
    total = sum(len(prompts[shard * size : (shard + 1) * size]) for shard in missing)
    progress, done = Progress("synthesize", total), 0
    with Preemption("synthesize", alone=True) as preemption:
        for shard in missing:
            batch = prompts[shard * size : (shard + 1) * size]
            clips = records(config, pipeline, batch, shard * size, progress, done, preemption)
            write_shard(shard_path(folder, shard), clips)
            done += len(batch)


def records(
    config: ConfigDict,
    pipeline: Pipeline,
    prompts: Sequence[str],
    first: int,
    progress: Progress,
    done: int,
    preemption: Preemption,
) -> Iterator[Record]:
    """Samples `prompts`, numbered from `first` on, and yields their records. `done`: clips made before, for `progress`.

    A signal ends the work; the shard that is then incomplete is discarded.
    """
    pipeline.embedder.unpadded([*prompts, config.sampler.negative_prompt], config.text_length)
    for start, batch in batched(prompts, config.data.batch):
        latents = np.asarray(pipeline.sample(batch, config, seed=config.seed, first=first + start)[0], np.float16)
        texts = pipeline.embedder.unpadded(batch, config.text_length)
        for prompt, z_TxHxWxC, text_LxD in zip(batch, latents, texts, strict=True):
            yield {"latents": z_TxHxWxC, "text": text_LxD.astype(np.float16), "caption": text_array(prompt)}
        progress.show(done + start + len(batch), last=done + start + len(batch) == progress.total)
        preemption.should_stop()
        preemption.stop_if_asked()
