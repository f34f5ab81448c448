"""Finds a model and its parts: a folder, a bundled model's name, or a repository of the Hugging Face Hub."""

import os
import pathlib

from etils import epath

from jsurgery.errors import InputError
from jsurgery.io.files import matching, read_object
from jsurgery.wan import hub
from jsurgery.wan.checkpoint import check_fits, read_config
from jsurgery.wan.folder_hashes import check_hashes
from jsurgery.wan.model_config import ORIGINAL_CLASS_NAME, WanConfig, read_text_encoder_config, read_vae_config
from jsurgery.wan.pipeline_parts import check_index, check_sizes, check_vocabulary
from jsurgery.wan.tokenizer import Tokenizer

# The models that the package brings along, by name.
BUNDLED = {"tiny_wan": pathlib.Path(__file__).parents[1] / "assets" / "tiny_wan"}


def model_path(path: str) -> epath.Path:
    """The folder of a model that is named by its folder, a bundled name, or a repository, which is then downloaded.

    Raises InputError when there is no such model, and for a repository of another task before its weights are fetched.
    """
    folder = epath.Path(BUNDLED.get(path) or hub.local_path(os.path.expanduser(path), check_index))
    if not path or not folder.exists():
        raise InputError(f"config.model.path: {path or '(empty)'}: no such folder; bundled: {', '.join(BUNDLED)}")
    return folder


def transformer_folder(path: epath.Path) -> epath.Path:
    """The transformer's folder in a pipeline folder; any other folder is taken to be the transformer's own."""
    return path / "transformer" if (path / "transformer").exists() else path


def pipeline_folder(path: epath.Path) -> epath.Path:
    """The folder with the VAE and the text encoder: `path` itself, or the base pipeline that an operated model names.

    Raises InputError when there is neither.
    """
    if (path / "vae").exists():
        return path
    file = path / "config.json"
    base = read_object(file).get("base_pipeline") if file.exists() else None
    if base is not None and not isinstance(base, str):
        raise InputError(f"{file}: base_pipeline: expected a folder, a bundled name or a repository, found {base!r}")
    if not base and path.is_dir() and matching(path, "models_t5*.pth"):
        convert = f"`jsurgery convert --model={path} --output={path}-Diffusers`"
        raise InputError(f"{path}: the original repository's folder; {convert} makes the pipeline folder that is read")
    if not base and file.exists() and read_object(file).get("_class_name") == ORIGINAL_CLASS_NAME:
        raise InputError(f"{path}: the original repository's transformer alone; take the one ending in -Diffusers")
    if not base:
        raise InputError(f"{path}: expected a pipeline folder (transformer/, vae/, text_encoder/, tokenizer/)")
    return model_path(base)


def check_pipeline(path: str) -> WanConfig:
    """The transformer's config, after a check of the whole pipeline. Raises InputError where `load_pipeline` would.

    Of the weights only the headers are read, unless a folder has a hashes.json: then every file is hashed. Weights that
    a dry run did not download are not checked.
    """
    folder = model_path(path)
    base = pipeline_folder(folder)
    for pipeline in dict.fromkeys((folder, base)):
        check_index(pipeline)
    parts = transformer_folder(folder), base / "vae", base / "text_encoder"
    scheduler = [base / "scheduler"] if (base / "scheduler").exists() else []
    complete = not hub.lacks_weights(folder)
    for part in dict.fromkeys((folder, base, *scheduler, *parts)) if complete else ():
        check_hashes(part)
    transformer = read_config(transformer_folder(folder))
    text_encoder = read_text_encoder_config(base / "text_encoder")
    check_sizes(transformer, read_vae_config(base / "vae"), text_encoder, folder)
    check_vocabulary(Tokenizer(base / "tokenizer").vocab_size, text_encoder, base)
    if complete:
        check_fits(parts[0], base)
    return transformer
