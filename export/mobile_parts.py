"""The parts of a job as torch modules of static shape, from which TFLite and ONNX files are made."""

import pathlib

import torch
from torch import nn

from .mobile_layout import TokenLayout
from .mobile_model import Blocks, Condition, Embed, Head, mobile_block, mobile_transformer
from .mobile_text_encoder import load_text_encoder
from .mobile_vae import load_vae_decoder
from .parity import errors, load_sample
from .parts import ExportJob, Part
from .torch_model import load


class MobileParts:
    """Builds one part at a time, of the transformer with that part's weights alone."""

    def __init__(self, job: ExportJob, folder: pathlib.Path):
        self.job, self.folder = job, folder
        self.layout = TokenLayout.of(job.config, job.latent_shape)

    def module(self, part: Part) -> nn.Module:
        job = self.job
        if part.name == "text_encoder":
            return load_text_encoder(f"{job.base}/text_encoder", job.text_length)
        if part.name == "vae_decoder":
            return load_vae_decoder(f"{job.base}/vae")
        model = load(job.transformer, blocks=part.blocks)
        if part.name == "condition":
            return Condition(model).eval()
        if part.name == "embed":
            return Embed(model, self.layout).eval()
        if part.name == "head":
            return Head(model, self.layout).eval()
        if part.name == "transformer":
            return mobile_transformer(model, job.latent_shape)
        blocks = [mobile_block(model, number, self.layout) for number in part.blocks]
        return blocks[0] if len(blocks) == 1 else Blocks(*blocks).eval()

    def arguments(self, part: Part, sample: int = 0) -> tuple[torch.Tensor, ...]:
        """The part's inputs, from a sample of the reference."""
        return tuple(torch.from_numpy(tensor) for tensor in load_sample(self.folder, sample, part.inputs))

    def error(self, part: Part, module: nn.Module) -> dict[str, float | None]:
        """Errors of the torch module's outputs against JAX's."""
        with torch.no_grad():
            outputs = module(*self.arguments(part))
        return errors(part, outputs if isinstance(outputs, tuple) else (outputs,), self.folder)
