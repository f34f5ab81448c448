"""Reads files, with a message of one line for a bad one, and writes files completely or not at all."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from etils import epath

from jsurgery.errors import InputError

AnyPath = TypeVar("AnyPath", epath.Path, pathlib.Path)
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
        return f"{PICKLE}, as torch.save writes, which was not unpickled"
    return None


def damaged(
    file: epath.PathLike, start: bytes, size: int, fault: object, expected: str = "a safetensors file"
) -> InputError:
    """The error for a file that is not what was expected, with the likely cause. `start` are the file's first bytes."""
    kind = describe_foreign_file(start, size)
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


def shortened(value: Any, length: int = 80) -> str:
    """A value's repr for a message, cut after `length` characters."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "…"


@contextlib.contextmanager
def replacing(path: AnyPath, temporary_name: str | None = None) -> Iterator[AnyPath]:
    """A temporary path beside `path` to write to. It is renamed to `path` when the block ends without an error.

    A file or folder under its final name is therefore complete, whenever the process was stopped.
    """
    temporary = path.with_name(temporary_name or path.name + ".tmp")
    yield temporary
    temporary.replace(path)


@contextlib.contextmanager
def replacing_locally(path: epath.Path, temporary_name: str | None = None) -> Iterator[pathlib.Path]:
    """Like `replacing`, for libraries that write to local files alone.

    For a path on an object store (gs://), the temporary path is in a folder of this machine, which needs room for the
    file. When the block ends, the file is uploaded under the temporary name, and then gets its own.
    """
    with replacing(path, temporary_name) as temporary:
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
