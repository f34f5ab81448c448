"""Models of the Hugging Face Hub, downloaded only where the user names one."""

import re

from etils import epath

from jsurgery.errors import InputError

# No pickles: what is loaded is safetensors, configs and tokenizers.
FILES = ["*.safetensors", "*.json", "*.model"]


def local_path(path: str) -> str:
    """`path` itself if it is there or is no repository id; else the snapshot of ORG/NAME or ORG/NAME@REVISION.

    A snapshot that the Hub's cache holds completely is used without a network. Raises InputError for a repository,
    revision or network that is not there.
    """
    named = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", path)
    if not named or epath.Path(path).exists():
        return path
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError, RevisionResolutionError

    repository, revision = named.groups()
    try:
        return huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=FILES)
    except (OSError, HFValidationError, CachedRepoTreeNotFoundError, RevisionResolutionError) as error:
        raise InputError(f"{path}: no such folder, and not to be had from the Hub: {_first_line(error)}") from error
    except Exception as error:
        # The Hub's HTTP client has exceptions of its own, which derive from nothing better.
        if not type(error).__module__.startswith("httpx"):
            raise
        raise InputError(f"{path}: no such folder, and the Hub is out of reach: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
