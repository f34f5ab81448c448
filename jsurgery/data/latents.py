"""Training data: encodes the procedural clips, checks folders of encoded clips, and reads batches from them."""

from collections.abc import Sequence
from typing import Any, cast

import grain
import numpy as np
from etils import epath

from jsurgery.data import sprites
from jsurgery.data.shards import Record, Records, array_text, shard_path, text_array, write_shard
from jsurgery.errors import InputError
from jsurgery.io.files import matching, read_object
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.runtime.finite import in_half
from jsurgery.runtime.progress import Progress
from jsurgery.runtime.stage_folder import MARKER
from jsurgery.wan.vae import WanVae

CLIPS_PER_SHARD = 128


def clip_record(latents_TxHxWxC: np.ndarray, text_LxD: np.ndarray, caption: str) -> Record:
    """The record of a clip to train on: float16 latents and text embedding, L being the caption's length in tokens.

    Raises InputError for numbers that are not finite in float16.
    """
    latents, text = in_half(latents_TxHxWxC, f"latents of {caption!r}"), in_half(text_LxD, f"text of {caption!r}")
    return {"latents": latents, "text": text, "caption": text_array(caption)}


def encode_sprites(
    vae: WanVae, folder: epath.Path, *, seed: int, clips: int, video, two_sprites: float, batch: int = 4
) -> None:
    """Renders the first `clips` scenes of the set `seed`, encodes them and writes shards. Existing shards are kept.

    A record holds `latents` float16 [T, H, W, C] and `caption`. `video` has frames, height and width. `batch` clips are
    encoded at once, or as many more as keep all devices of the VAE busy.
    """
    batch = -(-batch // vae.clips_at_once) * vae.clips_at_once

    def records(indices):
        for start in range(0, len(indices), batch):
            scenes = [
                sprites.scene_at(seed, index, two_sprites=two_sprites) for index in indices[start : start + batch]
            ]
            shape = video.frames, video.height, video.width
            clip = sprites.to_float(np.stack([sprites.render(scene, *shape) for scene in scenes]))
            for scene, latents in zip(scenes, vae.encode_in_chunks(clip), strict=True):
                latents = in_half(latents, f"latents of {scene.caption!r}")
                yield {"latents": latents, "caption": text_array(scene.caption)}
                progress.show(indices[start] + 1)

    shards = -(-clips // CLIPS_PER_SHARD)
    missing = [shard for shard in range(shards) if not shard_path(folder, shard).exists()]
    progress = Progress("encode", clips, start=(shards - len(missing)) * CLIPS_PER_SHARD)
    for shard in missing:
        write_shard(
            shard_path(folder, shard),
            records(range(shard * CLIPS_PER_SHARD, min(clips, (shard + 1) * CLIPS_PER_SHARD))),
        )


def check_latents(folder: epath.Path, vae: epath.Path) -> None:
    """Raises InputError if the folder does not exist, was not finished by `encode` or `synthesize`, or was encoded by
    another VAE than the one in the folder `vae`. Of a folder without a stage's marker only the existence is checked."""
    if not folder.exists():
        raise InputError(f"config.data.path: {folder}: no such folder; expected encoded clips, or 'sprites'")
    if not (folder / MARKER).exists():
        return
    marker = read_object(folder / MARKER, "the marker of a stage")
    if marker.get("complete") is not True:
        raise InputError(f"config.data.path: {folder}: not finished; run the command that makes it again")
    made_with = marker.get("made_with")
    if isinstance(made_with, dict) and "vae" in made_with and made_with["vae"] != folder_fingerprint(vae):
        raise InputError(f"config.data.path: {folder}: expected latents of {vae}, found those of another VAE")


class LocalRows:
    """A source for grain: of every batch of an endless dataset, only the examples at positions `rows`."""

    def __init__(self, examples: Any, batch: int, rows: Sequence[int]):
        self.examples, self.batch, self.rows = examples, batch, rows

    def __len__(self) -> int:
        return len(self.examples) // self.batch * len(self.rows)

    def __getitem__(self, index) -> Any:
        number, row = divmod(index, len(self.rows))
        return self.examples[number * self.batch + self.rows[row]]


def batches(
    folder: epath.PathLike, batch: int, seed: int, rows: Sequence[int] | None = None
) -> Sequence[dict[str, Any]]:
    """Endless, shuffled batches. Batch number i depends only on the folder, `batch` and `seed`.

    With `rows`, only these rows of each batch are read: with several processes, each reads its own.

    A batch holds `latents` float32 [B, T, H, W, C] and `captions`, a list of B strings. If the records have text
    embeddings it also holds `text`, a list of B arrays [L, D], L being the caption's length in tokens. If each bucket
    has a folder of its own, every batch comes from one bucket, and buckets alternate in proportion to their clips.
    """

    def collate(records):
        latents = np.stack([record["latents"] for record in records]).astype(np.float32)
        element = {"latents": latents, "captions": [array_text(record["caption"]) for record in records]}
        return element | ({"text": [record["text"] for record in records]} if "text" in records[0] else {})

    sources = bucket_records(folder)
    rows = range(batch) if rows is None else rows
    shuffled = [grain.MapDataset.source(source).shuffle(seed=seed).repeat() for source in sources]
    datasets = [
        grain.MapDataset.source(LocalRows(examples, batch, rows)).batch(
            len(rows), drop_remainder=True, batch_fn=collate
        )
        for examples in shuffled
    ]
    mixed = grain.MapDataset.mix(datasets, weights=[len(source) for source in sources])
    return cast(Sequence[dict[str, Any]], mixed if len(datasets) > 1 else datasets[0])


def bucket_records(folder: epath.PathLike) -> list[Records]:
    """The records of each bucket: of the folders in `folder` that hold shards, or of `folder` itself."""
    folder = epath.Path(folder)
    return [
        Records(bucket) for bucket in sorted({path.parent for path in matching(folder, "*/*.array_record")}) or [folder]
    ]


def captions_to_embed(folder: epath.PathLike) -> list[str]:
    """The distinct captions of a folder whose records hold no text embeddings; none if they do."""
    sources = bucket_records(folder)
    if "text" in sources[0][0]:
        return []
    captions = (array_text(source[index]["caption"]) for source in sources for index in range(len(source)))
    return list(dict.fromkeys(captions))


def padded_text(text: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Stacks B text embeddings [L, D] to float32 [B, length, D], padded with zeros. Raises InputError if L > length."""
    longest = max(map(len, text))
    if longest > length:
        raise InputError(
            f"config.text_length: {length}; expected at least {longest}, the length of a caption in config.data.path"
        )
    return np.stack([np.pad(rows, ((0, length - len(rows)), (0, 0))) for rows in text]).astype(np.float32)
