"""An object store behind `gs://`, without folders and renames, and a client that is killed at a chosen change."""

import base64
import contextlib
import hashlib
import http.server
import io
import os
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import fsspec
import jax
import numpy as np
import orbax.checkpoint
import pytest
import tensorboardX
from etils import epath
from etils.epath import backend as backends
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from jsurgery.io.files import load_array, save_array


class Killed(BaseException):
    """Raised at the change at which the client is killed. Changes after it have no effect."""


class FakeGcs(AbstractFileSystem):
    """One bucket in memory. An object appears when its writer closes it.

    The client is killed before change number `killed_at`; puts, copies and deletions of objects are changes. `read` has
    the names of the objects that were opened to be read. Reading asks for ranges of bytes as gcsfs does, reading ahead
    included; `bytes_read` counts them. `hashes`: whether the store tells their MD5.
    """

    protocol = ("gcs", "gs")
    cachable = False

    def __init__(self, **_: Any):
        super().__init__()
        self.objects: dict[str, bytes] = {}
        self.times: dict[str, int] = {}  # of objects, where a test gives them
        self.changes, self.killed_at, self.bytes_read = 0, 0, 0
        self.read: list[str] = []
        self.hashes = True

    def alive(self) -> bool:
        """Counts a change; returns whether it has an effect."""
        self.changes += 1
        if self.changes == self.killed_at:
            raise Killed
        return not self.killed_at or self.changes < self.killed_at

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(path).removeprefix("gs://").strip("/")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path in self.objects:
            content = self.objects[path]
            digest = base64.b64encode(hashlib.md5(content).digest()).decode()
            hashed = {"md5Hash": digest} if self.hashes else {}
            timed = {"mtime": self.times[path]} if path in self.times else {}
            return {"name": path, "size": len(content), "type": "file", **hashed, **timed}
        if any(key.startswith(f"{path}/") for key in self.objects):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list:
        path = self._strip_protocol(path)
        if path in self.objects:
            return [self.info(path)] if detail else [path]
        below = {key[len(path) + 1 :].split("/")[0] for key in self.objects if key.startswith(f"{path}/")}
        if not below:
            raise FileNotFoundError(path)
        found = [self.info(f"{path}/{name}") for name in sorted(below)]
        return found if detail else [one["name"] for one in found]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if "r" in mode:
            if path not in self.objects:
                raise FileNotFoundError(path)
            self.read.append(path)
            return Download(self, path)
        return Upload(self, path)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        content = self.objects[self._strip_protocol(path1)]
        if self.alive():
            self.objects[self._strip_protocol(path2)] = content

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        if self.alive():
            del self.objects[path]

    def rm(self, path: str, recursive: bool = False, **_: Any) -> None:
        path = self._strip_protocol(path)
        below = [key for key in self.objects if key.startswith(f"{path}/")] if recursive else []
        for key in below or [path]:
            self.rm_file(key)

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Folders are parts of names."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are parts of names."""

    def rmdir(self, path: str) -> None:
        """Folders are parts of names."""


class Download(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.bytes_read += end - start
        return self.fs.objects[self.path][start:end]


class Upload(io.BytesIO):
    def __init__(self, store: FakeGcs, path: str):
        super().__init__()
        self.store, self.path = store, path

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            if self.store.alive():
                self.store.objects[self.path] = content


class FakeCheckpointer:
    """Writes and reads a state through etils, in place of Orbax, whose writer needs Google's servers."""

    def save(self, path: epath.Path, state: Any, force: bool) -> None:
        if path.exists():
            path.rmtree()
        for number, leaf in enumerate(jax.tree.leaves(state)):
            save_array(path / "d" / f"{number}.npy", np.asarray(leaf))
        (path / "commit_success.txt").write_text("")

    def restore(self, path: epath.Path, abstract: Any) -> Any:
        leaves, structure = jax.tree.flatten(abstract)
        found = [load_array(path / "d" / f"{number}.npy") for number in range(len(leaves))]
        return jax.tree.unflatten(structure, found)

    def wait_until_finished(self) -> None:
        """Everything is written when `save` returns."""

    def close(self) -> None:
        """Nothing is open."""


class SilentBoard:
    """In place of TensorBoard's writer, which needs Google's servers, too."""

    def __init__(self, *_: Any):
        """Takes a folder."""

    def add_scalar(self, *_: Any) -> None:
        """Writes nothing."""

    def flush(self) -> None:
        """Writes nothing."""


def empty_bucket(monkeypatch: pytest.MonkeyPatch) -> FakeGcs:
    """A store that all `gs://` paths go to from now on."""
    fsspec.register_implementation("gcs", FakeGcs, clobber=True)
    store, local = FakeGcs(), fsspec.filesystem("file")
    find = lambda name: local if name == "file" else store
    monkeypatch.setattr(backends.fsspec_backend, "_get_filesystem", find)
    monkeypatch.setattr(epath.gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(orbax.checkpoint, "StandardCheckpointer", FakeCheckpointer)
    monkeypatch.setattr(tensorboardX, "SummaryWriter", SilentBoard)
    return store


@contextlib.contextmanager
def served(store: FakeGcs) -> Iterator[None]:
    """Inside the block, Google's C++ client, by which ArrayRecord reads gs://, gets the objects of `store`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        """Answers GET /storage/v1/b/BUCKET/o/NAME?alt=media with the range of bytes that is asked for."""

        def do_GET(self) -> None:
            bucket, _, name = self.path.partition("?")[0].removeprefix("/storage/v1/b/").partition("/o/")
            content = store.objects.get(f"{bucket}/{urllib.parse.unquote(name)}")
            if content is None:
                self.send_error(404)
                return
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(content) - int(last))
            end = int(last) + 1 if first and last else len(content)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content[start:end])))
            self.end_headers()
            self.wfile.write(content[start:end])

        def log_message(self, *_: Any) -> None:
            """Keeps the tests' output free of requests."""

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["CLOUD_STORAGE_EMULATOR_ENDPOINT"] = f"http://localhost:{server.server_address[1]}"
    try:
        yield
    finally:
        del os.environ["CLOUD_STORAGE_EMULATOR_ENDPOINT"]
        server.shutdown()
        server.server_close()
