"""Downloads models of the Hugging Face Hub, only when the user names one, and turns its client's errors into ours."""

import contextlib
import contextvars
import functools
import pathlib
import re
from collections.abc import Callable, Iterator

from etils import epath

from jsurgery.errors import InputError

# Weights (never pickles), configs and tokenizers.
FILES = ["*.safetensors", "*.json", "*.model"]
CONFIGS = ["*.json"]
WITHOUT_WEIGHTS = ["*.json", "*.model"]

# The snapshots that have no weights, since these were left where they are; None: weights are downloaded.
_without_weights: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("without_weights", default=None)


@contextlib.contextmanager
def leaving_weights() -> Iterator[None]:
    """Within it a repository's weights are not downloaded, for a dry run: configs and tokenizer are."""
    token = _without_weights.set(set())
    try:
        yield
    finally:
        _without_weights.reset(token)


def lacks_weights(folder: epath.Path) -> bool:
    """Whether a folder is a snapshot whose weights `leaving_weights` has left where they are."""
    return str(folder) in (_without_weights.get() or ())


def repository(path: str) -> tuple[str, str | None] | None:
    """(ORG/NAME, revision or None) of a path of the form ORG/NAME or ORG/NAME@REVISION; None if such a file exists."""
    named = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", path)
    return None if not named or epath.Path(path).exists() else (named[1], named[2])


def local_path(path: str, check: Callable[[epath.Path], None] | None = None) -> str:
    """The snapshot of a repository ORG/NAME or ORG/NAME@REVISION; any other path, and one that exists, as it is.

    A complete snapshot in the Hub's cache is used without a network. `check` is called with a snapshot that has the
    configs alone, before the weights are downloaded; see `leaving_weights`. Raises InputError when there is no such
    repository or revision, or when the Hub cannot be reached.
    """
    named = repository(path)
    if named is None:
        return path
    import huggingface_hub

    with hub_errors_as_input_errors(
        f"{path}: no such folder, and not to be had from the Hub", f"{path}: no such folder, and the Hub"
    ):
        download = functools.partial(huggingface_hub.snapshot_download, named[0], revision=named[1])
        if check is not None:
            check(epath.Path(download(allow_patterns=CONFIGS)))
        if (left := _without_weights.get()) is None:
            return download(allow_patterns=FILES)
        snapshot = download(allow_patterns=WITHOUT_WEIGHTS)
        if not any(pathlib.Path(snapshot).rglob("*.safetensors")):
            left.add(str(snapshot))
        return snapshot


@contextlib.contextmanager
def hub_errors_as_input_errors(refused: str, unreachable: str) -> Iterator[None]:
    """Turns errors of the Hub's client into an InputError of one line.

    The line begins with `refused`, or with `unreachable` where the network failed.
    """
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError, RevisionResolutionError

    # hf_xet, which transfers the large files, raises a bare RuntimeError when the network fails.
    known = OSError, RuntimeError, HFValidationError, CachedRepoTreeNotFoundError, RevisionResolutionError
    try:
        yield
    except known as error:
        raise InputError(f"{refused}: {_first_line(error)}") from error
    except Exception as error:
        # The exceptions of the Hub's HTTP client derive from Exception alone.
        if not type(error).__module__.startswith("httpx"):
            raise
        raise InputError(f"{unreachable} is out of reach: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
