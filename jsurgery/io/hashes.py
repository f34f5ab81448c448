"""A manifest: the size and sha256 of every file of a folder. What it does not find changed is as it was written."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from jsurgery.io.files import AnyPath, replacing

MANIFEST = "manifest.json"
BLOCK = 1 << 24  # bytes read at once
THREADS = 8


def write_manifest(folder: epath.Path) -> None:
    """Hashes every file of the folder. A folder with a manifest is complete."""
    (folder / (MANIFEST + ".tmp")).unlink(missing_ok=True)  # of a process that was killed
    names = sorted(files(folder))
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(names, pool.map(lambda name: size_and_sha256(folder / name), names), strict=True))
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(manifest_text(found))


def find_damage(folder: epath.Path) -> list[str]:
    """What the manifest finds changed: a line for every file, named from `folder` on; none when all is as written."""
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        expected = json.loads(text)["files"]
        intact = text == manifest_text(expected)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact, expected = False, {}
    if not intact:
        return [f"{MANIFEST} is not as it was written"]

    def compared(name: str) -> str | None:
        file, (size, digest) = folder / name, expected[name]
        if not file.exists():
            return f"{name} is missing"
        if (found := file.stat().length) != size:
            return f"{name} has {found} bytes, was written with {size}"
        return f"{name} is not as it was written" if size_and_sha256(file) != [size, digest] else None

    with ThreadPoolExecutor(THREADS) as pool:
        return [line for line in pool.map(compared, expected) if line]


def manifest_text(found: dict[str, list[Any]]) -> str:
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    return json.dumps({"files": found, "sha256": digest}, indent=1) + "\n"


def files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Names below a folder, from it on."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files(path, f"{prefix}{path.name}/")
        elif prefix + path.name != MANIFEST:
            yield prefix + path.name


def size_and_sha256(file: AnyPath) -> list[Any]:
    """[bytes, hexadecimal sha256]. Streams of object stores have no `readinto`, which hashlib.file_digest needs."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]


def folder_fingerprint(folder: epath.Path) -> str:
    """A hash of a model folder's small files and of the size and both ends of its large ones; not of its own hashes."""
    digest = hashlib.sha256()
    files = (path for level in ("*", "*/*") for path in folder.glob(level) if path.name != "hashes.json")
    for file in sorted(path for path in files if not path.is_dir()):
        size = file.stat().length
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:16]


HASHES = "hashes.json"
