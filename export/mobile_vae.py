"""The VAE's decoder as a torch graph of static shape and rank 4, on frames [T, H, W, C] instead of videos.

A causal 3-D convolution becomes a 2-D convolution: the frames that it sees are joined along the channels.
"""

import pathlib

import torch
from torch import nn
from torch.nn import functional as F

from jsurgery.errors import InputError
from jsurgery.wan.model_config import VaeConfig

from .torch_files import read_json, read_tensors

Tensors = dict[str, torch.Tensor]


class Convolution(nn.Module):
    """A size-preserving convolution over [T, H, W, C]. Its weight is [O, C, kh, kw], or causal [O, C, kt, kh, kw]."""

    def __init__(self, tensors: Tensors, name: str):
        super().__init__()
        weight = tensors[f"{name}.weight"]
        self.frames = weight.shape[2] if weight.ndim == 5 else 1
        if weight.ndim == 5:
            weight = weight.transpose(1, 2).flatten(1, 2)  # [O, kt * C, kh, kw], as `forward` joins the frames
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(tensors[f"{name}.bias"], requires_grad=False)

    def forward(self, x_TxHxWxC: torch.Tensor) -> torch.Tensor:
        x, time = x_TxHxWxC, x_TxHxWxC.shape[0]
        if self.frames > 1:
            before = torch.zeros_like(x[:1])
            x = torch.cat([before] * (self.frames - 1) + [x], dim=0)
            x = torch.cat([x[i : i + time] for i in range(self.frames)], dim=-1)
        padding = self.weight.shape[-1] // 2
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=padding).permute(0, 2, 3, 1)


class Norm(nn.Module):
    """Scales the channel vector to length sqrt(C), then by gamma. It squares x / 16, which float16 can hold."""

    gain_C: torch.Tensor

    def __init__(self, tensors: Tensors, name: str):
        super().__init__()
        self.register_buffer("gain_C", tensors[f"{name}.gamma"].flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 0.0625
        return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True).clamp(min=1e-28)) * self.gain_C


class Residual(nn.Module):
    """Two convolutions, each after a norm and SiLU, added to the input or to its 1x1 convolution."""

    def __init__(self, tensors: Tensors, name: str):
        super().__init__()
        self.norm1, self.norm2 = (Norm(tensors, f"{name}.norm{i}") for i in (1, 2))
        self.conv1, self.conv2 = (Convolution(tensors, f"{name}.conv{i}") for i in (1, 2))
        shortcut = f"{name}.conv_shortcut"
        self.shortcut = Convolution(tensors, shortcut) if f"{shortcut}.weight" in tensors else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class FrameAttention(nn.Module):
    """Self-attention with one head over the pixels of each frame."""

    def __init__(self, tensors: Tensors, name: str):
        super().__init__()
        self.norm, self.to_qkv, self.proj = (
            Norm(tensors, f"{name}.norm"),
            Convolution(tensors, f"{name}.to_qkv"),
            Convolution(tensors, f"{name}.proj"),
        )

    def forward(self, x_TxHxWxC: torch.Tensor) -> torch.Tensor:
        time, height, width, dim = x_TxHxWxC.shape
        q, k, v = self.to_qkv(self.norm(x_TxHxWxC)).reshape(time, height * width, 3 * dim).chunk(3, dim=-1)
        p_TxPxP = ((q * dim**-0.5) @ k.transpose(1, 2)).softmax(dim=-1)
        return x_TxHxWxC + self.proj((p_TxPxP @ v).reshape(time, height, width, dim))


class Upsample(nn.Module):
    """Doubles height and width and, if it has a temporal convolution, all frames but the first."""

    def __init__(self, tensors: Tensors, name: str):
        super().__init__()
        time_conv = f"{name}.time_conv"
        self.time_conv = Convolution(tensors, time_conv) if f"{time_conv}.weight" in tensors else None
        self.conv = Convolution(tensors, f"{name}.resample.1")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.time_conv is not None and x.shape[0] > 1:
            rest = self.time_conv(x[1:])
            time, height, width, dim = rest.shape
            pairs = rest.reshape(time, height * width, 2, dim // 2).transpose(1, 2)
            x = torch.cat([x[:1], pairs.reshape(2 * time, height, width, dim // 2)], dim=0)
        time, height, width, dim = x.shape
        x = torch.cat([x, x], dim=-1).reshape(time, height, 2 * width * dim)
        x = torch.cat([x, x], dim=-1).reshape(time, 2 * height, 2 * width, dim)
        return self.conv(x)


class VaeDecoder(nn.Module):
    """Normalised latents [T, H, W, C] -> video [F, 8 H, 8 W, 3] in [-1, 1]. All frames are in memory at once."""

    mean_C: torch.Tensor
    std_C: torch.Tensor

    def __init__(self, config: VaeConfig, tensors: Tensors):
        super().__init__()
        self.register_buffer("mean_C", torch.tensor(config.latents_mean))
        self.register_buffer("std_C", torch.tensor(config.latents_std))
        layers: list[nn.Module] = [Convolution(tensors, "post_quant_conv"), Convolution(tensors, "decoder.conv_in")]
        middle = "decoder.mid_block"
        layers += [Residual(tensors, f"{middle}.resnets.0"), FrameAttention(tensors, f"{middle}.attentions.0")]
        layers.append(Residual(tensors, f"{middle}.resnets.1"))
        for level in range(len(config.dim_mult)):
            up = f"decoder.up_blocks.{level}"
            layers += [Residual(tensors, f"{up}.resnets.{i}") for i in range(config.num_res_blocks + 1)]
            if level < len(config.temperal_downsample):
                layers.append(Upsample(tensors, f"{up}.upsamplers.0"))
        layers += [Norm(tensors, "decoder.norm_out"), nn.SiLU(), Convolution(tensors, "decoder.conv_out")]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents_TxHxWxC: torch.Tensor) -> torch.Tensor:
        return self.layers(latents_TxHxWxC * self.std_C + self.mean_C).clamp(-1, 1)


def load_vae_decoder(path: str | pathlib.Path) -> VaeDecoder:
    """Loads the decoder from a diffusers `vae/` folder. Raises InputError for a missing tensor."""
    folder = pathlib.Path(path)
    config = VaeConfig.from_json(read_json(folder / "config.json"))
    tensors = {name: tensor.float() for name, tensor in read_tensors(folder, "decoder.", "post_quant_conv.").items()}
    try:
        return VaeDecoder(config, tensors).eval()
    except KeyError as missing:
        raise InputError(f"{folder}: missing {missing.args[0]}") from None
