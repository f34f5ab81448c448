"""The parts of an export, each one graph, and the named tensors that pass between them.

An app keeps a dictionary of tensors and runs the parts in order; each reads and adds named tensors. This module is
plain Python, so that the process of every format can read the same job.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, Self

from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.video_size import latent_grid

from .artefacts import Artefact
from .formats import PRECISIONS

FORMAT_VERSION = 1
JOB = "job.json"
STEPS = ("once a prompt", "every step", "once a video")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A named tensor: its static shape, the NumPy name of its type, and its meaning in words."""

    shape: tuple[int, ...]
    dtype: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Part:
    """One graph: the names of its inputs and outputs, in order, and when an app runs it (one of `STEPS`)."""

    name: str
    step: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    blocks: tuple[int, ...] = ()  # numbers of the transformer blocks in it

    @property
    def quantizes(self) -> bool:
        """Whether integer precisions quantise this part; the other parts get 16-bit floats instead."""
        return bool(self.blocks)


@dataclasses.dataclass(frozen=True)
class ExportJob:
    """What is exported, from which folders and for which video size: the fields of job.json."""

    transformer: str  # its folder
    base: str  # the folder of vae/, text_encoder/ and tokenizer/; "": only the transformer is exported
    text_encoder: bool  # whether it is exported; one that is too large for a file is not
    identity: str  # hash of the weights
    frames: int
    height: int
    width: int
    text_length: int
    blocks_per_file: int  # 0: the whole transformer is one part
    samples: int  # of the reference: the first is compared with, the others calibrate
    trace: str  # folder of traced steps; "": samples begin from noise
    prompts: tuple[str, ...]  # of samples that begin from noise
    sampler: dict[str, Any]
    seed: int
    decoder: bool = True  # whether the VAE's is exported, if there is one; one whose layers are too large is not
    only: tuple[str, ...] = ()  # names of the parts that are made now; (): all

    @classmethod
    def read(cls, folder: str | pathlib.Path) -> Self:
        fields = json.loads((pathlib.Path(folder) / JOB).read_text())
        return cls(**fields | {name: tuple(fields[name]) for name in ("prompts", "only")})

    def write(self, folder: pathlib.Path) -> None:
        (folder / JOB).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @property
    def fingerprint(self) -> str:
        """Hash of all that changes an artefact. The paths of folders are left out."""
        fields = dataclasses.asdict(self) | {"format_version": FORMAT_VERSION}
        del fields["only"]
        if self.decoder:
            del fields["decoder"]  # as before there was a choice
        fields |= {name: bool(fields[name]) for name in ("transformer", "base", "trace")}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def config(self) -> WanConfig:
        file = pathlib.Path(self.transformer) / "config.json"
        return WanConfig.from_json(json.loads(file.read_text()), source=str(file))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return latent_grid(self.frames, self.height, self.width, self.config.strides)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that parts read or write, by name."""
        config = self.config
        tokens, dim, length = 1, config.dim, self.text_length
        for size in config.token_grid(self.latent_shape):
            tokens *= size
        every = {
            "token_ids": Tensor((1, length), "int32", "ids of the prompt's pieces, then the end, then padding"),
            "mask": Tensor((1, length), "float32", "1 on pieces and the end, 0 on padding"),
            "text_embeddings": Tensor((1, length, config.text_dim), "float32", "the prompt; zero on padding"),
            "timestep": Tensor((1,), "float32", "in [0, 1000], of the sampler's table"),
            "time": Tensor((1, dim), "float32", "the timestep, embedded"),
            "modulation": Tensor((1, 6, dim), "float32", "the timestep's shifts, scales and gates"),
            "text": Tensor((1, length, dim), "float32", "the prompt at the transformer's width"),
            "latents": Tensor((*self.latent_shape, config.in_channels), "float32", "noise at first, [T, H, W, C]"),
            "velocity": Tensor((*self.latent_shape, config.out_channels), "float32", "noise - data, [T, H, W, C]"),
            "video": Tensor((self.frames, self.height, self.width, 3), "float32", "in [-1, 1], [F, H, W, RGB]"),
        }
        for block in range(config.num_layers + 1):
            meaning = "tokens in prefix order, " + (f"after {block} blocks" if block else "before the blocks")
            every[f"tokens_{block:02d}"] = Tensor((1, tokens, dim), "float32", meaning)
        used = {name for part in self.parts() for name in (*part.inputs, *part.outputs)}
        return {name: tensor for name, tensor in every.items() if name in used}

    def parts(self) -> list[Part]:
        """All parts, in the order in which an app runs them."""
        prompt, step, video = STEPS
        transformer = self.transformer_parts(step)
        encoder = Part("text_encoder", prompt, ("token_ids", "mask"), ("text_embeddings",))
        decoder = Part("vae_decoder", video, ("latents",), ("video",))
        return [
            *([encoder] if self.text_encoder else []),
            *transformer,
            *([decoder] if self.base and self.decoder else []),
        ]

    def needed(self) -> list[Part]:
        """The parts that are made now, and those before them whose outputs they need, in order."""
        chosen, needed = self.only or [part.name for part in self.parts()], []
        tensors: set[str] = set()
        for part in reversed(self.parts()):
            if part.name in chosen or tensors & set(part.outputs):
                needed.insert(0, part)
                tensors |= set(part.inputs)
        return needed

    def artefacts(self, folder: pathlib.Path, format: str, choices: tuple[str, ...] = ()) -> list[Artefact]:
        """The artefacts of a format that are made now, in order. `choices` are tflite's precisions or qnn's chips.

        qnn leaves two parts out: the text encoder looks up a table, and the condition needs float32 for its angles.
        """
        names = [part.name for part in self.parts() if part.name in self.only or not self.only]
        if format == "qnn":
            names = [name for name in names if name not in ("text_encoder", "condition")]
            return [Artefact(folder, format, "fp16", name, chip) for chip in choices for name in names]
        precisions = [name for name in PRECISIONS[format] if format != "tflite" or name in choices]
        return [Artefact(folder, format, precision, name) for name in names for precision in precisions]

    def transformer_parts(self, step: str) -> list[Part]:
        """The transformer as one part, or as condition, embed, groups of blocks, and head."""
        layers, size = self.config.num_layers, self.blocks_per_file
        if size == 0:
            inputs = ("latents", "timestep", "text_embeddings")
            return [Part("transformer", step, inputs, ("velocity",), tuple(range(layers)))]
        blocks = []
        for first in range(0, layers, size):
            end = min(first + size, layers)
            name = f"block_{first:02d}" if end - first == 1 else f"blocks_{first:02d}_{end - 1:02d}"
            inputs = (f"tokens_{first:02d}", "text", "modulation")
            blocks.append(Part(name, step, inputs, (f"tokens_{end:02d}",), tuple(range(first, end))))
        return [
            Part("condition", step, ("timestep", "text_embeddings"), ("time", "modulation", "text")),
            Part("embed", step, ("latents",), ("tokens_00",)),
            *blocks,
            Part("head", step, (f"tokens_{layers:02d}", "time"), ("velocity",)),
        ]
