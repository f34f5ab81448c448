"""Where the parts of a model lie, given a folder, a bundled name or a repository."""

import pathlib

from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.files import read_object
from jsurgery.io.safetensors import check_tensors
from jsurgery.wan import hub
from jsurgery.wan.checkpoint import read_config
from jsurgery.wan.folder_hashes import check_hashes
from jsurgery.wan.model_config import WanConfig, read_text_encoder_config, read_vae_config
from jsurgery.wan.tokenizer import Tokenizer

BUNDLED = {"tiny_wan": pathlib.Path(__file__).parents[1] / "assets" / "tiny_wan"}


def model_path(path: str) -> epath.Path:
    """A model folder, or the name of a bundled one. Raises InputError when it is not there."""
    found = epath.Path(BUNDLED.get(path) or hub.local_path(path))
    if not path or not found.exists():
        raise InputError(f"config.model.path: {path or '(empty)'}: no such folder; bundled: {', '.join(BUNDLED)}")
    return found


def transformer_folder(path: epath.Path) -> epath.Path:
    """The transformer of a pipeline folder, or the folder itself."""
    return path / "transformer" if (path / "transformer").exists() else path


def pipeline_folder(path: epath.Path) -> epath.Path:
    """Where the VAE and the text encoder lie: beside the transformer, or where an operated model's base is."""
    if (path / "vae").exists():
        return path
    file = path / "config.json"
    base = read_object(file).get("base_pipeline") if file.exists() else None
    if base is not None and not isinstance(base, str):
        raise InputError(f"{file}: base_pipeline: expected a folder, a bundled name or a repository, found {base!r}")
    if not base:
        raise InputError(f"{path}: expected a pipeline folder (transformer/, vae/, text_encoder/, tokenizer/)")
    return model_path(base)


def check_pipeline(path: str) -> WanConfig:
    """The transformer's config. Raises InputError where `load_pipeline` would, having read the weights' headers.

    Where the folders have hashes, all of the weights is read once for them.
    """
    folder = model_path(path)
    base = pipeline_folder(folder)
    parts = transformer_folder(folder), base / "vae", base / "text_encoder"
    for part in dict.fromkeys((folder, base, *parts)):
        check_hashes(part)
    config = read_config(transformer_folder(folder))
    read_vae_config(base / "vae")
    read_text_encoder_config(base / "text_encoder")
    for part in parts:
        check_tensors(part)
    Tokenizer(base / "tokenizer")
    return config
