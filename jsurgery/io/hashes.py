"""Hashes of files, and manifests: the size and a hash of every file of a folder, to find damage later."""

import base64
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from jsurgery.io.files import AnyPath, matching, replacing

MANIFEST = "manifest.json"  # of a saved training state; see `jsurgery.runtime.checkpoints`
HASHES = "hashes.json"  # of a model folder; see `jsurgery.wan.folder_hashes`
MD5 = "md5:"  # before the hash of an object, which its store computed
BLOCK = 1 << 24  # bytes read at once
THREADS = 8


def write_manifest(folder: epath.Path) -> None:
    """Hashes every file of the folder into its manifest, as the last step of writing it.

    A folder with a manifest is therefore complete. On gs:// the hash is the MD5 that the store computed from the bytes
    it received, and no file is read again; elsewhere, and for an object without one, it is a sha256.
    """
    (folder / (MANIFEST + ".tmp")).unlink(missing_ok=True)  # left by a process that was killed
    known = stored_hashes(folder) if str(folder).startswith("gs://") else {}
    names = sorted(files(folder))
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: known.get(name) or size_and_sha256(folder / name), names)
        hashes = dict(zip(names, found, strict=True))
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(manifest_text(hashes))


def find_damage(folder: epath.Path) -> list[str]:
    """The differences between a folder and its manifest: one line for each file that is missing or has changed.

    File names are relative to `folder`. A manifest that is missing or damaged is itself reported.
    """
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        expected = json.loads(text)["files"]
        intact = text == manifest_text(expected)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact, expected = False, {}
    if not intact:
        return [f"{MANIFEST} is not as it was written"]

    def fault(name: str) -> str | None:
        file, (size, digest) = folder / name, expected[name]
        if not file.exists():
            return f"{name} is missing"
        if (length := file.stat().length) != size:
            return f"{name} has {length} bytes, was written with {size}"
        actual = size_and_md5(file) if digest.startswith(MD5) else size_and_sha256(file)
        return f"{name} is not as it was written" if actual != [size, digest] else None

    with ThreadPoolExecutor(THREADS) as pool:
        return [line for line in pool.map(fault, expected) if line]


def manifest_text(hashes: dict[str, list[Any]]) -> str:
    """The JSON of a manifest: [size, hash] by file name, and a hash of these entries that shows damage to them."""
    digest = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    return json.dumps({"files": hashes, "sha256": digest}, indent=1) + "\n"


def files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """The names of all files in a folder and its subfolders, relative to it, except its manifest."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files(path, f"{prefix}{path.name}/")
        elif prefix + path.name != MANIFEST:
            yield prefix + path.name


def stored_hashes(folder: epath.Path) -> dict[str, list[Any]]:
    """[bytes, "md5:" + hexadecimal MD5] by file name, as a store lists its objects; without those that have none."""
    from etils.epath.backend import fsspec_backend

    store = fsspec_backend.fs(folder)
    store.invalidate_cache()  # which does not know what Orbax has written
    listed: Any = store.find(str(folder), detail=True)  # names without gs://
    below = str(folder).removeprefix("gs://") + "/"
    return {
        name.removeprefix(below): [of["size"], MD5 + base64.b64decode(of["md5Hash"]).hex()]
        for name, of in listed.items()
        if of.get("md5Hash")
    }


def size_and_md5(file: AnyPath) -> list[Any]:
    """[bytes, "md5:" + hexadecimal MD5] of a file."""
    size, digest = _size_and_digest(file, hashlib.md5(usedforsecurity=False))
    return [size, MD5 + digest]


def size_and_sha256(file: AnyPath) -> list[Any]:
    """[bytes, hexadecimal sha256] of a file."""
    return _size_and_digest(file, hashlib.sha256())


def _size_and_digest(file: AnyPath, digest: Any) -> list[Any]:
    size = 0
    # Not hashlib.file_digest, which needs `readinto`: streams of object stores do not have it.
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]


def folder_fingerprint(folder: epath.Path) -> str:
    """A short hash that identifies a model folder: of every file's name and size, and of its first and last MiB.

    The folder's hashes.json does not count.
    """
    digest = hashlib.sha256()
    paths = (path for level in ("*", "*/*") for path in matching(folder, level) if path.name != HASHES)
    for file in sorted(path for path in paths if not path.is_dir()):
        size = file.stat().length
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:16]
