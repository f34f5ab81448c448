"""The Wan2.1 diffusion transformer in torch, with full softmax or hybrid self-attention in each block.

The state dict has the tensor names of a checkpoint in the diffusers layout, plus the feature maps `phi_q` and `phi_k`
of converted blocks. diffusers is not needed, unless a caller asks for its output class. Published model cards import
`jsurgery.export.torch_model.load`: that name must stay.
"""

import contextlib
import math
import pathlib
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from jsurgery.attention.rope import rope_tables
from jsurgery.errors import InputError
from jsurgery.rates import Rate
from jsurgery.wan.model_config import WanConfig

from .kinds import check_kinds
from .torch_attention import TorchFeatureMap, apply_rope, block_length, hybrid_attention
from .torch_files import open_tensors, read_json

# Tensors whose names contain one of these stay float32 whatever the dtype of `load`.
FLOAT32 = ("time_embedder", "time_proj", "scale_shift_table", "norm", "log_scale")


def timestep_embedding(timesteps_B: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of timesteps in [0, 1000], cosines first: [B, width], float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timesteps_B.device) / half)
    angles = timesteps_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis with gain and bias; float32 in and out."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)


class Attention(nn.Module):
    """An attention layer with its projections and norms. Queries and keys are normalised over all heads together."""

    def __init__(self, config: WanConfig, *, converted: bool = False):
        super().__init__()
        dim, hybrid = config.dim, config.hybrid
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)
        self.stabilizer = hybrid.stabilizer if hybrid else "lse"
        self.phi_q = self.phi_k = None
        if converted and hybrid and hybrid.linear_branch:
            self.phi_q, self.phi_k = (
                TorchFeatureMap(self.heads, config.attention_head_dim, hybrid.feature_map) for _ in range(2)
            )

    def forward(
        self,
        x_BxNxD: torch.Tensor,
        context_BxMxD: torch.Tensor,
        num_softmax: int,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        q, k, v = self.norm_q(self.to_q(x_BxNxD)), self.norm_k(self.to_k(context_BxMxD)), self.to_v(context_BxMxD)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        y = hybrid_attention(q, k, v, self.phi_q, self.phi_k, num_softmax=num_softmax, stabilizer=self.stabilizer)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class GeluLinear(nn.Module):
    """The first layer of a feed-forward, which checkpoints call `proj`, and its activation."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.proj = nn.Linear(d_in, d_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.net = nn.Sequential(GeluLinear(dim, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Block(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward, modulated by the timestep (adaLN)."""

    def __init__(self, config: WanConfig, rate: Rate):
        super().__init__()
        dim = config.dim
        self.eps, self.ffn_dim = config.eps, config.ffn_dim
        self.attn1 = Attention(config, converted=rate != 1)
        self.attn2 = Attention(config)
        self.norm2 = LayerNorm(dim, config.eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))

    def forward(
        self,
        x_BxNxD: torch.Tensor,
        text_BxMxD: torch.Tensor,
        modulation_Bx6xD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        num_softmax: int,
        rows_BxN: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The tokens and `rope` are in prefix order: the first `num_softmax` tokens are the softmax keys.

        With `rows_BxN`, each token has the modulation of its own row.
        """
        x, dtype = x_BxNxD, x_BxNxD.dtype
        modulation = (self.scale_shift_table.float() + modulation_Bx6xD.float()).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            lambda i=i: of_tokens(modulation[i], rows_BxN) for i in range(6)
        )

        h = (plain_norm(x, self.eps) * (1 + scale1()) + shift1()).to(dtype)
        x = (x + self.attn1(h, h, num_softmax, rope) * gate1()).to(dtype)

        x = x + self.attn2(self.norm2(x).to(dtype), text_BxMxD, text_BxMxD.shape[1])

        h = (plain_norm(x, self.eps) * (1 + scale2()) + shift2()).to(dtype)
        block = block_length(len(h) * self.ffn_dim * h.element_size())
        h = torch.cat([self.ffn(h_BxTxD) for h_BxTxD in h.split(block, dim=1)], dim=1)
        return (x + h * gate2()).to(dtype)


def of_tokens(values_Rx1xD: torch.Tensor, rows_BxN: torch.Tensor | None) -> torch.Tensor:
    """Each token's row, [B, N, D]; without `rows_BxN` a row is that of all tokens of an example."""
    return values_Rx1xD if rows_BxN is None else values_Rx1xD[:, 0][rows_BxN]


def plain_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the last axis without gain and bias, float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


class TwoLayers(nn.Module):
    """linear_2(activation(linear_1(x)))."""

    def __init__(self, d_in: int, dim: int, activation: nn.Module):
        super().__init__()
        self.linear_1, self.activation, self.linear_2 = nn.Linear(d_in, dim), activation, nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.activation(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ConditionEmbedder(nn.Module):
    """Embeds the timestep and projects the text embeddings, both to the model's width."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim = config.dim
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLayers(config.freq_dim, dim, nn.SiLU())
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLayers(config.text_dim, dim, nn.GELU(approximate="tanh"))

    def forward(
        self, timesteps_B: torch.Tensor, text_BxMxE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Time embedding [B, D], modulation [B, 6, D], text [B, M, D]."""
        time_BxD = self.time_embedder(timestep_embedding(timesteps_B, self.freq_dim))
        modulation_Bx6xD = self.time_proj(F.silu(time_BxD)).unflatten(1, (6, -1))
        return time_BxD, modulation_Bx6xD, self.text_embedder(text_BxMxE)


class HybridWanTransformer3DModel(nn.Module):
    """A drop-in transformer for `diffusers.WanPipeline`. It is called like diffusers' WanTransformer3DModel.

    `WanPipeline.from_pretrained` checks the transformer's class, so build the pipeline from its components:

        base = WanPipeline.from_pretrained(folder)
        pipeline = WanPipeline(**base.components | {"transformer": load(hybrid_folder)})
    """

    def __init__(self, config: WanConfig):
        super().__init__()
        dim, patch = config.dim, config.patch_size
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config, rate) for rate in config.rates)
        self.proj_out = nn.Linear(dim, math.prod(patch) * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / math.sqrt(dim))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of latents, text and matmuls."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def cache_context(self, name: str, **step: Any) -> contextlib.AbstractContextManager[None]:
        """diffusers calls this around each forward, to name the guidance branch. This model caches nothing."""
        return contextlib.nullcontext()

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The velocity [B, C, T, H, W] for latents [B, C, T, H, W], timesteps [B] and text embeddings [B, M, text_dim].

        Timesteps lie in [0, 1000], and may be [B, N], one for each token: few different ones, as in image to video of
        Wan2.2 TI2V 5B. Returns diffusers' Transformer2DModelOutput, or (velocity,) without `return_dict`.
        Raises InputError for sizes that do not divide into patches or exceed RoPE's table, and for inputs that only
        other Wan models have.
        """
        if encoder_hidden_states_image is not None:
            raise InputError("encoder_hidden_states_image: a text-to-video transformer takes none")
        if attention_kwargs:
            raise InputError(f"attention_kwargs: expected none, found {', '.join(attention_kwargs)}")
        config = self.config
        grid = config.token_grid(tuple(hidden_states.shape[2:]))
        if tuple(timestep.shape) not in ((len(hidden_states),), (len(hidden_states), math.prod(grid))):
            raise InputError(
                f"timestep: expected one for each sample or for each token, found shape {tuple(timestep.shape)}"
            )
        order = config.hybrid.token_order(grid) if config.hybrid else None

        x = self.patch_embedding(hidden_states.to(self.dtype)).flatten(2).transpose(1, 2)
        tables = rope_tables(grid, config.attention_head_dim, config.rope_max_seq_len)
        cos, sin = (torch.from_numpy(table).to(x.device) for table in tables)
        if order is not None:
            permutation = torch.from_numpy(order.permutation).to(x.device)
            x, cos, sin = x[:, permutation], cos[permutation], sin[permutation]
            timestep = timestep[:, permutation] if timestep.ndim == 2 else timestep
        rows = None
        if timestep.ndim == 2:
            timestep, rows = timestep.unique(return_inverse=True)
        time, modulation, text = self.condition_embedder(timestep, encoder_hidden_states)

        for block, rate in zip(self.blocks, config.rates, strict=True):
            num_softmax = order.num_softmax(rate) if order is not None else x.shape[1]
            x = block(x, text, modulation, (cos, sin), num_softmax, rows)

        values = (self.scale_shift_table.float() + time[:, None].float()).chunk(2, dim=1)
        shift, scale = (of_tokens(value, rows) for value in values)
        x = self.proj_out((plain_norm(x, config.eps) * (1 + scale) + shift).to(x.dtype))
        if order is not None:
            x = x[:, torch.from_numpy(order.inverse).to(x.device)]
        velocity = self.unpatchify(x, grid)
        if not return_dict:
            return (velocity,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=velocity)

    def unpatchify(self, x_BxNxP: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """[B, N, pt * ph * pw * C] in natural order -> [B, C, T, H, W]."""
        (pt, ph, pw), (t, h, w) = self.config.patch_size, grid
        x = x_BxNxP.reshape(-1, t, h, w, pt, ph, pw, self.config.out_channels)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(-1, self.config.out_channels, t * pt, h * ph, w * pw)


def load(
    path: str | pathlib.Path, dtype: torch.dtype = torch.float32, blocks: Collection[int] | None = None
) -> HybridWanTransformer3DModel:
    """Loads a transformer from a local folder in the diffusers layout, hybrid or not, in evaluation mode.

    `dtype` is the dtype of matmuls. Norms, modulation, the time embedding and the feature maps' scales stay float32.
    `blocks` are the numbers of the blocks whose weights are read, all by default; the others stay without memory, on
    torch's meta device. Raises InputError that names a missing or damaged file, or the tensors that do not fit.
    """
    folder = pathlib.Path(path)
    config = WanConfig.from_json(read_json(folder / "config.json"), source=str(folder / "config.json"))
    check_kinds(config, str(folder / "config.json"))
    stored = open_tensors(folder)
    with torch.device("meta"):
        model = HybridWanTransformer3DModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing {name} {expected[name]}" for name in sorted(expected.keys() - stored.keys())]
    problems += [f"unexpected {name} {stored[name].shape}" for name in sorted(stored.keys() - expected.keys())]
    problems += [
        f"{name} should be {shape}, is {stored[name].shape}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    if problems:
        raise InputError(f"{folder}: {len(problems)} tensors do not fit: {'; '.join(problems)}")
    tensors = {}
    for name, tensor in stored.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        if block is None or blocks is None or int(block[1]) in blocks:
            stays_float32 = any(part in name for part in FLOAT32)
            tensors[name] = tensor.read().to(torch.float32 if stays_float32 else dtype)
    model.load_state_dict(tensors, strict=False, assign=True)
    return model.eval()
