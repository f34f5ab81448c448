"""encode: a folder of videos with captions to shards of latents and text embeddings."""

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

from jsurgery.data.shards import Record, ShardWriter, shard_path, text_array
from jsurgery.data.sprites import to_float
from jsurgery.data.video_reader import (
    Bucket,
    Clip,
    ClipLimits,
    Skipped,
    buckets_of,
    decode_in_processes,
    find_clips,
    read_clip,
)
from jsurgery.errors import InputError
from jsurgery.io.files import replacing, write_json
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.runtime import processes
from jsurgery.runtime.lock import locked
from jsurgery.runtime.preemption import Preemption
from jsurgery.runtime.progress import Progress, say
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.wan.causal_conv import FrameCache
from jsurgery.wan.checkpoint import load_text_encoder, load_vae
from jsurgery.wan.model_folder import check_pipeline, model_path, pipeline_folder
from jsurgery.wan.text_encoder import encode_prompts
from jsurgery.wan.tokenizer import Tokenizer
from jsurgery.wan.video_size import check_size, latent_grid

FIELDS = (
    "seed", "video", "text_length", "model.dtype", "data.buckets", "data.posterior", "data.max_crop",
    "data.max_upscale", "data.clips_per_shard", "data.batch",
)  # fmt: skip


def encode_videos(config: ConfigDict, videos: str, root: str | None, workdir: epath.PathLike) -> epath.Path:
    """Encodes the clips of `videos` (see `find_clips`); returns the folder, `workdir`/encoded, for `config.data.path`.

    Shard k, in a folder for each bucket, has the usable ones of the clips from k `data.clips_per_shard` on, and
    `reports/k.json` ends it. A record holds `latents` float16 [T, H, W, C], `text` float16 [L, D], as long as the
    caption in tokens, `caption` and `path`. Host h of H makes every H-th shard from h on. Shards that are there are
    kept. `skipped.jsonl` lists what was left out and why.
    Raises InputError when more than the share `data.max_skipped` of the clips done is skipped.
    """
    model = check_pipeline(config.model.path)
    buckets = buckets_of(config.video, several=config.data.buckets == "several")
    for bucket in buckets:
        check_size(model, *bucket)
    clips = find_clips(videos, root)
    base = pipeline_folder(model_path(config.model.path))
    vae, *text = (folder_fingerprint(base / name) for name in ("vae", "text_encoder", "tokenizer"))
    listed = hashlib.sha256(json.dumps(clips).encode()).hexdigest()[:16]
    stage = StageFolder(workdir, "encoded", config, FIELDS, videos=listed, vae=vae, text=" ".join(text))
    size, host = config.data.clips_per_shard, jax.process_index()
    shards = [range(start, min(start + size, len(clips))) for start in range(0, len(clips), size)]
    there = [is_complete(stage.folder, shard) for shard in range(len(shards))]
    finished = stage.done() and all(there)
    processes.wait()  # before any host marks or makes what others still look for
    if finished:
        say("encoded: up to date, skipped")
        return stage.folder
    mine = range(host, len(shards), jax.process_count())
    missing = {shard: shards[shard] for shard in mine if not there[shard]}
    work = lambda: encode_shards(config, base, stage.folder, clips, missing, buckets, mine)
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
    mine: Sequence[int],
) -> None:
    """Makes `shards`, the missing ones of `mine`, with the models in `base`."""
    data = config.data
    wanted = ClipLimits(buckets, config.video.fps, data.max_crop, data.max_upscale)
    numbers = [number for shard in shards.values() for number in shard]
    work = functools.partial(read_clip, wanted=wanted)
    decoded = decode_in_processes(work, [clips[number] for number in numbers], min(data.workers, len(numbers)))
    encoder = ClipEncoder(config, base)
    with contextlib.closing(decoded), Preemption("encode", alone=True) as preemption:
        results = with_progress(decoded, len(numbers), preemption)
        for shard, of_shard in shards.items():
            write_shard(folder, shard, clips, of_shard, results, encoder)
            check_skipped(folder, mine, data.max_skipped)


def with_progress(
    results: Iterable[np.ndarray | Skipped], total: int, preemption: Preemption
) -> Iterator[np.ndarray | Skipped]:
    """The results, until a signal ends the work; of the shard that is then open nothing is kept."""
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
    """Encodes the clips `numbers`, next in `decoded`, to a shard in the folder of each bucket met, and reports."""
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
    """Whether a shard is complete in every bucket that its report names."""
    report = report_path(folder, shard)
    return report.exists() and all(
        shard_path(folder / bucket, shard).exists() for bucket in json.loads(report.read_text())["buckets"]
    )


def check_skipped(folder: epath.Path, shards: Sequence[int], limit: float) -> None:
    """Raises InputError when more than the share `limit` of the clips in those `shards` that are done was skipped."""
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
    reports = [json.loads(path.read_text()) for path in sorted((folder / "reports").glob("*.json"))]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for report in reports for row in report["skipped"]]
    with replacing(folder / "skipped.jsonl", f"skipped.tmp{jax.process_index()}") as temporary:
        temporary.write_text("".join(lines))
    return len(lines)


class ClipEncoder:
    """The VAE and the text encoder of a pipeline folder, on batches of one size: one compiled program a bucket."""

    def __init__(self, config: ConfigDict, base: epath.Path):
        self.batch, self.text_length, self.seed = config.data.batch, config.text_length, config.seed
        self.draws = config.data.posterior == "sample"
        self.vae = load_vae(base / "vae")
        self.tokenizer = Tokenizer(base / "tokenizer")
        self.text_encoder = load_text_encoder(base / "text_encoder", jnp.dtype(config.model.dtype))

    def records(self, numbers: Sequence[int], clips: Sequence[Clip], video_BxFxHxWx3: np.ndarray) -> Iterator[Record]:
        """Records of at most `batch` clips, given as uint8; `numbers` seed the noise of samples."""
        filled = np.arange(self.batch) % len(clips)  # the last batch of a shard repeats clips
        latents = self.latents(to_float(video_BxFxHxWx3[filled]), [numbers[i] for i in filled])
        token_ids, mask = self.tokenizer([clips[i].caption for i in filled], self.text_length)
        text = np.asarray(_embed(self.text_encoder, token_ids, mask), np.float16)
        for clip, z_TxHxWxC, words, length in zip(clips, latents, text, mask.sum(1), strict=False):
            yield {
                "latents": z_TxHxWxC.astype(np.float16),
                "text": words[:length],
                "caption": text_array(clip.caption),
                "path": text_array(clip.path),
            }

    def latents(self, video_BxFxHxWx3: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        """The posterior's mean, or with `posterior` "sample" the mean plus its deviation times a clip's own noise."""
        if not self.draws:
            return self.vae.encode_in_chunks(video_BxFxHxWx3)
        grid = latent_grid(*video_BxFxHxWx3.shape[1:4])
        shape = (*grid, self.vae.config.z_dim)
        noise = np.stack([np.random.default_rng([self.seed, n]).standard_normal(shape, np.float32) for n in numbers])
        graph, state = nnx.split(self.vae)
        kept, finished = None, []
        for t in range(grid[0]):
            frames = video_BxFxHxWx3[:, max(0, 4 * t - 3) : 4 * t + 1]
            z, kept = _sample_chunk(graph, state, frames, noise[:, t : t + 1], kept)
            finished.append(np.asarray(z, np.float32))
        return np.concatenate(finished, axis=1)


@nnx.jit
def _embed(text_encoder, token_ids, mask):
    return encode_prompts(text_encoder, token_ids, mask)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="kept")
def _sample_chunk(graph, state, video_BxFxHxWx3, noise_Bx1xHxWxC, kept):
    """As `encode_chunk`, with noise in the units of the posterior's deviation. The clip is that of diffusers."""
    vae, cache = nnx.merge(graph, state), FrameCache(kept)
    mean, logvar = vae.moments(video_BxFxHxWx3, cache)
    return vae._normalized(mean + jnp.exp(jnp.clip(logvar, -30, 20) / 2) * noise_Bx1xHxWxC), cache.left
