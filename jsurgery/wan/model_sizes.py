"""The sizes of a pipeline's three models, and the jsurgery configs that fit them."""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from jsurgery.errors import InputError
from jsurgery.load_config import split_topology
from jsurgery.wan.checkpoint import read_config
from jsurgery.wan.model_config import TextEncoderConfig, VaeConfig, WanConfig, read_text_encoder_config, read_vae_config
from jsurgery.wan.model_folder import model_path, pipeline_folder, transformer_folder
from jsurgery.wan.models import READ, Model
from jsurgery.wan.pipeline_parts import check_sizes


def network_of(model: Model) -> WanConfig:
    """The sizes of a published model's transformer."""
    return WanConfig(**(model.transformer or {}))


# The transformers' sizes of the models that were not distilled to few steps; all have the default text encoder.
_PUBLISHED = [model for model in READ if not model.few_steps and model.config != "tiny"]
PUBLISHED = {model.name: network_of(model) for model in _PUBLISHED}
PUBLISHED_VAES = {model.name: VaeConfig(**model.vae) for model in _PUBLISHED}
# A config's name -> the published model that it is for.
MODEL_OF_CONFIG = {model.config: model.name for model in READ if model.name in PUBLISHED}
MODEL_OF_CONFIG |= {"wan_1_3b_lowres": "Wan2.1 1.3B"}
# A transformer's width -> the config for it. Every other width takes the config "tiny".
CONFIGS = {network_of(model).dim: model.config for model in READ if model.name in PUBLISHED}


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """The sizes of a pipeline's three models, without weights."""

    name: str
    transformer: WanConfig
    text_encoder: TextEncoderConfig
    vae: VaeConfig


def find_sizes(config: ConfigDict, config_name: str) -> ModelSizes:
    """The sizes of the models in `config.model.path`; where it is empty, the published ones for the config's name.

    Raises InputError where it is empty and nothing is published for that name.
    """
    path = config.model.path
    if not path:
        published = MODEL_OF_CONFIG.get(pathlib.PurePath(split_topology(config_name)[0]).stem)
        if published is None:
            expected = f"a model folder, for sizes are published for {', '.join(MODEL_OF_CONFIG)} only"
            raise InputError(f"config.model.path: (empty): expected {expected}; found --config={config_name}")
        return ModelSizes(published, PUBLISHED[published], TextEncoderConfig(), PUBLISHED_VAES[published])
    folder = model_path(path)
    transformer = read_config(transformer_folder(folder))
    name = next((name for name, sizes in PUBLISHED.items() if sizes == transformer), pathlib.PurePath(path).name)
    base = pipeline_folder(folder)
    text_encoder, vae = read_text_encoder_config(base / "text_encoder"), read_vae_config(base / "vae")
    check_sizes(transformer, vae, text_encoder, folder)
    return ModelSizes(name, transformer, text_encoder, vae)
