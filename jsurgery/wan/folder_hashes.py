"""Sizes and sha256 of a model folder's files: beside them in hashes.json, compared whenever the folder is opened.

safetensors and JSON know nothing of a bit that has changed. A folder without hashes.json is not checked, except in the
cache of the Hub's client, where files lie under their hashes.
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.files import describe_foreign_file, read_object, replacing
from jsurgery.io.hashes import BLOCK, HASHES, THREADS, manifest_text, size_and_sha256
from jsurgery.runtime import processes

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")  # of a file in the folder; nothing that leads out of it
_verified: set[tuple] = set()  # files that this process has found as they should be, and that have not changed since


def write_hashes(folder: epath.PathLike, written: Mapping[str, list[Any]], *others: str) -> None:
    """Ends the writing of a model folder: `written` has fingerprints by name, those of `others` are taken now."""
    folder = epath.Path(folder)
    found = {**written, **{name: size_and_sha256(folder / name) for name in others}}
    with replacing(folder / HASHES) as temporary:
        temporary.write_text(manifest_text(dict(sorted(found.items()))))


def check_hashes(path: epath.PathLike) -> None:
    """Compares a folder's files, or one file, with what is recorded of them, if there is anything.

    Raises InputError naming the first file that is missing or is not as it was written. A file that is as it should be
    is read once in a process, unless it changes.
    """
    path = epath.Path(path)
    folder = path if path.is_dir() else path.parent
    recorded = _recorded(folder)
    if folder != path:
        recorded = {name: fields for name, fields in recorded.items() if name == path.name}
    with ThreadPoolExecutor(THREADS) as pool:
        faults = list(pool.map(lambda name: _fault(folder / name, *recorded[name]), recorded))
    if found := [(name, fault) for name, fault in zip(recorded, faults, strict=True) if fault]:
        (name, fault), *more = found
        others = f"; so are or are missing {len(more)} more" if more else ""
        meant = f", or remove {HASHES} if the change was meant" if (folder / HASHES).exists() else ""
        raise InputError(f"{folder / name}: {fault}{others}; restore it or download it again{meant}")


def _recorded(folder: epath.Path) -> dict[str, tuple[int | None, str]]:
    """(size, hash) by file name."""
    file = folder / HASHES
    if not file.exists():
        return _blobs(folder)
    files = read_object(file, "the hashes of a model folder as JSON").get("files")
    if not isinstance(files, dict) or file.read_bytes() != manifest_text(files).encode():
        raise InputError(f"{file}: damaged, or changed since it was written; restore it, or remove it to go without")
    for name, fields in files.items():
        if not _NAME.fullmatch(name) or not isinstance(fields, list) or [type(one) for one in fields] != [int, str]:
            raise InputError(f"{file}: expected size and hash of files in this folder, found {name!r}: {fields!r}")
    return {name: (size, digest) for name, (size, digest) in files.items()}


def _blobs(folder: epath.Path) -> dict[str, tuple[int | None, str]]:
    """Of a snapshot in the Hub's cache, whose files are links to blobs/HASH: sha256 of large files, git's of others."""
    if "://" in str(folder) or not folder.is_dir():
        return {}
    targets = {file.name: os.readlink(file) for file in pathlib.Path(folder).iterdir() if file.is_symlink()}
    found = {name: re.search(r"(?:^|/)blobs/([0-9a-f]{64}|[0-9a-f]{40})$", target) for name, target in targets.items()}
    return {name: (None, match[1]) for name, match in found.items() if match}


def _fault(file: epath.Path, size: int | None, expected: str) -> str | None:
    """What is wrong with a file; None: nothing."""
    if not file.exists():
        return "missing: it was written with the folder"
    length, status = file.stat().length, None
    if size is not None and length != size:
        with file.open("rb") as stream:
            kind = describe_foreign_file(stream.read(200), length)
        return f"truncated or changed: {length} bytes, was written with {size}" + (f"; it is {kind}" if kind else "")
    if "://" in str(file):
        if not processes.is_first():
            return None  # what all processes share, one of them reads twice
    else:
        stat = os.stat(file)
        status = (str(file.resolve()), stat.st_ino, length, stat.st_mtime_ns, stat.st_ctime_ns, expected)
        if status in _verified:
            return None
    found = size_and_sha256(file)[1] if len(expected) != 40 else _git_sha1(file, length)
    if found != expected:
        return "damaged, or changed since it was written: its hash is another"
    if status is not None:
        _verified.add(status)
    return None


def _git_sha1(file: epath.Path, length: int) -> str:
    digest = hashlib.sha1(b"blob %d\0" % length, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
