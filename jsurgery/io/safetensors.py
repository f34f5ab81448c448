"""Reads and writes safetensors files, one tensor at a time: a single file, or shards with an index."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.files import damaged, matching, read_object, replacing, write_json
from jsurgery.io.foreign_tensors import foreign_format
from jsurgery.io.hashes import HASHES, size_and_sha256

LARGEST_HEADER = 100_000_000  # bytes; also the safetensors library's limit
LARGEST_TENSOR = 1 << 46  # elements, with empty axes counted as 1
SHARD_BYTES = 5_000_000_000  # also the limit of diffusers and transformers

# The format's name of a dtype -> NumPy's dtype. NumPy itself has no bfloat16.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values are fetched each time that NumPy needs them, and are not kept."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.fetch(), dtype=dtype, copy=copy)


Tensors = Mapping[str, np.ndarray | LazyTensor]


def open_tensors(path: epath.PathLike) -> dict[str, LazyTensor]:
    """The tensors of a .safetensors file, or of all such files in a folder, with or without an index; memory-mapped.

    Only the headers are read here. Raises InputError, naming the file and the likely cause, if a file is missing or
    damaged.
    """
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected safetensors weights")
    if not path.is_dir():
        return _open_file(path)

    indices = matching(path, "*.safetensors.index.json")
    if len(indices) > 1:
        raise InputError(f"{path}: expected one index of shards, found {', '.join(i.name for i in indices)}")
    if indices:
        return _open_shards(indices[0])

    tensors: dict[str, LazyTensor] = {}
    files = matching(path, "*.safetensors")
    if not files:
        pickles = sorted(file.name for end in ("*.bin", "*.pth", "*.pt", "*.ckpt") for file in matching(path, end))
        hint = f", but {', '.join(pickles)}; pickles are not read, `jsurgery convert` turns one into safetensors"
        if quantised := [file.name for file in matching(path, "*.gguf")]:
            hint = f", but {', '.join(quantised)}; GGUF is not read, take the model's .safetensors in bfloat16"
        hint = hint if pickles or quantised else ""
        raise InputError(f"{path}: no .safetensors file in this folder{hint}")
    for file in files:
        if re.search(r"-\d{5}-of-\d{5}\.safetensors$", file.name):
            raise InputError(f"{file}: a shard without its index (*.safetensors.index.json); download incomplete?")
        shard = _open_file(file)
        if duplicates := tensors.keys() & shard.keys():
            raise InputError(
                f"{file}: holds {min(duplicates)}, which another file of the folder holds too; keep one variant"
            )
        tensors |= shard
    return tensors


def open_lora_tensors(file: epath.PathLike) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of one file, which may be a LoRA, and the texts in its header; otherwise like `open_tensors`."""
    return _open_with_metadata(epath.Path(file), lambda names: None)


def read_tensors(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Like `open_tensors`, with all values read into memory."""
    return {name: np.array(tensor) for name, tensor in open_tensors(path).items()}


def check_tensors(path: epath.PathLike) -> None:
    """Raises InputError where `open_tensors` would; reads only the headers and sizes of the files."""
    open_tensors(path)


def write_tensors(path: epath.PathLike, tensors: Tensors, metadata: dict[str, str] | None = None) -> list[Any]:
    """Writes one .safetensors file under a temporary name, then renames it: a file under its final name is complete.

    A hashes.json in its folder is removed before that, as by `write_shards`. Returns the file's [size, sha256].
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        written = _write_file(temporary, tensors, metadata)
        (path.parent / HASHES).unlink(missing_ok=True)
    return written


def write_shards(
    folder: epath.PathLike, stem: str, tensors: Tensors, shard_bytes: int = SHARD_BYTES
) -> dict[str, list]:
    """Writes `stem`.safetensors, or above `shard_bytes` shards with an index, named as in diffusers and transformers.

    All files are complete before the first one gets its final name, and the index is written last. Before that, an
    earlier save's hashes.json is removed, then its index; its other shards are removed too.
    Returns [size, sha256] by file name, for `write_hashes`.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, shard_bytes)
    count = len(shards)
    names = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}.safetensors"]
    hashes = {name: _write_file(_temporary(folder / name), shard) for name, shard in zip(names, shards, strict=True)}

    index = folder / f"{stem}.safetensors.index.json"
    (folder / HASHES).unlink(missing_ok=True)
    index.unlink(missing_ok=True)
    for name in names:
        _temporary(folder / name).replace(folder / name)
    ours = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors")
    for file in matching(folder, "*.safetensors"):
        if ours.fullmatch(file.name) and file.name not in names:
            file.unlink()
    if count > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        content = {"metadata": {"total_size": sum(map(_size, tensors.values()))}, "weight_map": weight_map}
        write_json(index, content)
        hashes[index.name] = size_and_sha256(index)
    return hashes


def _open_shards(index: epath.Path) -> dict[str, LazyTensor]:
    shard_of = read_object(index, "JSON with a weight_map of tensor to file").get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(f"{index}: expected JSON with a weight_map of tensor to file, found none")
    shards = sorted({shard for shard in shard_of.values() if isinstance(shard, str)})
    # Names, not paths: a downloaded index must not lead to other files of this machine.
    if astray := [s for s in shard_of.values() if not isinstance(s, str) or not re.fullmatch(r"[\w-][\w.-]*", s)]:
        raise InputError(f"{index}: expected names of files in this folder, found {astray[0]!r}")
    if absent := [shard for shard in shards if not (index.parent / shard).exists()]:
        raise InputError(
            f"{index}: names {len(shards)} shards, of which {', '.join(absent)} not there; download incomplete?"
        )
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        tensors |= _open_file(index.parent / shard)
    if lost := shard_of.keys() - tensors.keys():
        raise InputError(f"{index}: names {len(lost)} tensors that no shard holds, such as {min(lost)}")
    return tensors


def _open_file(file: epath.Path) -> dict[str, LazyTensor]:
    """The tensors of one file. Raises InputError unless they fill the file exactly, as its header says."""
    return _open_with_metadata(file, foreign_format)[0]


def _open_with_metadata(
    file: epath.Path, foreign: Callable[[Iterable[str]], str | None]
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Likewise, with the texts in the header; `foreign` tells by the names what is refused."""
    try:
        size = file.stat().length
        with open_exact(file) as stream:
            start = stream.read(200)
            header_size = int.from_bytes(start[:8], "little")
            if len(start) < 8 or header_size > min(size - 8, LARGEST_HEADER):
                raise damaged(file, start, size, "the header is cut short")
            stream.seek(8)
            text = stream.read(header_size)
    except OSError as error:
        raise InputError(f"{file}: expected a safetensors file, found {error.strerror or error}") from None
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None)
        places = {name: _place(**entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(file, start, size, "the header is no table of tensors") from error
    expected = 8 + header_size + max((place.end for place in places.values()), default=0)
    if size != expected:
        raise damaged(file, start, size, f"the header speaks of {expected}")
    if kind := foreign(places):
        raise InputError(f"{file}: holds {kind}")
    if unknown := {place.dtype for place in places.values()} - _DTYPES.keys():
        kinds = f"{', '.join(sorted(unknown))}; expected one of {', '.join(_DTYPES)}"
        raise InputError(f"{file}: holds tensors of type {kinds}: take the file in bfloat16 or float16")
    tensors, end = {}, 0
    for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
        expected = math.prod(place.shape) * _DTYPES[place.dtype].itemsize
        if place.end - place.begin != expected:
            fault = f"{name} has {place.end - place.begin} bytes for {place.dtype} {place.shape}"
            raise damaged(file, start, size, fault)
        if place.begin != end:
            raise damaged(file, start, size, f"{name} begins at {place.begin}, the tensor before it ends at {end}")
        end = place.end
        tensors[name] = _stored(file, _DTYPES[place.dtype], place.shape, 8 + header_size + place.begin)
    texts = metadata if isinstance(metadata, dict) else {}
    return {name: tensors[name] for name in places}, {key: str(text) for key, text in texts.items()}


class _TensorSpan(NamedTuple):
    """A tensor's entry in a header: its values are the bytes from `begin` to `end` after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _place(dtype: Any, shape: Any, data_offsets: Any) -> _TensorSpan:
    """A header's entry, checked. Raises ValueError or TypeError if it does not describe a tensor."""
    begin, end = data_offsets
    numbers = [begin, end, *shape]
    sound = type(dtype) is str and type(shape) is list and all(type(number) is int for number in numbers)
    if not sound or min(numbers) < 0 or end < begin or math.prod(side or 1 for side in shape) > LARGEST_TENSOR:
        raise ValueError(f"expected type, shape and place of a tensor, found {dtype}, {shape}, {data_offsets}")
    return _TensorSpan(dtype, tuple(shape), begin, end)


def open_exact(file: epath.Path) -> IO[Any]:
    """Opens a file of which parts are read: an object store is asked for these alone, not for 5 MB more each time."""
    stream: Any = file.open("rb")
    if "://" in str(file):
        from fsspec.caching import ReadAheadCache

        if isinstance(cache := getattr(stream, "cache", None), ReadAheadCache):
            cache.blocksize = 0
    return stream


def _stored(file: epath.Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> LazyTensor:
    def fetch() -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        if size and "://" not in str(file):
            # Each tensor has its own mapping, so that its memory is released with it.
            return np.memmap(file, dtype, "r", offset, shape)
        with open_exact(file) as stream:
            stream.seek(offset)
            return np.frombuffer(stream.read(size), dtype).reshape(shape)

    return LazyTensor(shape, dtype, fetch)


def _split(tensors: Tensors, shard_bytes: int) -> list[Tensors]:
    shards: list[dict[str, Any]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and _size(tensor) > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= _size(tensor)
    return list(shards)


def _size(tensor: np.ndarray | LazyTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _temporary(path: epath.Path) -> epath.Path:
    return path.with_name(path.name + ".tmp")


def _write_file(path: epath.Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> list[Any]:
    """Writes one file, with one tensor in memory at a time, and returns its [size, sha256]; removes it on an error."""
    # The widest type first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for name in names:
        begin, end = end, end + _size(tensors[name])
        dtype = _DTYPE_NAMES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as stream:
            start = len(text).to_bytes(8, "little") + text
            stream.write(start)
            digest = hashlib.sha256(start)
            for name in names:
                # The buffer is written in memory order, so a transposed view has to be copied first.
                values = np.asarray(tensors[name], order="C").reshape(-1).view(np.uint8).data
                stream.write(values)
                digest.update(values)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return [len(start) + end, digest.hexdigest()]
