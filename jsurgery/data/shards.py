"""Shards of training data: ArrayRecord files, written by `trace`, `encode`, `synthesize` and `train`.

A record is a flat dict of arrays, stored as safetensors; text is stored as UTF-8 bytes in a uint8 array.
"""

import contextlib
from collections.abc import Iterable
from typing import Any, SupportsIndex

import grain
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.files import matching, replacing_locally

Record = dict[str, Any]


def text_array(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def array_text(array: np.ndarray) -> str:
    return array.tobytes().decode()


def shard_path(folder: epath.PathLike, shard: int) -> epath.Path:
    return epath.Path(folder) / f"{shard:05d}.array_record"


class ShardWriter:
    """Writes a shard under a temporary name, which `close` changes to `path`: a shard with that name is complete.

    ArrayRecord reads gs://, but writes local files alone: a shard for gs:// is uploaded by `close`.
    """

    def __init__(self, path: epath.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._replacing = contextlib.ExitStack()
        temporary = self._replacing.enter_context(replacing_locally(path, path.with_suffix(".tmp").name))
        self._writer = ArrayRecordWriter(str(temporary), "group_size:1")

    def write(self, record: Record) -> None:
        arrays = {name: np.asarray(array, order="C") for name, array in record.items()}
        self._writer.write(safetensors.numpy.save(arrays))

    def close(self) -> None:
        self._writer.close()
        self._replacing.close()


def write_shard(path: epath.Path, records: Iterable[Record]) -> None:
    """Writes one shard; the file appears under its name once it is complete."""
    writer = ShardWriter(path)
    for record in records:
        writer.write(record)
    writer.close()


class Records:
    """A source for grain: random access to the records of a folder's shards, in the order of the shards' names."""

    def __init__(self, folder: epath.PathLike):
        paths = [str(path) for path in matching(epath.Path(folder), "*.array_record")]
        if not paths:
            raise InputError(f"{folder}: expected ArrayRecord shards (*.array_record), found none")
        self.source = grain.sources.ArrayRecordDataSource(paths)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: SupportsIndex) -> Record:
        return safetensors.numpy.load(self.source[index])
