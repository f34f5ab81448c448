"""Compiled programs, kept in the user's cache folder so that a later process does not compile them again."""

import contextlib
import hashlib
import os
import pathlib
import platform
from collections.abc import Iterator

import platformdirs

MOST_BYTES = 2**31
CPU_INFO = pathlib.Path("/proc/cpuinfo")


def use_compile_cache(folder: str | os.PathLike | None = None, most_bytes: int = MOST_BYTES) -> None:
    """Makes JAX store every program that it compiles in `folder`, and reuse the programs stored there.

    The default is a folder in the user's cache folder, unless the environment sets JAX_COMPILATION_CACHE_DIR. If the
    files take more than `most_bytes`, the least recently used are removed until the rest take at most half of that. JAX
    compiles again what it cannot read, so a damaged file costs only the compilation of one program.
    """
    import jax

    if folder is None:
        if jax.config.values["jax_compilation_cache_dir"] is not None:
            return
        folder = default_folder()
    with contextlib.suppress(OSError):  # a home that is read-only: JAX warns, and compiles
        prune(pathlib.Path(folder), most_bytes)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def default_folder() -> pathlib.Path:
    """One folder for each kind of processor, since machines that share a home cannot run each other's programs."""
    features = [line for line in cpu_lines() if line.startswith(("model name", "flags", "Features"))]
    kind = hashlib.sha256("\n".join([platform.machine(), *features[:2]]).encode()).hexdigest()[:12]
    return platformdirs.user_cache_path("jsurgery") / "compiled" / kind


def cpu_lines() -> list[str]:
    return CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []


def prune(folder: pathlib.Path, most_bytes: int) -> None:
    """Removes the least recently used files. Other processes may add and remove files meanwhile."""
    files = sorted(sizes(folder), reverse=True)
    total = sum(size for _, size, _ in files)
    if total <= most_bytes:
        return
    while files and total > most_bytes // 2:
        _, size, file = files.pop()
        file.unlink(missing_ok=True)
        total -= size


def sizes(folder: pathlib.Path) -> Iterator[tuple[float, int, pathlib.Path]]:
    """(time of the last use, bytes, path) of each file."""
    if not folder.is_dir():
        return
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            stat = entry.stat()
            yield max(stat.st_atime, stat.st_mtime), stat.st_size, pathlib.Path(entry.path)
