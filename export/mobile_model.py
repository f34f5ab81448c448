"""The mobile form of the transformer: graphs of static shape and rank at most 4, without gathers, for one video.

It computes what `torch_model` computes, up to rounding. The differences are made once, when a graph is built:

- RoPE rotates the two halves of a head's channels instead of channel pairs. Rows of the query and key projections,
  their norms' gains and the input channels of the feature maps are permuted to match.
- 1 / sqrt(D) is part of the query norm's gain.
- The linear state is a mean over its tokens instead of a sum, so that 16 bits hold it. The number of linear tokens and
  the scales of both feature maps are divided evenly between query and key features. A block without softmax leaves the
  number out: it cancels.
- Heads, queries and linear keys are processed a few at a time.
- The softmax branch is a plain softmax, which compilers have as one operation.
"""

import functools
import itertools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from jsurgery.attention.rope import rope_tables
from jsurgery.wan.model_config import WanConfig
from pallas_kernels.reference import EPSILON

from . import torch_attention, torch_model
from .mobile_layout import TokenLayout
from .torch_attention import ACTIVATIONS
from .torch_model import HybridWanTransformer3DModel, plain_norm

# Heads, and queries or linear keys, that attention processes at a time. With 256 features a head, more would not fit
# into the NPU's 8 MB of memory. Full softmax is not tiled: the NPU's compiler tiles it better (see `--ddr_table`).
HEADS, TILE = 4, 512


def half_split(head_dim: int) -> torch.Tensor:
    """Indices of a head's channels: first all even channels, then all odd ones. RoPE rotates pairs (even, odd)."""
    return torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])


def split_heads(x_1xNxD: torch.Tensor, heads: int) -> torch.Tensor:
    """[1, N, D] -> [1, H, N, D / H]."""
    return x_1xNxD.reshape(1, x_1xNxD.shape[1], heads, -1).transpose(1, 2)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a fixed gain."""

    gain_D: torch.Tensor

    def __init__(self, gain_D: torch.Tensor, eps: float):
        super().__init__()
        self.eps = eps
        self.register_buffer("gain_D", gain_D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The NPU's compiler has an operation for this pattern.
        return F.rms_norm(x, self.gain_D.shape, self.gain_D, self.eps)


class Projection(nn.Linear):
    """A linear layer with fixed weight [out, in] and bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)


class MobileFeatureMap(nn.Module):
    """phi of a group of heads, times `scale_H`, as a list of the features of each power, each [1, H, N, D].

    The input has its channels in half-split order and is multiplied by `gain`, which phi undoes. With ReLU the scale is
    part of the last layer, as s ** (1 / p) for power p.
    """

    scale: torch.Tensor

    def __init__(self, source: torch_attention.TorchFeatureMap, heads: slice, scale_H: torch.Tensor, gain: float):
        super().__init__()
        self.degree, self.activation = source.degree, ACTIVATIONS[source.activation]
        layers: list[Any] = list(source)
        kernels = [layer.kernel.detach()[heads] for layer in layers]
        biases = [layer.bias.detach()[heads, None] for layer in layers]
        kernels[0] = kernels[0][:, half_split(kernels[0].shape[1])] / gain
        self.scaled = source.activation == "relu"
        if self.scaled:
            powers = torch.arange(1, self.degree + 1).repeat_interleave(kernels[-1].shape[2] // self.degree)
            spread_HxF = scale_H[:, None] ** (1 / powers)
            kernels[-1], biases[-1] = kernels[-1] * spread_HxF[:, None], biases[-1] * spread_HxF[:, None]
        else:
            self.register_buffer("scale", scale_H[None, :, None, None])
        self.kernels = nn.ParameterList(nn.Parameter(kernel[None], requires_grad=False) for kernel in kernels)
        self.biases = nn.ParameterList(nn.Parameter(bias[None], requires_grad=False) for bias in biases)

    def forward(self, x_1xHxNxD: torch.Tensor) -> list[torch.Tensor]:
        h = x_1xHxNxD
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            h = self.activation(h @ kernel + bias)
        features = []
        for power, psi in enumerate(h.chunk(self.degree, dim=-1)):
            product = psi
            for _ in range(power):
                product = product * psi
            features.append(product if self.scaled else product * self.scale)
        return features


def tiles(tokens: int, size: int) -> list[slice]:
    """Slices that divide a number of tokens or heads evenly into pieces of at most `size`."""
    count = -(-tokens // size)
    bounds = [round(i * tokens / count) for i in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


class Attention(nn.Module):
    """Self-attention over tokens in prefix order if `rope` is given, else cross-attention.

    With a `tile` it processes `HEADS` heads, and `tile` queries or linear keys, at a time.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        source: torch_model.Attention,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
        num_softmax: int | None = None,
        tokens: int | None = None,
        tile: int | None = None,
    ):
        super().__init__()
        self.heads, dim = source.heads, source.to_q.weight.shape[0]
        head_dim = dim // source.heads
        rows = torch.arange(dim)
        if rope is not None:
            rows = (torch.arange(source.heads)[:, None] * head_dim + half_split(head_dim)).flatten()
            cos_NxE, sin_NxE = rope
            self.register_buffer("cos", cos_NxE[None, None])
            self.register_buffer("sin", sin_NxE[None, None])
        self.rotates, self.tile, gain = rope is not None, tile, head_dim**-0.5
        out: Any = source.to_out[0]
        q, k, v = source.to_q, source.to_k, source.to_v
        self.to_q, self.to_k = (Projection(layer.weight.detach()[rows], layer.bias.detach()[rows]) for layer in (q, k))
        self.to_v, self.to_out = (Projection(layer.weight.detach(), layer.bias.detach()) for layer in (v, out))
        self.norm_q = RMSNorm(source.norm_q.weight.detach()[rows] * gain, source.norm_q.eps)
        self.norm_k = RMSNorm(source.norm_k.weight.detach()[rows], source.norm_k.eps)
        self.num_softmax, self.stabilizer = num_softmax, source.stabilizer
        self.groups = tiles(self.heads, HEADS if tile else self.heads)
        self.phi_q, self.phi_k = nn.ModuleList(), nn.ModuleList()  # one for each group of heads
        if source.phi_q is not None and source.phi_k is not None and num_softmax != tokens:
            assert tokens is not None and num_softmax is not None
            self.linear = tokens - num_softmax
            scale_H = (source.phi_q.log_scale + source.phi_k.log_scale).detach().float().exp() * self.linear
            for heads in self.groups:
                key_scale_H = scale_H[heads].sqrt() / self.linear
                query_scale_H = key_scale_H * (self.linear if num_softmax else 1)
                self.phi_q.append(MobileFeatureMap(source.phi_q, heads, query_scale_H, gain))
                self.phi_k.append(MobileFeatureMap(source.phi_k, heads, key_scale_H, 1.0))

    def rotate(self, x_1xHxNxD: torch.Tensor) -> torch.Tensor:
        real, imag = x_1xHxNxD.chunk(2, dim=-1)
        return torch.cat([real * self.cos - imag * self.sin, imag * self.cos + real * self.sin], dim=-1)

    def forward(self, x_1xNxD: torch.Tensor, context_1xMxD: torch.Tensor) -> torch.Tensor:
        q, k = self.norm_q(self.to_q(x_1xNxD)), self.norm_k(self.to_k(context_1xMxD))
        v, outputs = self.to_v(context_1xMxD), []
        head_dim = q.shape[2] // self.heads
        for group, heads in enumerate(self.groups):
            channels = slice(heads.start * head_dim, heads.stop * head_dim)
            outputs.append(self.attend_group(group, q[:, :, channels], k[:, :, channels], v[:, :, channels]))
        return self.to_out(torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0])

    def attend_group(self, group: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = self.groups[group].stop - self.groups[group].start
        q, k, v = (split_heads(x_1xNxD, heads) for x_1xNxD in (q, k, v))
        if self.rotates:
            q, k = self.rotate(q), self.rotate(k)
        y_1xNxHxD = self.attend(group, q, k, v).transpose(1, 2)
        return y_1xNxHxD.reshape(1, y_1xNxHxD.shape[1], -1)

    def attend(self, group: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Eq. 5 for one group of heads: [1, H, N, D]. The queries carry the factor 1 / sqrt(D) already."""
        softmax = phi_q = state = None
        if self.num_softmax != 0:
            softmax = k[:, :, : self.num_softmax].transpose(2, 3), v[:, :, : self.num_softmax]
        if self.phi_k:
            phi_q, k, v = self.phi_q[group], k[:, :, self.num_softmax :], v[:, :, self.num_softmax :]
            sums = [state_of_tile(self.phi_k[group], k[:, :, i], v[:, :, i]) for i in self.pieces(k)]
            state = [functools.reduce(torch.add, parts) for parts in zip(*sums, strict=True)]
        pieces = [self.attend_tile(q[:, :, i], softmax, phi_q, state) for i in self.pieces(q)]
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]

    def pieces(self, x_1xHxNxD: torch.Tensor) -> list[slice]:
        return tiles(x_1xHxNxD.shape[2], self.tile or x_1xHxNxD.shape[2])

    def attend_tile(
        self, q_1xHxTxD: torch.Tensor, softmax: tuple | None, phi_q: nn.Module | None, state: list | None
    ) -> torch.Tensor:
        if softmax is not None:
            k_1xHxDxS, v_1xHxSxD = softmax
            p_1xHxTxS = (q_1xHxTxD @ k_1xHxDxS).softmax(dim=-1)
            o_S_1xHxTxD = p_1xHxTxS @ v_1xHxSxD
            if state is None:
                return o_S_1xHxTxD
        assert phi_q is not None and state is not None
        powers = list(zip(phi_q(q_1xHxTxD), state[0::2], state[1::2], strict=True))
        o_L_1xHxTxD = functools.reduce(torch.add, (phi_1xHxTxD @ S for phi_1xHxTxD, S, _ in powers))
        n_L_1xHxTx1 = functools.reduce(torch.add, (phi_1xHxTxD @ z for phi_1xHxTxD, _, z in powers))
        if softmax is None:
            return o_L_1xHxTxD / (n_L_1xHxTx1 + EPSILON / self.linear)
        if self.stabilizer == "max":
            # n_S = 1 / max p. The softmax output is divided by n_S already, so the linear terms are divided here.
            max_p_1xHxTx1 = p_1xHxTxS.amax(dim=-1, keepdim=True)
            o_L_1xHxTxD, n_L_1xHxTx1 = o_L_1xHxTxD * max_p_1xHxTx1, n_L_1xHxTx1 * max_p_1xHxTx1
        return (o_S_1xHxTxD + o_L_1xHxTxD) / (1.0 + n_L_1xHxTx1)


def state_of_tile(phi_k: nn.Module, k_1xHxTxD: torch.Tensor, v_1xHxTxD: torch.Tensor) -> list[torch.Tensor]:
    """A tile's terms of the linear state, as a list S, z, S, z, ...: for each power S [1, H, D, D], z [1, H, D, 1]."""
    sums = []
    for phi_1xHxTxD in phi_k(k_1xHxTxD):
        sums += [phi_1xHxTxD.transpose(2, 3) @ v_1xHxTxD, phi_1xHxTxD.sum(dim=2, keepdim=True).transpose(2, 3)]
    return sums


class Block(nn.Module):
    """(tokens [1, N, D], text [1, M, D], modulation [1, 6, D]) -> tokens."""

    def __init__(self, source: torch_model.Block, self_attention: Attention):
        super().__init__()
        self.eps, self.table = source.eps, nn.Parameter(source.scale_shift_table.detach(), requires_grad=False)
        self.attn1, self.attn2 = self_attention, Attention(source.attn2, tile=TILE)
        self.norm2, self.ffn = source.norm2, source.ffn

    def forward(self, x_1xNxD: torch.Tensor, text_1xMxD: torch.Tensor, modulation_1x6xD: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + modulation_1x6xD).split(1, dim=1)
        h = plain_norm(x_1xNxD, self.eps) * (1 + scale1) + shift1
        x = x_1xNxD + self.attn1(h, h) * gate1
        x = x + self.attn2(self.norm2(x), text_1xMxD)
        h = plain_norm(x, self.eps) * (1 + scale2) + shift2
        return x + self.ffn(h) * gate2


class Blocks(nn.Sequential):
    """Several blocks in one graph."""

    def forward(self, x, text, modulation):  # type: ignore[override]
        for block in self:
            x = block(x, text, modulation)
        return x


class Embed(nn.Module):
    """latents [T, H, W, C] -> tokens [1, N, D] in prefix order."""

    def __init__(self, model: HybridWanTransformer3DModel, layout: TokenLayout):
        super().__init__()
        weight_DxCx1xPxQ = model.patch_embedding.weight.detach()
        weight_DxPxQxC = weight_DxCx1xPxQ[:, :, 0].permute(0, 2, 3, 1)
        self.patch = tuple(weight_DxPxQxC.shape[1:3])
        self.projection = Projection(weight_DxPxQxC.flatten(1), model.state_dict()["patch_embedding.bias"])
        self.grid, self.pieces = layout.grid, [piece for _, _, piece in layout.order.pieces]

    def forward(self, latents_TxHxWxC: torch.Tensor) -> torch.Tensor:
        frames, height, width = self.grid
        x = latents_TxHxWxC.reshape(frames * height, self.patch[0], width, -1).transpose(1, 2)
        x = x.reshape(1, frames * height * width, -1)
        if len(self.pieces) > 1:
            x = torch.cat([x[:, piece] for piece in self.pieces], dim=1)
        return self.projection(x)


class Condition(nn.Module):
    """(timestep [1], text embeddings [1, M, E]) -> time [1, D], modulation [1, 6, D], text [1, M, D]; in float32."""

    frequencies: torch.Tensor

    def __init__(self, model: HybridWanTransformer3DModel):
        super().__init__()
        self.source = model.condition_embedder
        half = model.config.freq_dim // 2
        self.register_buffer("frequencies", 10_000.0 ** (-torch.arange(half) / half))

    def forward(self, timestep_1: torch.Tensor, text_1xMxE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        source, angles = self.source, timestep_1[:, None] * self.frequencies
        time_1xD = source.time_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1))
        modulation_1x6xD = source.time_proj(F.silu(time_1xD)).reshape(1, 6, -1)
        return time_1xD, modulation_1x6xD, source.text_embedder(text_1xMxE)


class Head(nn.Module):
    """(tokens [1, N, D] in prefix order, time [1, D]) -> velocity [T, H, W, C]."""

    def __init__(self, model: HybridWanTransformer3DModel, layout: TokenLayout):
        super().__init__()
        self.eps, self.table = model.config.eps, nn.Parameter(model.scale_shift_table.detach(), requires_grad=False)
        self.proj_out, self.patch = model.proj_out, model.config.patch_size[1:]
        self.grid, self.order = layout.grid, layout.order

    def forward(self, x_1xNxD: torch.Tensor, time_1xD: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.table + time_1xD.reshape(1, 1, -1)).split(1, dim=1)
        x_1xNxP = self.proj_out(plain_norm(x_1xNxD, self.eps) * (1 + scale) + shift)
        (frames, height, width), (ph, pw) = self.grid, self.patch
        x = self.natural(x_1xNxP).reshape(frames * height, width, ph, -1).transpose(1, 2)
        return x.reshape(frames, height * ph, width * pw, -1)

    def natural(self, x_1xNxP: torch.Tensor) -> torch.Tensor:
        """Tokens back in natural order, without a gather. The pieces of a segment are its residues: joined along the
        channels and reshaped, they are the segment's tokens in order."""
        if self.order.period == 1:
            return x_1xNxP
        period, segments = self.order.period, []
        for number, (_, size, _) in enumerate(self.order.segments):
            longest = -(-size // period)
            columns = []
            for residue in range(period):
                start, end = self.order.places.get((number, residue), (0, 0))
                columns.append(F.pad(x_1xNxP[:, start:end], (0, 0, 0, longest - (end - start))))
            row = torch.cat(columns, dim=2).reshape(1, longest * period, -1)
            segments.append(row[:, :size])
        return torch.cat(segments, dim=1) if len(segments) > 1 else segments[0]


class Transformer(nn.Module):
    """(latents [T, H, W, C], timestep [1], text embeddings [1, M, E]) -> velocity [T, H, W, C], in one graph."""

    def __init__(self, embed: Embed, condition: Condition, blocks: Blocks, head: Head):
        super().__init__()
        self.embed, self.condition, self.blocks, self.head = embed, condition, blocks, head

    def forward(
        self, latents_TxHxWxC: torch.Tensor, timestep_1: torch.Tensor, text_1xMxE: torch.Tensor
    ) -> torch.Tensor:
        time, modulation, text = self.condition(timestep_1, text_1xMxE)
        return self.head(self.blocks(self.embed(latents_TxHxWxC), text, modulation), time)


def mobile_block(model: HybridWanTransformer3DModel, index: int, layout: TokenLayout, tile: int = TILE) -> Block:
    """Block `index` for one video size. In a converted block attention processes at most `tile` queries or keys at a
    time."""
    config = model.config
    source: Any = model.blocks[index]
    rope, num_softmax = mobile_rope(config, layout), layout.softmax[config.rates[index]]
    converted = num_softmax != layout.tokens
    attention = Attention(source.attn1, rope, num_softmax, layout.tokens, tile if converted else None)
    return Block(source, attention).eval()


def mobile_rope(config: WanConfig, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [N, D / 2] in prefix order."""
    tables = rope_tables(layout.grid, config.attention_head_dim, config.rope_max_seq_len)
    cos, sin = (torch.from_numpy(table[layout.order.permutation]) for table in tables)
    return cos, sin


def mobile_transformer(
    model: HybridWanTransformer3DModel, latent_shape: tuple[int, int, int], tile: int = TILE
) -> Transformer:
    """The mobile form of a whole float32 model, for latents of one size (T, H, W)."""
    layout = TokenLayout.of(model.config, latent_shape)
    blocks = Blocks(*(mobile_block(model, i, layout, tile) for i in range(model.config.num_layers)))
    return Transformer(Embed(model, layout), Condition(model), blocks, Head(model, layout)).eval()
