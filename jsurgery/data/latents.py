"""Encoded clips: latents and captions, from the procedural set or from a folder, and batches of them."""

from collections.abc import Sequence
from typing import Any, cast

import grain
import numpy as np
from etils import epath

from jsurgery.data import sprites
from jsurgery.data.shards import Records, array_text, shard_path, text_array, write_shard
from jsurgery.runtime.progress import Progress
from jsurgery.wan.vae import WanVae

CLIPS_PER_SHARD = 128


def encode_sprites(
    vae: WanVae, folder: epath.Path, *, seed: int, clips: int, video, two_sprites: float, batch: int = 4
) -> None:
    """Renders scenes 0 to `clips` of the set `seed`, encodes them and writes shards; shards that are there are kept.

    A record holds `latents` float16 [T, H, W, C] and `caption`. `video` has frames, height and width.
    """

    def records(indices):
        for start in range(0, len(indices), batch):
            scenes = [
                sprites.scene_at(seed, index, two_sprites=two_sprites) for index in indices[start : start + batch]
            ]
            shape = video.frames, video.height, video.width
            clip = sprites.to_float(np.stack([sprites.render(scene, *shape) for scene in scenes]))
            for scene, latents in zip(scenes, vae.encode_in_chunks(clip).astype(np.float16), strict=True):
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


def batches(folder: epath.PathLike, batch: int, seed: int) -> Sequence[dict[str, Any]]:
    """Shuffled, endless batches; batch number i is the same whenever it is asked for.

    An element holds `latents` float32 [B, T, H, W, C] and `captions`, a list of B strings.
    """

    def collate(records):
        latents = np.stack([record["latents"] for record in records]).astype(np.float32)
        return {"latents": latents, "captions": [array_text(record["caption"]) for record in records]}

    dataset = grain.MapDataset.source(Records(folder)).shuffle(seed=seed).repeat()
    return cast(Sequence[dict[str, Any]], dataset.batch(batch, drop_remainder=True, batch_fn=collate))
