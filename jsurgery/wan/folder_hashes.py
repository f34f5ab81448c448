"""hashes.json: the size and sha256 of every file of a model folder, compared whenever the folder is opened.

safetensors and JSON files do not show that a bit has changed. A folder without hashes.json is not checked, except for
a snapshot in the cache of the Hub's client, where files are named by their hashes.
"""

import contextlib
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

# The name of a file in the folder. It cannot lead out of the folder.
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
READ = (".json", ".safetensors", ".model")  # the ends of names of files that a part of a model has
LARGE = 1 << 26  # bytes from which a file that was found intact is remembered across processes
# Files whose hash this process has verified, each with its size, times and inode.
_verified: set[tuple] = set()


def write_hashes(folder: epath.PathLike, written: Mapping[str, list[Any]], *others: str) -> None:
    """Completes a model folder with its hashes.json.

    `written` holds [size, sha256] by file name, as `write_shards` returns them. `others` are hashed here.
    """
    folder = epath.Path(folder)
    hashes = {**written, **{name: size_and_sha256(folder / name) for name in others}}
    with replacing(folder / HASHES) as temporary:
        temporary.write_text(manifest_text(dict(sorted(hashes.items()))))


def check_hashes(path: epath.PathLike) -> None:
    """Compares the files of a folder, or one file, with their recorded hashes, if there are any.

    Raises InputError naming the first file that is missing or has changed. A process reads an intact file only once,
    unless the file's times, size or inode change (on object stores: its time or size); a large file is read once by all
    processes of a user on a machine, since hashing the 17 GB of Wan2.1 1.3B takes longer than most commands that read a
    part of them.
    """
    path = epath.Path(path)
    folder = path if path.is_dir() else path.parent
    recorded = _recorded(folder)
    if folder != path:
        recorded = {name: fields for name, fields in recorded.items() if name == path.name}
    with ThreadPoolExecutor(THREADS) as pool:
        faults = list(pool.map(lambda name: _fault(folder / name, *recorded[name]), recorded))
    if damaged := [(name, fault) for name, fault in zip(recorded, faults, strict=True) if fault]:
        (name, fault), *more = damaged
        others = f"; {len(more)} more files are damaged or missing" if more else ""
        intended = f", or remove {HASHES} if the change was intended" if (folder / HASHES).exists() else ""
        raise InputError(f"{folder / name}: {fault}{others}; restore it or download it again{intended}")


def _recorded(folder: epath.Path) -> dict[str, tuple[int | None, str]]:
    """(size or None, hash) by file name. Raises InputError for a damaged hashes.json."""
    file = folder / HASHES
    if not file.exists():
        return _blobs(folder)
    files = read_object(file, "the hashes of a model folder as JSON").get("files")
    if not isinstance(files, dict) or file.read_bytes() != manifest_text(files).encode():
        raise InputError(
            f"{file}: damaged, or changed since it was written; restore it, or remove it to skip the check"
        )
    for name, fields in files.items():
        if not _NAME.fullmatch(name) or not isinstance(fields, list) or [type(field) for field in fields] != [int, str]:
            raise InputError(f"{file}: expected size and hash of files in this folder, found {name!r}: {fields!r}")
    return {name: (size, digest) for name, (size, digest) in files.items()}


def _blobs(folder: epath.Path) -> dict[str, tuple[int | None, str]]:
    """The hashes in a snapshot of the Hub's cache, whose files are links to blobs/HASH.

    HASH is the sha256 of a large file and git's SHA-1 of a small one. In any folder, links that lead to nothing are
    there too, with an empty hash: a file that is missing for another reason may be optional.
    """
    if "://" in str(folder) or not folder.is_dir():
        return {}
    targets = {file.name: os.readlink(file) for file in pathlib.Path(folder).iterdir() if file.is_symlink()}
    blob = re.compile(r"(?:^|/)blobs/([0-9a-f]{64}|[0-9a-f]{40})$")
    dangling = [name for name in targets if name.endswith(READ) and not (folder / name).exists()]
    found: dict[str, tuple[int | None, str]] = dict.fromkeys(dangling, (None, ""))
    return found | {name: (None, match[1]) for name, target in targets.items() if (match := blob.search(target))}


def dangling_link(file: epath.Path) -> str | None:
    """What is wrong with a file that is not there if a link of its name leads to nothing; else None."""
    if "://" in str(file) or not os.path.islink(file) or file.exists():
        return None
    return f"a link to {os.readlink(file)}, where nothing is; copy what links lead to as well (cp -rL)"


def _fault(file: epath.Path, size: int | None, expected: str) -> str | None:
    """What is wrong with a file, or None."""
    if not file.exists():
        return dangling_link(file) or "missing: it was written with the folder"
    stat = file.stat()
    length, status = stat.length, None
    if size is not None and length != size:
        with file.open("rb") as stream:
            kind = describe_foreign_file(stream.read(200), length)
        return f"truncated or changed: {length} bytes, was written with {size}" + (f"; it is {kind}" if kind else "")
    if "://" in str(file):
        if not processes.is_first():
            return None  # all processes share this file, and process 0 checks it
        if stat.mtime:  # 0 where the store does not tell it
            status = (str(file), length, stat.mtime, expected)
    else:
        local = os.stat(file)
        status = (str(file.resolve()), local.st_ino, length, local.st_mtime_ns, local.st_ctime_ns, expected)
    if status is not None and (status in _verified or (length >= LARGE and _marker(status).exists())):
        return None
    actual = size_and_sha256(file)[1] if len(expected) != 40 else _git_sha1(file, length)
    if actual != expected:
        return "damaged, or changed since it was written: its hash differs"
    if status is not None:
        _verified.add(status)
        if length >= LARGE:
            with contextlib.suppress(OSError):  # a home that is read-only
                _marker(status).parent.mkdir(parents=True, exist_ok=True)
                _marker(status).touch()
    return None


def _marker(status: tuple) -> pathlib.Path:
    """The empty file that says that a file was intact when it had these times, size and inode."""
    import platformdirs  # not on every machine that runs `make gpu-evidence`, which loads no large file

    return platformdirs.user_cache_path("jsurgery") / "intact" / hashlib.sha256(repr(status).encode()).hexdigest()


def _git_sha1(file: epath.Path, length: int) -> str:
    """The hash of git's blob with the file's content."""
    digest = hashlib.sha1(b"blob %d\0" % length, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
