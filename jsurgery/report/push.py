"""The command `push`: uploads a model folder to the Hugging Face Hub, with a model card about the surgery."""

import pathlib

from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.safetensors import open_tensors
from jsurgery.report.model_card import CARD, model_card
from jsurgery.report.run_files import read_json
from jsurgery.runtime.progress import say
from jsurgery.runtime.stage_folder import MARKER
from jsurgery.version import __version__
from jsurgery.wan import hub
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.checkpoint import read_config
from jsurgery.wan.checkpoint_layouts import lazy_transformer_tensors
from jsurgery.wan.folder_hashes import check_hashes
from jsurgery.wan.model_config import CLASS_NAME, HYBRID_CLASS_NAME, WanConfig
from jsurgery.wan.model_folder import BUNDLED, check_pipeline, transformer_folder
from jsurgery.wan.torch_layout import check_fit
from jsurgery.wan.transformer import WanTransformer

SUFFIXES = (".safetensors", ".json", ".model")
PICKLES = (".bin", ".pth", ".pt", ".pkl", ".pickle", ".ckpt")


def push(model: str, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads a model folder in one commit and returns the repository's address.

    repo: ORG/NAME, created if it does not exist. revision: a branch, created likewise. A README.md in the folder is the
    card; otherwise one is written into the commit. Only safetensors, JSON and SentencePiece files are uploaded.
    The folder is checked before any request. The token is the one that huggingface_hub finds.
    Raises InputError if the folder is incomplete or holds pickles, and if the Hub refuses or cannot be reached.
    """
    folder = epath.Path(model)
    network = check_folder(folder)
    files = upload_files(folder)

    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, validate_repo_id

    with hub.hub_errors_as_input_errors(f"--repo={repo}: refused", f"--repo={repo}: the Hub"):
        validate_repo_id(repo)
        if "/" not in repo:
            raise InputError(f"--repo={repo}: expected ORG/NAME")
        if huggingface_hub.get_token() is None:
            raise InputError("no token for the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
        additions = [huggingface_hub.CommitOperationAdd(name, file) for name, file in files.items()]
        if CARD not in files:
            additions.append(huggingface_hub.CommitOperationAdd(CARD, model_card(folder, network, repo).encode()))
        disable_progress_bars()
        client = huggingface_hub.HfApi(library_name="jsurgery", library_version=__version__)
        client.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            client.create_branch(repo, branch=revision, exist_ok=True)
        say(f"push: {len(additions)} files to {repo}")
        message = f"{'Hybrid transformer' if network.hybrid else 'Model'} by jsurgery {__version__}"
        client.create_commit(repo, additions, commit_message=message, revision=revision)
        return f"{client.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


def check_folder(folder: epath.Path) -> WanConfig:
    """The transformer's config. Raises InputError for a folder that others could not load, or that holds pickles."""
    if not pathlib.Path(folder).is_dir():
        raise InputError(f"--model={folder}: no such folder on this machine")
    if pickles := [path.name for path in every_file(folder) if path.suffix in PICKLES]:
        raise InputError(f"{folder}: holds pickles, which are not uploaded: {', '.join(pickles[:5])}; remove them")
    transformer = transformer_folder(folder)
    fields = read_json(transformer / "config.json") or {}
    if fields.get("_class_name") not in (CLASS_NAME, HYBRID_CLASS_NAME):
        raise InputError(f"{transformer}: not in diffusers' layout; `jsurgery convert` writes it")
    check_hashes(transformer)
    network = read_config(transformer)
    expected = lazy_transformer_tensors(abstract_module(WanTransformer, network))
    check_fit({name: tensor.shape for name, tensor in expected.items()}, open_tensors(transformer), transformer)
    if (folder / "vae").exists():
        check_pipeline(str(folder))
    elif (base := fields.get("base_pipeline")) and base not in BUNDLED and hub.repository(base) is None:
        raise InputError(
            f"{transformer / 'config.json'}: base_pipeline: expected a repository, where others find the VAE and the "
            f"text encoder, found {base}"
        )
    return network


def upload_files(folder: epath.Path) -> dict[str, pathlib.Path]:
    """Path in the repository -> file, of everything that is uploaded."""
    return {
        str(path.relative_to(folder)): path
        for path in every_file(folder)
        if (path.suffix in SUFFIXES and path.name != MARKER) or path == pathlib.Path(folder, CARD)
    }


def every_file(folder: epath.Path) -> list[pathlib.Path]:
    """All files that are not hidden or in hidden folders, such as the cache that a download from the Hub leaves."""
    paths = (path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return sorted(path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts))
