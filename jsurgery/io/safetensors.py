"""Safetensors files: looked into without being read, written tensor by tensor; one file, or shards with an index."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.files import damaged, read_object, replacing, write_json
from jsurgery.io.hashes import HASHES, size_and_sha256

LARGEST_HEADER = 100_000_000  # of the safetensors library, too
LARGEST_TENSOR = 1 << 46  # bytes, were no axis empty
SHARD_BYTES = 5_000_000_000  # diffusers' and transformers' own limit

# NumPy has no bfloat16 of its own, which is why its names are not the format's.
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
    """A tensor whose values are fetched each time that NumPy asks for them, and not kept."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.fetch(), dtype=dtype, copy=copy)


Tensors = Mapping[str, np.ndarray | LazyTensor]


def open_tensors(path: epath.PathLike) -> dict[str, LazyTensor]:
    """All tensors of a .safetensors file, or of a folder of them (sharded, with an index, or not), memory-mapped.

    Only headers are read here. Raises InputError, naming the file and the likely cause, where a file is missing or
    damaged.
    """
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected safetensors weights")
    if not path.is_dir():
        return _open_file(path)

    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise InputError(f"{path}: expected one index of shards, found {', '.join(i.name for i in indices)}")
    if indices:
        return _open_shards(indices[0])

    tensors: dict[str, LazyTensor] = {}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for end in ("*.bin", "*.pth", "*.pt") for file in path.glob(end))
        hint = f", but {', '.join(pickles)}; pickles are not read" if pickles else ""
        raise InputError(f"{path}: no .safetensors file in this folder{hint}")
    for file in files:
        if re.search(r"-\d{5}-of-\d{5}\.safetensors$", file.name):
            raise InputError(f"{file}: a shard without its index (*.safetensors.index.json); download incomplete?")
        shard = _open_file(file)
        if twice := tensors.keys() & shard.keys():
            raise InputError(
                f"{file}: holds {min(twice)}, which another file of the folder holds too; keep one variant"
            )
        tensors |= shard
    return tensors


def read_tensors(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Like `open_tensors`, with all values in memory."""
    return {name: np.array(tensor) for name, tensor in open_tensors(path).items()}


def check_tensors(path: epath.PathLike) -> None:
    """Raises InputError where `read_tensors` would, having read the headers of the files and their sizes only."""
    open_tensors(path)


def _open_shards(index: epath.Path) -> dict[str, LazyTensor]:
    shard_of = read_object(index, "JSON with a weight_map of tensor to file").get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(f"{index}: expected JSON with a weight_map of tensor to file, found none")
    shards = sorted({shard for shard in shard_of.values() if isinstance(shard, str)})
    # A name, not a path: an index from elsewhere must not lead to other files of this machine.
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
    """Each tensor of a file whose size is what its header adds up to."""
    try:
        size = file.stat().length
        with file.open("rb") as stream:
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
        header.pop("__metadata__", None)
        places = {name: _place(**entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(file, start, size, "the header is no table of tensors") from error
    expected = 8 + header_size + max((place.end for place in places.values()), default=0)
    if size != expected:
        raise damaged(file, start, size, f"the header speaks of {expected}")
    if foreign := {place.dtype for place in places.values()} - _DTYPES.keys():
        raise InputError(
            f"{file}: holds tensors of type {', '.join(sorted(foreign))}; expected one of {', '.join(_DTYPES)}"
        )
    tensors, end = {}, 0
    for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
        expected = math.prod(place.shape) * _DTYPES[place.dtype].itemsize
        if place.end - place.begin != expected:
            found = f"{name} has {place.end - place.begin} bytes for {place.dtype} {place.shape}"
            raise damaged(file, start, size, found)
        if place.begin != end:
            raise damaged(file, start, size, f"{name} begins at {place.begin}, the one before it ends at {end}")
        end = place.end
        tensors[name] = _stored(file, _DTYPES[place.dtype], place.shape, 8 + header_size + place.begin)
    return {name: tensors[name] for name in places}


class _TensorSpan(NamedTuple):
    """Where in a file a tensor lies: bytes from `begin` to `end` after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _place(dtype: Any, shape: Any, data_offsets: Any) -> _TensorSpan:
    """Raises ValueError or TypeError for an entry of a header that describes no tensor."""
    begin, end = data_offsets
    numbers = [begin, end, *shape]
    sound = type(dtype) is str and type(shape) is list and all(type(number) is int for number in numbers)
    if not sound or min(numbers) < 0 or end < begin or math.prod(side or 1 for side in shape) > LARGEST_TENSOR:
        raise ValueError(f"expected type, shape and place of a tensor, found {dtype}, {shape}, {data_offsets}")
    return _TensorSpan(dtype, tuple(shape), begin, end)


def _stored(file: epath.Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> LazyTensor:
    def fetch() -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        if size and "://" not in str(file):
            # A mapping of its own for each tensor: its pages are given back with it.
            return np.memmap(file, dtype, "r", offset, shape)
        with file.open("rb") as stream:
            stream.seek(offset)
            return np.frombuffer(stream.read(size), dtype).reshape(shape)

    return LazyTensor(shape, dtype, fetch)


def write_tensors(path: epath.PathLike, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Writes one .safetensors file under a temporary name, then renames it: a file with the final name is complete.

    Of a model folder the hashes go first, as with `write_shards`.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        _write_file(temporary, tensors, metadata)
        (path.parent / HASHES).unlink(missing_ok=True)


def write_shards(
    folder: epath.PathLike, stem: str, tensors: Tensors, shard_bytes: int = SHARD_BYTES
) -> dict[str, list]:
    """Writes `stem`.safetensors, or above `shard_bytes` shards with an index, named as diffusers and transformers do.

    All files are complete before the first gets its final name, and the index comes last. What an earlier save of other
    shards left is removed, its hashes first. Returns what `write_hashes` takes.
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
    for file in folder.glob("*.safetensors"):
        if ours.fullmatch(file.name) and file.name not in names:
            file.unlink()
    if count > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        content = {"metadata": {"total_size": sum(map(_size, tensors.values()))}, "weight_map": weight_map}
        write_json(index, content)
        hashes[index.name] = size_and_sha256(index)
    return hashes


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
    """One file, never holding more than one tensor, and its fingerprint; one that could not be finished is removed."""
    # Widest type first, so that every tensor lies aligned.
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
                # A buffer is written as it lies, so a transposed view has to be copied first.
                values = np.asarray(tensors[name], order="C").reshape(-1).view(np.uint8).data
                stream.write(values)
                digest.update(values)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return [len(start) + end, digest.hexdigest()]
