"""Reads files, with a message of one line for a bad one, and writes files completely or not at all."""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath

from jsurgery.errors import InputError, shortened

AnyPath = TypeVar("AnyPath", epath.Path, pathlib.Path)
LONG_NAME = 120  # bytes; file systems allow 255, some 143
# Flags whose values are texts and no paths.
TEXT_FLAGS = ("--prompt", "--negative_prompt", "--config.sampler.negative_prompt", "--name")
# The first bytes of formats that are not read, and what to do.
FORMATS = (
    (b"GGUF", "a GGUF file, which is not read; take the same model's .safetensors in bfloat16"),
    (b"ggjt", "a GGML file, which is not read; take the same model's .safetensors in bfloat16"),
    (b"\x89HDF", "an HDF5 file, which is not read"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
)
POINTER, PAGE, PICKLE = "a git-LFS pointer; run `git lfs pull`", "an HTML or XML page", "a pickle"


def describe_foreign_file(start: bytes, size: int) -> str | None:
    """What kind of file this is, by its first bytes `start` and its `size`, or None if these do not show it."""
    text = start[:200].lstrip().lower()
    if not size:
        return "an empty file"
    if text.startswith(b"version https://git-lfs"):
        return POINTER
    if text.startswith(b"<"):
        return f"{PAGE}, perhaps a download that needed a login"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return f"{PICKLE}, as torch.save writes, which was not unpickled; `jsurgery convert` reads .pth, .pt and .bin"
    return next((kind for magic, kind in FORMATS if start.startswith(magic)), None)


def damaged(
    file: epath.PathLike, start: bytes, size: int, fault: object, expected: str = "a safetensors file"
) -> InputError:
    """The error for a file that is not what was expected, with the likely cause. `start` are the file's first bytes."""
    kind = describe_foreign_file(start, size)
    if kind is None and len(start) > 8 and all(32 <= byte < 127 or byte in b"\r\n\t" for byte in start):
        kind = f"the text {start.decode()[:60]!r}, perhaps a server's answer; download the file again"
    cause = f"its {size} bytes are truncated or damaged ({fault}); download it again"
    return InputError(f"{file}: not {expected}: {cause if kind is None else f'it is {kind}'}")


def read_json(path: epath.PathLike, expected: str = "JSON") -> Any:
    """The content of a JSON file. Raises InputError, with the likely cause, if it is missing or is not JSON."""
    path = epath.Path(path)
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise InputError(f"{path}: expected {expected}, found {getattr(error, 'strerror', None) or error}") from None
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        actual = describe_foreign_file(content[:200], len(content)) or f"{error}"
        raise InputError(f"{path}: expected {expected}, found {actual}") from None


def read_object(path: epath.PathLike, expected: str = "JSON") -> dict[str, Any]:
    """The content of a JSON file that must be an object; otherwise like `read_json`."""
    content = read_json(path, expected)
    if not isinstance(content, dict):
        expected = "a JSON object" if expected == "JSON" else expected
        raise InputError(f"{path}: expected {expected}, found {shortened(content)}")
    return content


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Text in UTF-8, or in UTF-16 if it says so in its first two bytes, as files of Windows do.

    Raises ValueError for other bytes where `errors` is "strict".
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="strict" if errors == "strict" else "replace")
    return content.decode("utf-8-sig", errors=errors)


def matching(folder: epath.PathLike, pattern: str) -> list[epath.Path]:
    """The files and folders in `folder` whose names match the pattern, sorted.

    epath's own `glob` takes brackets, stars and question marks in the folder's path for a pattern as well.
    """
    return sorted(epath.Path(glob.escape(str(folder))).glob(pattern))


def temporary_name(name: str, suffix: str = ".tmp") -> str:
    """The name under which a file is written until it is complete, which is longer: a hash stands for a long name.

    Of a library that chooses the format by the name, `suffix` is the format's.
    """
    if len(name.encode(errors="surrogatepass")) > LONG_NAME:
        name = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:32]
    return name + suffix if suffix == ".tmp" else f".{name}{suffix}"


def check_writable(path: epath.PathLike, flag: str) -> None:
    """Raises InputError, naming `flag`, unless a file can be written under this name. Makes its folder.

    To be called before the work whose result the file holds. Writes an empty file of another name and removes it.
    """
    path = epath.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if "://" not in str(path) and hasattr(os, "pathconf"):
            longest, length = os.pathconf(path.parent, "PC_NAME_MAX"), len(os.fsencode(path.name))
            if length > longest:
                raise InputError(f"{flag}={path}: expected a name of at most {longest} bytes, found {length}")
        if path.is_dir():
            raise InputError(f"{flag}={path}: expected a file, found a folder")
        # Renaming onto a device, as root, would put a file in its place, for all programs of the machine.
        other = "://" not in str(path) and os.path.exists(path) and not os.path.isfile(path)  # epath says all are files
        if other or os.path.realpath(path.parent) == "/dev":
            raise InputError(f"{flag}={path}: expected the name of a file, found a device or a pipe")
        probe = path.with_name(temporary_name(path.name, ".probe"))
        probe.write_bytes(b"")
        probe.unlink()
    except (OSError, ImportError, ValueError) as error:  # ValueError: no name of a file
        raise InputError(f"{flag}={path}: {getattr(error, 'strerror', None) or error}") from None


def check_local(path: object, flag: str, reason: str) -> None:
    """Raises InputError for a path on an object store, with the `reason` why it has to be a local one."""
    if "://" in str(path):
        raise InputError(f"{flag}={path}: expected a local folder, since {reason}")


def resolve_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, with ~ at the beginning of a path expanded, which few shells do in --flag=~/path.

    Raises InputError for a path on a store other than gs://.
    """
    resolved: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if (flag or (resolved[-1] if resolved else "")) not in TEXT_FLAGS:
            if re.match(r"~[\w.-]*(/|$)", value):
                value = os.path.expanduser(value)
            if (scheme := re.match(r"([a-z][a-z0-9+.-]*)://", value)) and scheme[1] != "gs":
                raise InputError(f"{flag}{equals}{value}: expected a local path or gs://, found {scheme[1]}://")
        resolved.append(flag + equals + value)
    return resolved


@contextlib.contextmanager
def replacing(path: AnyPath, name: str | None = None) -> Iterator[AnyPath]:
    """A temporary path beside `path` to write to. It is renamed to `path` when the block ends without an error.

    A file or folder under its final name is therefore complete, whenever the process was stopped.
    """
    temporary = path.with_name(name or temporary_name(path.name))
    yield temporary
    temporary.replace(path)


@contextlib.contextmanager
def replacing_locally(path: epath.Path, name: str | None = None) -> Iterator[pathlib.Path]:
    """Like `replacing`, for libraries that write to local files alone.

    For a path on an object store (gs://), the temporary path is in a folder of this machine, which needs room for the
    file. When the block ends, the file is uploaded under the temporary name, and then gets its own.
    """
    with replacing(path, name) as temporary:
        if "://" not in str(path):
            yield pathlib.Path(temporary)
            return
        with tempfile.TemporaryDirectory() as folder:
            local = pathlib.Path(folder, temporary.name)
            yield local
            epath.Path(local).copy(temporary, overwrite=True)


def save_array(path: epath.Path, array: np.ndarray) -> None:
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array)


def load_array(path: epath.Path) -> np.ndarray:
    with path.open("rb") as stream:
        return np.load(stream)


def write_json(path: AnyPath, content: Any, indent: int | None = 2) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")
