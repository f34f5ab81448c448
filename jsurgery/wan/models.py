"""Known Wan models: their published sizes, the config that suits each, and their schedulers."""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from jsurgery.errors import InputError
from jsurgery.load_config import split_topology
from jsurgery.wan.checkpoint import read_config
from jsurgery.wan.model_config import TextEncoderConfig, VaeConfig, WanConfig, read_text_encoder_config, read_vae_config
from jsurgery.wan.model_folder import model_path, pipeline_folder, transformer_folder

SIZES = {"wan_1_3b": "Wan2.1 1.3B", "wan_1_3b_lowres": "Wan2.1 1.3B", "wan_14b": "Wan2.1 14B"}


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """A model, by its sizes alone."""

    name: str
    transformer: WanConfig
    text_encoder: TextEncoderConfig
    vae: VaeConfig


def find_sizes(config: ConfigDict, config_name: str) -> ModelSizes:
    """The sizes in the model's folder; without a model, those published for the config's name."""
    path = config.model.path
    if not path:
        published = SIZES.get(pathlib.PurePath(split_topology(config_name)[0]).stem)
        if published is None:
            expected = f"a model folder, for sizes are published for {', '.join(SIZES)} only"
            raise InputError(f"config.model.path: (empty): expected {expected}; found --config={config_name}")
        return ModelSizes(published, PUBLISHED[published], TextEncoderConfig(), VaeConfig())
    folder = model_path(path)
    transformer = read_config(transformer_folder(folder))
    name = next((name for name, sizes in PUBLISHED.items() if sizes == transformer), pathlib.PurePath(path).name)
    base = pipeline_folder(folder)
    text_encoder = read_text_encoder_config(base / "text_encoder")
    return ModelSizes(name, transformer, text_encoder, read_vae_config(base / "vae"))


PUBLISHED = {
    "Wan2.1 1.3B": WanConfig(),
    "Wan2.1 14B": WanConfig(num_attention_heads=40, num_layers=40, ffn_dim=13824),
}

CONFIGS = {1536: "wan_1_3b", 5120: "wan_14b"}  # by the transformer's width; anything else is of the tiny kind

SCHEDULERS = {"UniPCMultistepScheduler": ("unipc", "flow_shift"), "FlowMatchEulerDiscreteScheduler": ("euler", "shift")}
