"""The sizes of Wan's three models, and the config.json files that hold them.

Field names are those of diffusers (transformer, VAE) and of transformers (text encoder). The original repository's
names for the transformer's sizes are in `ORIGINAL_SIZES`.
"""

import dataclasses
import functools
from typing import Any, Self

from etils import epath

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import InputError
from jsurgery.io.fields import check_fields, check_known
from jsurgery.io.files import read_object
from jsurgery.rates import Rate
from jsurgery.runtime.progress import say
from jsurgery.wan.models import strides_of_latents, task_of

# The `_class_name` of a transformer's config.json: diffusers', ours for a hybrid, and the original repository's.
CLASS_NAME = "WanTransformer3DModel"
HYBRID_CLASS_NAME = "HybridWanTransformer3DModel"
ORIGINAL_CLASS_NAME = "WanModel"
VAE_CLASS_NAME = "AutoencoderKLWan"

# A size's name in WanConfig -> its name in the original repository's config.json, which leaves out all other sizes.
ORIGINAL_SIZES = {
    "dim": "dim",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "freq_dim": "freq_dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
}

# Wan2.1's latents, per channel.
WAN_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip

WAN_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# Fields that change nothing here: of training, of decoding text, or of an input that text to video does not have.
_TRANSFORMER_HARMLESS = {
    "qk_norm", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "base_pipeline", "torch_dtype",
    "dtype", "loras", "sampler",
}  # fmt: skip
_VAE_HARMLESS = {"dropout", "torch_dtype", "dtype"}
_TEXT_ENCODER_HARMLESS = {
    "dense_act_fn", "is_gated_act", "num_decoder_layers", "dropout_rate", "initializer_factor", "use_cache",
    "classifier_dropout", "scalable_attention", "output_past", "torch_dtype", "dtype", "transformers_version",
    "is_decoder", "tie_encoder_decoder", "task_specific_params", "problem_type", "id2label", "label2id",
    "chunk_size_feed_forward", "return_dict", "finetuning_task", "max_length", "min_length", "num_beams",
    "num_return_sequences", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "num_beam_groups", "encoder_no_repeat_ngram_size", "diversity_penalty", "no_repeat_ngram_size", "n_positions",
}  # fmt: skip

# Likewise of a UMT5EncoderModel's config.json.
_TEXT_ENCODER_FIXED = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tokenizer_class": "T5Tokenizer",
}


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer, named as in diffusers' config.json; the defaults are those of Wan2.1 1.3B."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    hybrid: HybridConfig | None = None  # None: every block is softmax attention, as published

    @classmethod
    def from_json(cls, fields: dict[str, Any], source: str = "config.json") -> Self:
        """The config in a parsed config.json of diffusers or jsurgery. Raises InputError for another architecture."""
        class_name = fields.get("_class_name")
        if class_name not in (CLASS_NAME, HYBRID_CLASS_NAME):
            expected = f"{CLASS_NAME} or {HYBRID_CLASS_NAME}"
            raise InputError(f"{source}: expected _class_name {expected}, found {class_name!r}{task_of(class_name)}")
        for name, wan in (("qk_norm", "rms_norm_across_heads"), ("image_dim", None), ("added_kv_proj_dim", None)):
            if fields.get(name, wan) != wan:
                raise InputError(f"{source}: {name}: the text-to-video Wan2.1 has {wan!r}, found {fields[name]!r}")
        note_ignored(check_known(fields, cls.__dataclass_fields__, _TRANSFORMER_HARMLESS, source), source)
        known = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields}
        if known.get("out_channels", 0) is None:  # as in diffusers: as many as it takes
            known["out_channels"] = known.get("in_channels", cls.in_channels)
        patch_size = known.get("patch_size", cls.patch_size)
        known["patch_size"] = tuple(patch_size) if isinstance(patch_size, list) else patch_size
        if class_name == CLASS_NAME and known.get("hybrid"):
            raise InputError(f"{source}: hybrid: expected none in a {CLASS_NAME}")
        if class_name == HYBRID_CLASS_NAME:
            known["hybrid"] = HybridConfig.from_json(fields.get("hybrid"), source)
            rates, layers = known["hybrid"].rates, known.get("num_layers", cls.num_layers)
            if len(rates) != layers:
                raise InputError(f"{source}: hybrid.rates has {len(rates)} entries, num_layers is {layers}")
        config = cls(**known)
        check_fields(config, source)
        for name in ("attention_head_dim", "freq_dim"):
            if getattr(config, name) % 2:
                raise InputError(f"{source}: {name}: expected an even number, found {getattr(config, name)}")
        return config

    def to_json(self) -> dict[str, Any]:
        """The content of config.json. A hybrid's class name differs, so that stock diffusers refuses to load it."""
        fields = dataclasses.asdict(self) | {"qk_norm": "rms_norm_across_heads", "image_dim": None}
        fields |= {"added_kv_proj_dim": None, "pos_embed_seq_len": None}
        del fields["hybrid"]
        if self.hybrid is None:
            return {"_class_name": CLASS_NAME, **fields}
        return {"_class_name": HYBRID_CLASS_NAME, **fields, "hybrid": self.hybrid.to_json()}

    @property
    def dim(self) -> int:
        """The width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def size_text(self) -> str:
        """The sizes that tell models apart, for messages."""
        return f"{self.num_layers} blocks of width {self.dim}, {self.in_channels} channels"

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per latent along time, height and width. The first frame has a latent frame of its own."""
        return strides_of_latents(self.in_channels)

    @property
    def rates(self) -> tuple[Rate, ...]:
        """One rate for each block."""
        return self.hybrid.rates if self.hybrid else (1,) * self.num_layers

    def token_grid(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens along time, height and width for latents of `latent_shape` = (T, H, W).

        Raises InputError when the patch size does not divide the latents.
        """
        for name, size, patch in zip(("frames", "height", "width"), latent_shape, self.patch_size, strict=True):
            if size % patch:
                raise InputError(f"latents: {name} is {size}, not a multiple of the patch size {patch}")
        return tuple(size // patch for size, patch in zip(latent_shape, self.patch_size, strict=True))  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of a Wan VAE, named as in diffusers' vae/config.json; the defaults are Wan2.1's.

    Attributes:
      is_residual: whether blocks have shortcuts around their changes of size, as in Wan2.2 5B.
      patch_size: the side of the patches of pixels that are one pixel to the network; None: no patches.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None  # None: base_dim
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN_LATENTS_STD
    is_residual: bool = False
    patch_size: int | None = None

    def __post_init__(self):
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            lengths = f"{len(self.latents_mean)} and {len(self.latents_std)}"
            raise InputError(f"latents_mean, latents_std: expected z_dim = {self.z_dim} values each, found {lengths}")
        if len(self.dim_mult) != 4 or len(self.temperal_downsample) != 3 or sum(self.temperal_downsample) != 2:
            raise InputError(
                "dim_mult, temperal_downsample: expected 4 levels and 3 steps between them, 2 of them temporal "
                f"(stride 4, 8, 8), found {self.dim_mult} and {self.temperal_downsample}"
            )
        if self.patch_size not in (None, 2):
            raise InputError(f"patch_size: expected null, as in Wan2.1, or 2, as in Wan2.2; found {self.patch_size}")
        if self.is_residual:
            self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        """Raises InputError where values cannot be grouped or copied from the channels of a level to the next one's."""
        for name, mults, steps in (
            ("encoder", (1, *self.dim_mult), self.temperal_downsample),
            ("decoder", (*self.dim_mult[-1:], *reversed(self.dim_mult)), self.temperal_downsample[::-1]),
        ):
            values = [8 if temporal else 4 for temporal in steps] + ([1] if name == "encoder" else [])
            for number, count in enumerate(values):
                before, after = mults[number : number + 2]
                many, few = (count * before, after) if name == "encoder" else (count * after, before)
                if many % few:
                    raise InputError(f"dim_mult: {self.dim_mult}: no shortcut leads over level {number} of the {name}")

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per latent along time, height and width. The first frame has a latent frame of its own."""
        side = 8 * (self.patch_size or 1)
        return 4, side, side

    @property
    def pixel_channels(self) -> int:
        """Channels of what the network takes for a pixel."""
        return 3 * (self.patch_size or 1) ** 2

    @property
    def _derived(self) -> dict[str, Any]:
        """Further fields of an AutoencoderKLWan's config.json, which follow from the others."""
        return {
            "attn_scales": [],
            "in_channels": self.pixel_channels,
            "out_channels": self.pixel_channels,
            "scale_factor_temporal": self.strides[0],
            "scale_factor_spatial": self.strides[1],
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any], source: str = "config.json") -> Self:
        """The config in a parsed config.json. Raises InputError for an unknown field or another architecture."""
        if (class_name := fields.get("_class_name", VAE_CLASS_NAME)) != VAE_CLASS_NAME:
            raise InputError(f"{source}: expected _class_name {VAE_CLASS_NAME}, found {class_name!r}")
        known = cls.__dataclass_fields__
        note_ignored(check_known(fields, {*known, *cls()._derived}, _VAE_HARMLESS, source), source)
        given = {name: value for name, value in fields.items() if name in known}
        values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in given.items()}
        try:
            config = cls(**values)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        check_fields(config, source)
        for name, expected in config._derived.items():
            if (value := fields.get(name, expected)) != expected:
                raise InputError(
                    f"{source}: {name}: expected {expected}, as in Wan's VAE of these sizes; found {value}"
                )
        return config

    def to_json(self) -> dict[str, Any]:
        """The content of a config.json that diffusers' AutoencoderKLWan.from_pretrained reads."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {"_class_name": VAE_CLASS_NAME, **fields, **self._derived, "dropout": 0.0}


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of a UMT5 encoder, named as in transformers' UMT5Config; the defaults are those of UMT5-XXL, Wan2.1's."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_json(cls, fields: dict[str, Any], source: str = "text encoder config") -> Self:
        """The config in a parsed config.json. Raises InputError for a missing field or another architecture."""
        for name in ("model_type", "feed_forward_proj"):
            if fields.get(name) != _TEXT_ENCODER_FIXED[name]:
                raise InputError(f"{source}: {name} must be {_TEXT_ENCODER_FIXED[name]!r}, found {fields.get(name)!r}")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in fields]
        if missing:
            raise InputError(f"{source}: missing {', '.join(missing)}")
        note_ignored(check_known(fields, {*names, *_TEXT_ENCODER_FIXED}, _TEXT_ENCODER_HARMLESS, source), source)
        config = cls(**{name: fields[name] for name in names})
        check_fields(config, source)
        return config

    def to_json(self) -> dict[str, Any]:
        """The content of a config.json that transformers' UMT5EncoderModel.from_pretrained reads."""
        return _TEXT_ENCODER_FIXED | dataclasses.asdict(self) | {"num_decoder_layers": self.num_layers}


def read_vae_config(path: epath.PathLike) -> VaeConfig:
    """The config in a diffusers `vae/` folder. Raises InputError, naming the file, if it is missing or does not fit."""
    config_file = epath.Path(path) / "config.json"
    if not config_file.exists():
        raise InputError(f"{config_file}: no such file; expected a diffusers vae/ folder")
    fields = read_object(config_file, "the config of an AutoencoderKLWan as JSON")
    try:
        return VaeConfig.from_json(fields, str(config_file))
    except TypeError as error:  # a field that should be a list
        raise InputError(f"{config_file}: expected the config of an AutoencoderKLWan ({error})") from error


def read_text_encoder_config(path: epath.PathLike) -> TextEncoderConfig:
    """The config in a `text_encoder/` folder. Raises InputError, naming the file, if it is missing or does not fit."""
    config_file = epath.Path(path) / "config.json"
    if not config_file.exists():
        raise InputError(f"{config_file}: not found; expected a text_encoder folder with config.json and safetensors")
    return TextEncoderConfig.from_json(read_object(config_file), str(config_file))


@functools.cache
def _say_once(message: str) -> None:
    say(message)


def note_ignored(ignored: list[str], source: str) -> None:
    """Says once in a process which fields of a config are ignored; see `check_known`."""
    if ignored:
        _say_once(f"{source}: {', '.join(ignored)}: ignored, since jsurgery knows no such field")
