"""What a pipeline folder is, by its model_index.json: parts that change a result are used, or refused by their name.

Here are also the checks that the sizes of the parts fit each other. None of them reads weights.
"""

import json

from etils import epath

from jsurgery.errors import InputError, shortened
from jsurgery.io.files import read_object
from jsurgery.wan.folder_hashes import write_hashes
from jsurgery.wan.model_config import TextEncoderConfig, VaeConfig, WanConfig
from jsurgery.wan.models import FOREIGN_PARTS, KNOWN_PARTS, READ, TEXT_TO_VIDEO, task_of, task_of_channels

INDEX = "model_index.json"
PIPELINE = {
    "_class_name": TEXT_TO_VIDEO[0],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
PIPELINES = tuple(dict.fromkeys(name for model in READ for name in model.pipelines))
PARTS = tuple(name for name in PIPELINE if name != "_class_name")


def check_index(folder: epath.Path) -> None:
    """Raises InputError for a pipeline folder of another task or with parts that text to video does not read.

    A folder without model_index.json is judged by the names of its own folders.
    """
    file = folder / INDEX
    if not file.exists():
        for name, meaning in FOREIGN_PARTS.items():
            if (folder / name).is_dir():
                raise InputError(f"{folder / name}: {meaning}; a text-to-video Wan2.1 has no such part")
        return
    fields = read_object(file, "the parts of a diffusers pipeline as JSON")
    if (name := fields.get("_class_name", PIPELINES[0])) not in PIPELINES:
        raise InputError(
            f"{file}: expected a {PIPELINES[0]}, text to video of Wan2.1; found {shortened(name)}{task_of(name)}"
        )
    for name, value in fields.items():
        absent = not value or (isinstance(value, list) and not any(value))
        if name.startswith("_") or name in PARTS or name in KNOWN_PARTS or absent:
            continue
        meaning = FOREIGN_PARTS.get(name, "which jsurgery does not know, and which may change the videos")
        raise InputError(f"{file}: {name}: {meaning}; expected the parts of a text-to-video Wan2.1 alone")


def check_sizes(transformer: WanConfig, vae: VaeConfig, text_encoder: TextEncoderConfig, folder: epath.Path) -> None:
    """Raises InputError, naming the pipeline `folder`, where one part's output is not what the next part takes."""
    taken, left, channels = transformer.in_channels, transformer.out_channels, vae.z_dim
    if taken != channels:
        task = task_of_channels(taken)
        raise InputError(f"{folder}: the transformer takes {taken} channels{task}, the VAE has {channels}")
    if transformer.strides != vae.strides:
        sides = f"{transformer.strides[1]} pixels wide, those of the VAE {vae.strides[1]}"
        raise InputError(f"{folder}: the transformer takes latents that are {sides}")
    if left != taken:
        raise InputError(f"{folder}: the transformer takes {taken} channels and leaves {left}; expected as many")
    if transformer.text_dim != text_encoder.d_model:
        widths = f"text of width {transformer.text_dim}, the text encoder's is {text_encoder.d_model}"
        raise InputError(f"{folder}: the transformer takes {widths}")


def check_vocabulary(tokens: int, text_encoder: TextEncoderConfig, folder: epath.Path) -> None:
    """Raises InputError where the tokenizer has more tokens than the text encoder has embeddings."""
    if tokens > text_encoder.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokens} tokens, the text encoder embeddings for {text_encoder.vocab_size}"
        )


def write_pipeline_index(model: epath.Path, shift: float, takes_image: bool = False) -> None:
    """Writes model_index.json and the scheduler, so that diffusers' WanPipeline loads the folder."""
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
    }
    (model / "scheduler").mkdir(parents=True, exist_ok=True)
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    index = PIPELINE | ({"expand_timesteps": True} if takes_image else {})
    (model / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_hashes(model, {}, "model_index.json", "scheduler/scheduler_config.json")
