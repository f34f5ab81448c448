"""What a model is: the published checkpoints of the Wan family, those that jsurgery reads and those that it refuses.

One table. Everything that tells checkpoints apart stands here, as does what their makers sample them with: names of
classes, parts of model_index.json, tensors, sizes. It imports nothing, so that every reader can ask it.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

# What Wan's makers lead every text-to-video sample away from (`sample_neg_prompt` of the original repository).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的手指，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A published checkpoint, or a kind of them.

    Attributes:
      name: as people call it.
      kind: its name for `--kind`.
      repository: where it is published, in diffusers' layout if there is one.
      task: what a model that jsurgery does not read is for; empty for those that it reads.
      config: the shipped config for it.
      transformer: the sizes in which its transformer differs from Wan2.1 1.3B, named as in WanConfig; None: any.
      vae: what differs from Wan2.1's VAE, named as in VaeConfig.
      strides: pixels per latent along time, height and width.
      defaults: config fields with the values that its makers sample with. A folder's own scheduler goes before the
        solver and the shift, unless the model has `few_steps`.
      pipelines: `_class_name`s in model_index.json that are read.
      index: parts and values that a model_index.json of it has and others lack -> what they are.
      words: parts of the names of its transformer's class in diffusers or of `model_type` in the original repository.
      channels: the transformer's input channels, where they differ from the latents'.
      tensors: a pattern for names of tensors that others lack.
      scheduler: the `_class_name` in scheduler_config.json, where it tells the kind.
      takes_image: a video may begin with a given image, whose tokens have timestep 0.
      few_steps: distilled to few steps without guidance: its own sampler goes before that of any config.
    """

    name: str
    kind: str
    repository: str = ""
    task: str = ""
    config: str = "tiny"
    transformer: Mapping[str, Any] | None = None
    vae: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    strides: tuple[int, int, int] = (4, 8, 8)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pipelines: tuple[str, ...] = ()
    index: Mapping[str, str] = dataclasses.field(default_factory=dict)
    words: tuple[str, ...] = ()
    channels: int | None = None
    tensors: str = ""
    scheduler: str = ""
    takes_image: bool = False
    few_steps: bool = False


TEXT_TO_VIDEO = ("WanPipeline", "WanVideoToVideoPipeline")  # the second is the same model, begun from a video
SIZES_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
SIZES_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
# The latents of Wan2.2's VAE, per channel.
LATENTS_5B_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip

LATENTS_5B_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
VAE_5B: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "latents_mean": LATENTS_5B_MEAN,
    "latents_std": LATENTS_5B_STD,
    "is_residual": True,
    "patch_size": 2,
}
# diffusers' values for 480p, as in Wan2.1's folders; the original repository takes shift 5 (1.3B: 8, and guidance 6).
WAN_2_1 = {
    "sampler.solver": "unipc",
    "sampler.steps": 50,
    "sampler.shift": 3.0,
    "sampler.guidance": 5.0,
    "sampler.negative_prompt": NEGATIVE_PROMPT,
    "video.fps": 16,
}
# Distribution matching: each step predicts the video and adds fresh noise; at the timesteps that it was trained at.
FASTWAN = {
    "sampler.solver": "lcm",
    "sampler.steps": 3,
    "sampler.timesteps": (1000.0, 757.0, 522.0),
    "sampler.shift": 8.0,
    "sampler.guidance": 1.0,
    "sampler.negative_prompt": "",
    "video.fps": 16,
}
# Its makers name the timesteps 1000, 750, 500 and 250 before the shift of 5.
LIGHTX2V = FASTWAN | {
    "sampler.steps": 4,
    "sampler.timesteps": (1000.0, 937.5, 2500 / 3, 625.0),
    "sampler.shift": 5.0,
}
CONSISTENCY = {
    "sampler.solver": "lcm",
    "sampler.steps": 4,
    "sampler.shift": 3.0,
    "sampler.guidance": 1.0,
    "sampler.negative_prompt": "",
}

MODELS = (
    Model(
        "Wan2.1 1.3B",
        "wan2.1-1.3b",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        config="wan_1_3b",
        transformer={},
        defaults=WAN_2_1,
        pipelines=TEXT_TO_VIDEO,
    ),
    Model(
        "Wan2.1 14B",
        "wan2.1-14b",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        config="wan_14b",
        transformer=SIZES_14B,
        defaults=WAN_2_1,
        pipelines=TEXT_TO_VIDEO,
    ),
    Model(
        "tiny",
        "tiny",
        "bundled as tiny_wan",
        transformer={
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "in_channels": 8,
            "out_channels": 8,
            "text_dim": 64,
            "ffn_dim": 512,
            "num_layers": 6,
        },
        pipelines=TEXT_TO_VIDEO,
    ),
    Model(
        "Wan2.2 TI2V 5B",
        "wan2.2-5b",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        config="wan2_2_5b",
        transformer=SIZES_5B,
        vae=VAE_5B,
        strides=(4, 16, 16),
        defaults=WAN_2_1 | {"sampler.shift": 5.0, "video.fps": 24},
        pipelines=TEXT_TO_VIDEO,
        index={"expand_timesteps": "a noise level for each token, as in Wan2.2 TI2V 5B"},
        words=("ti2v",),
        takes_image=True,
    ),
    Model(
        "FastWan2.1 14B",
        "fastwan2.1-14b",
        "FastVideo/FastWan2.1-T2V-14B-480P-Diffusers",
        config="wan_14b",
        transformer=SIZES_14B,
        defaults=FASTWAN,
        pipelines=("WanDMDPipeline",),
        few_steps=True,
    ),
    Model(
        "FastWan2.1 1.3B",
        "fastwan2.1-1.3b",
        "FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
        config="wan_1_3b",
        transformer={},
        defaults=FASTWAN,
        pipelines=("WanDMDPipeline",),
        few_steps=True,
    ),
    Model(
        "FastWan2.2 5B",
        "fastwan2.2-5b",
        "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
        config="wan2_2_5b",
        transformer=SIZES_5B,
        vae=VAE_5B,
        strides=(4, 16, 16),
        defaults=FASTWAN | {"sampler.shift": 5.0, "video.fps": 24},
        pipelines=("WanDMDPipeline",),
        takes_image=True,
        few_steps=True,
    ),
    Model(
        "lightx2v 14B",
        "lightx2v-14b",
        "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill",
        config="wan_14b",
        transformer=SIZES_14B,
        defaults=LIGHTX2V,
        few_steps=True,
    ),
    Model(
        "consistency",
        "consistency",
        "any folder with its scheduler",
        defaults=CONSISTENCY,
        pipelines=TEXT_TO_VIDEO,
        scheduler="FlowMatchLCMScheduler",
        few_steps=True,
    ),
    Model(
        "Wan2.2 T2V-A14B",
        "wan2.2-t2v-a14b",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        task="two experts, one for the high noise levels and one for the low",
        transformer=SIZES_14B,
        index={
            "transformer_2": "a second expert for the low noise levels, as Wan2.2 A14B has",
            "boundary_ratio": "the noise level at which a second expert takes over, as in Wan2.2 A14B",
        },
    ),
    Model(
        "FastWan with VSA",
        "fastwan-vsa",
        "FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
        task="FastWan's video sparse attention, which has a gate in every block",
        tensors=r"to_gate_compress",
    ),
    Model(
        "Wan VACE",
        "vace",
        "Wan-AI/Wan2.1-VACE-14B-diffusers",
        task="VACE, for editing",
        words=("vace",),
        channels=96,
        tensors=r"vace",
    ),
    Model(
        "Wan Animate",
        "animate",
        "Wan-AI/Wan2.2-Animate-14B-Diffusers",
        task="Wan Animate, which follows a driving video",
        words=("animate",),
        tensors=r"motion_encoder|face_adapter|face_encoder",
    ),
    Model(
        "Wan S2V",
        "s2v",
        "Wan-AI/Wan2.2-S2V-14B",
        task="speech to video",
        words=("s2v",),
        tensors=r"casual_audio_encoder|audio_injector",
    ),
    Model(
        "Wan FLF2V",
        "flf2v",
        "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
        task="first and last frame to video",
        words=("flf2v",),
    ),
    Model(
        "Wan I2V",
        "i2v",
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        task="image to video",
        index={
            "image_encoder": "an image encoder, as image to video has",
            "image_processor": "an image encoder's input, as image to video has",
        },
        words=("i2v", "imagetovideo"),
        channels=36,
        tensors=r"img_emb|image_embedder|k_img|add_k_proj",
    ),
    Model(
        "Wan Fun control",
        "fun-control",
        "alibaba-pai/Wan2.1-Fun-V1.1-14B-Control",
        task="control",
        channels=52,
        tensors=r"control_adapter|ref_conv",
    ),
)

BY_KIND = {model.kind: model for model in MODELS}
READ = tuple(model for model in MODELS if not model.task)
REFUSED = tuple(model for model in MODELS if model.task)

# Parts and values of a model_index.json that text to video of Wan2.1 lacks -> what they are. Null or false ones are
# harmless.
FOREIGN_PARTS = {part: meaning for model in REFUSED for part, meaning in model.index.items()}
KNOWN_PARTS = {part for model in READ for part in model.index}
_FOREIGN_TENSORS = re.compile("|".join(model.tensors for model in REFUSED if model.tensors))


def task_of(name: object) -> str:
    """What a model of this class or `model_type` is for, as the end of a message; empty for an unknown name."""
    text = str(name).lower()
    if any(word in text for model in READ for word in model.words):
        return ""
    found = [model.task for model in REFUSED if any(word in text for word in model.words)]
    return f", which is {found[0]}; jsurgery reads text-to-video models of Wan2.1 alone" if found else ""


def strides_of_latents(channels: int) -> tuple[int, int, int]:
    """Pixels per latent along time, height and width, of latents with so many channels: those tell the VAE."""
    return _of_latents(channels).strides


def takes_image(channels: int) -> bool:
    """Whether a transformer of latents with so many channels makes videos that begin with a given image."""
    return _of_latents(channels).takes_image


def original_type(channels: int) -> str:
    """The `model_type` that the original repository gives a transformer of latents with so many channels."""
    return _of_latents(channels).words[0] if _of_latents(channels).words else "t2v"


def _of_latents(channels: int) -> Model:
    """The first row that is read and whose latents have so many channels; Wan2.1's where there is none."""
    rows = (row for row in READ if row.transformer is not None and row.transformer.get("in_channels") == channels)
    return next(rows, READ[0])


def task_of_channels(channels: int) -> str:
    """What a transformer with so many input channels is for, likewise."""
    return next((f", as for {model.task}" for model in REFUSED if model.channels == channels), "")


def foreign_tensor(names: list[str]) -> str | None:
    """The first of the tensors' names that only models for other tasks have; None if there is none."""
    return next((name for name in names if _FOREIGN_TENSORS.search(name)), None)
