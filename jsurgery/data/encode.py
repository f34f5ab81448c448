"""The command `encode`: turns a folder of captioned videos into shards of latents and text embeddings."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from jsurgery.data.clip_index import check_usable, find_clips
from jsurgery.data.latents import clip_record
from jsurgery.data.shards import Record, ShardWriter, shard_path, text_array
from jsurgery.data.sprites import to_float
from jsurgery.data.video_reader import (
    Bucket,
    Clip,
    ClipLimits,
    Skipped,
    buckets_of,
    decode_in_processes,
    read_clip,
)
from jsurgery.errors import InputError
from jsurgery.io.files import matching, replacing, write_json
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.runtime import processes
from jsurgery.runtime.lock import locked
from jsurgery.runtime.preemption import Preemption
from jsurgery.runtime.progress import Progress, say
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.wan.causal_conv import FrameCache
from jsurgery.wan.checkpoint import load_vae
from jsurgery.wan.model_folder import check_pipeline, model_path, pipeline_folder
from jsurgery.wan.prompt_embedder import PromptEmbedder
from jsurgery.wan.video_size import check_size, latent_grid

FIELDS = (
    "seed", "video", "text_length", "model.dtype", "model.vae_dtype", "data.buckets", "data.posterior", "data.max_crop",
    "data.max_upscale", "data.clips_per_shard", "data.batch",
)  # fmt: skip


def encode_videos(config: ConfigDict, videos: str, root: str | None, workdir: epath.PathLike) -> epath.Path:
    """Encodes the clips of `videos` (see `find_clips`) to shards; returns their folder, `workdir`/encoded.

    `config.data.path` may name that folder. Each shard covers the next `data.clips_per_shard` clips: one file in each
    bucket's folder, and last its report, `reports/00000.json`. A record holds `latents` float16 [T, H, W, C], `text`
    float16 [L, D], L being the caption's length in tokens, `caption` and `path`. Of H hosts, host h makes the shards h,
    h + H, h + 2 H and so on. Complete shards are kept. `skipped.jsonl` lists the clips that were left out, and why.
    Raises InputError if more than the fraction `data.max_skipped` of the clips processed so far was skipped.
    """
    model = check_pipeline(config.model.path)
    buckets = buckets_of(config.video, several=config.data.buckets == "several")
    for bucket in buckets:
        check_size(model, *bucket)
    clips = find_clips(videos, root)
    check_usable(clips, config.data.max_skipped)
    base = pipeline_folder(model_path(config.model.path))
    vae, *text = (folder_fingerprint(base / name) for name in ("vae", "text_encoder", "tokenizer"))
    clips_hash = hashlib.sha256(json.dumps(clips).encode()).hexdigest()[:16]
    stage = StageFolder(workdir, "encoded", config, FIELDS, videos=clips_hash, vae=vae, text=" ".join(text))
    size, host = config.data.clips_per_shard, jax.process_index()
    shards = [range(start, min(start + size, len(clips))) for start in range(0, len(clips), size)]
    complete = [is_complete(stage.folder, shard) for shard in range(len(shards))]
    finished = stage.done() and all(complete)
    processes.wait()  # no host may write before all have looked which shards are complete
    if finished:
        say("encoded: up to date, skipped")
        return stage.folder
    own_shards = range(host, len(shards), jax.process_count())
    missing = {shard: shards[shard] for shard in own_shards if not complete[shard]}
    work = lambda: encode_shards(config, base, stage.folder, clips, missing, buckets, own_shards)
    with locked(stage.folder):
        if host == 0:
            stage.begin()
        processes.on_all(work if missing else lambda: None)
        if host == 0:
            check_skipped(stage.folder, range(len(shards)), config.data.max_skipped)
            skipped = write_skipped(stage.folder)
            say(f"encode: {skipped} of {len(clips)} clips skipped, listed in {stage.folder / 'skipped.jsonl'}")
            stage.end()
    return stage.folder


def encode_shards(
    config: ConfigDict,
    base: epath.Path,
    folder: epath.Path,
    clips: Sequence[Clip],
    shards: dict[int, range],
    buckets: Sequence[Bucket],
    own_shards: Sequence[int],
) -> None:
    """Makes `shards` (number -> numbers of its clips), the missing ones of this host's `own_shards`.

    base: the pipeline folder with the VAE and the text encoder.
    """
    data = config.data
    limits = ClipLimits(buckets, config.video.fps, data.max_crop, data.max_upscale)
    numbers = [number for shard in shards.values() for number in shard]
    work = functools.partial(read_clip, limits=limits)
    decoded = decode_in_processes(work, [clips[number] for number in numbers], min(data.workers, len(numbers)))
    encoder = ClipEncoder(config, base)
    encoder.embedder.say_cut([clips[number].caption for number in numbers], config.text_length)
    with contextlib.closing(decoded), Preemption("encode", alone=True) as preemption:
        results = with_progress(decoded, len(numbers), preemption)
        for shard, of_shard in shards.items():
            encoder.embedder.unpadded([clips[number].caption for number in of_shard], config.text_length)
            write_shard(folder, shard, clips, of_shard, results, encoder)
            check_skipped(folder, own_shards, data.max_skipped)


def with_progress(
    results: Iterable[np.ndarray | Skipped], total: int, preemption: Preemption
) -> Iterator[np.ndarray | Skipped]:
    """Yields the results and shows progress. A signal ends the work; the shard that is then incomplete is discarded."""
    progress, skipped = Progress("encode", total), 0
    for done, result in enumerate(results, 1):
        skipped += isinstance(result, Skipped)
        progress.note = f"{skipped} skipped"
        progress.show(done, last=done == total)
        preemption.should_stop()
        preemption.stop_if_asked()
        yield result


def write_shard(
    folder: epath.Path,
    shard: int,
    clips: Sequence[Clip],
    numbers: range,
    decoded: Iterator[np.ndarray | Skipped],
    encoder: "ClipEncoder",
) -> None:
    """Encodes the clips `numbers`, whose frames `decoded` yields next: one file per bucket, then the shard's report."""
    writers: dict[str, ShardWriter] = {}
    waiting: dict[str, list[tuple[int, np.ndarray]]] = {}
    skipped = []

    def write(bucket: str) -> None:
        if bucket not in writers:
            writers[bucket] = ShardWriter(shard_path(folder / bucket, shard))
        batch, videos = zip(*waiting.pop(bucket), strict=True)
        for record in encoder.records(batch, [clips[number] for number in batch], np.stack(videos)):
            writers[bucket].write(record)

    for number, result in zip(numbers, decoded, strict=False):
        if isinstance(result, Skipped):
            skipped.append({"path": clips[number].path, "reason": str(result)})
        else:
            bucket = str(Bucket(*result.shape[:3]))
            waiting.setdefault(bucket, []).append((number, result))
            if len(waiting[bucket]) == encoder.batch:
                write(bucket)
    for bucket in list(waiting):
        write(bucket)
    for writer in writers.values():
        writer.close()
    report = {"clips": len(numbers), "buckets": sorted(writers), "skipped": skipped}
    (folder / "reports").mkdir(parents=True, exist_ok=True)
    write_json(report_path(folder, shard), report)


def report_path(folder: epath.Path, shard: int) -> epath.Path:
    return folder / "reports" / f"{shard:05d}.json"


def is_complete(folder: epath.Path, shard: int) -> bool:
    """Whether a shard has its report, and a file in every bucket that the report names."""
    report = report_path(folder, shard)
    return report.exists() and all(
        shard_path(folder / bucket, shard).exists() for bucket in json.loads(report.read_text())["buckets"]
    )


def check_skipped(folder: epath.Path, shards: Sequence[int], limit: float) -> None:
    """Raises InputError if more than the fraction `limit` of the clips in the finished ones of `shards` was skipped."""
    paths = [report_path(folder, shard) for shard in shards]
    reports = [json.loads(path.read_text()) for path in paths if path.exists()]
    clips = sum(report["clips"] for report in reports)
    skipped = [row for report in reports for row in report["skipped"]]
    if len(skipped) > limit * clips:
        write_skipped(folder)
        raise InputError(
            f"config.data.max_skipped: {limit}; {len(skipped)} of {clips} clips are skipped, such as "
            f"{skipped[0]['path']} ({skipped[0]['reason']}); all of them are in {folder / 'skipped.jsonl'}"
        )


def write_skipped(folder: epath.Path) -> int:
    """Gathers `skipped.jsonl` from the reports; returns how many clips it lists."""
    reports = [json.loads(path.read_text()) for path in matching(folder / "reports", "*.json")]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for report in reports for row in report["skipped"]]
    with replacing(folder / "skipped.jsonl", f"skipped.tmp{jax.process_index()}") as temporary:
        temporary.write_text("".join(lines))
    return len(lines)


class ClipEncoder:
    """The VAE, with a clip on each of this host's devices, and the text encoder of a pipeline folder.

    All batches have one size, so that a bucket compiles once: `data.batch`, or more to keep all devices busy.
    """

    def __init__(self, config: ConfigDict, base: epath.Path):
        self.text_length, self.seed = config.text_length, config.seed
        self.draws = config.data.posterior == "sample"
        self.vae = load_vae(base / "vae", jnp.dtype(config.model.vae_dtype))
        self.vae.spread(jax.local_devices())
        self.batch = -(-config.data.batch // self.vae.clips_at_once) * self.vae.clips_at_once
        self.embedder = PromptEmbedder(base, config.model.dtype)

    def records(self, numbers: Sequence[int], clips: Sequence[Clip], video_BxFxHxWx3: np.ndarray) -> Iterator[Record]:
        """Records of at most `batch` uint8 clips; the clips' `numbers` seed the noise of posterior samples."""
        filled = np.arange(self.batch) % len(clips)  # a shard's last batch is filled up with repeated clips
        latents = self.latents(to_float(video_BxFxHxWx3[filled]), [numbers[i] for i in filled])
        texts = self.embedder.unpadded([clip.caption for clip in clips], self.text_length)
        for clip, z_TxHxWxC, text_LxD in zip(clips, latents, texts, strict=False):
            yield clip_record(z_TxHxWxC, text_LxD, clip.caption) | {"path": text_array(clip.path)}

    def latents(self, video_BxFxHxWx3: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        """Normalised latents [B, T, H, W, C]: posterior means, or samples if `data.posterior` is "sample".

        A sample's noise depends only on the seed and the clip's number.
        """
        if not self.draws:
            return self.vae.encode_in_chunks(video_BxFxHxWx3)
        _, frames, height, width, _ = video_BxFxHxWx3.shape
        grid = latent_grid(frames, height, width, self.vae.config.strides)
        shape = (*grid, self.vae.config.z_dim)
        noise = np.stack([np.random.default_rng([self.seed, n]).standard_normal(shape, np.float32) for n in numbers])
        pieces = [slice(max(0, 4 * t - 3), 4 * t + 1) for t in range(grid[0])]
        chunks = [(video_BxFxHxWx3[:, at], noise[:, t : t + 1]) for t, at in enumerate(pieces)]
        return self.vae.in_chunks(_sample_chunk, chunks)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="kept")
def _sample_chunk(graph, state, video_BxFxHxWx3, noise_Bx1xHxWxC, kept):
    """`wan.vae.encode_chunk` plus noise in units of the posterior's deviation. diffusers clips logvar likewise."""
    vae, cache = nnx.merge(graph, state), FrameCache(kept)
    mean, logvar = vae.moments(video_BxFxHxWx3, cache)
    return vae._normalized(mean + jnp.exp(jnp.clip(logvar, -30, 20) / 2) * noise_Bx1xHxWxC), cache.left
