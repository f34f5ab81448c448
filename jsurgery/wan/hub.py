"""Models of the Hugging Face Hub, downloaded only where the user names one; and how its client's errors are told."""

import contextlib
import re
from collections.abc import Iterator

from etils import epath

from jsurgery.errors import InputError

# No pickles: what is loaded is safetensors, configs and tokenizers.
FILES = ["*.safetensors", "*.json", "*.model"]


def repository(path: str) -> tuple[str, str | None] | None:
    """(ORG/NAME, revision or None) of a path that reads as ORG/NAME or ORG/NAME@REVISION and is no folder here."""
    named = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", path)
    return None if not named or epath.Path(path).exists() else (named[1], named[2])


def local_path(path: str) -> str:
    """`path` itself if it is there or is no repository id; else the snapshot of ORG/NAME or ORG/NAME@REVISION.

    A snapshot that the Hub's cache holds completely is used without a network. Raises InputError for a repository,
    revision or network that is not there.
    """
    named = repository(path)
    if named is None:
        return path
    import huggingface_hub

    with hub_errors_as_input_errors(
        f"{path}: no such folder, and not to be had from the Hub", f"{path}: no such folder, and the Hub"
    ):
        return huggingface_hub.snapshot_download(named[0], revision=named[1], allow_patterns=FILES)


@contextlib.contextmanager
def hub_errors_as_input_errors(refused: str, unreachable: str) -> Iterator[None]:
    """Errors of the Hub's client as InputErrors of one line, which begin with one of two texts."""
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError, RevisionResolutionError

    # RuntimeError is all that hf_xet, which moves the large files, says of a network.
    known = OSError, RuntimeError, HFValidationError, CachedRepoTreeNotFoundError, RevisionResolutionError
    try:
        yield
    except known as error:
        raise InputError(f"{refused}: {_first_line(error)}") from error
    except Exception as error:
        # The Hub's HTTP client has exceptions of its own, which derive from nothing better.
        if not type(error).__module__.startswith("httpx"):
            raise
        raise InputError(f"{unreachable} is out of reach: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
