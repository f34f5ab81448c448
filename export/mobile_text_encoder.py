"""UMT5's encoder as a torch graph of static shape, from the tensors of a text_encoder folder."""

import pathlib

import torch
from torch import nn
from torch.nn import functional as F

from jsurgery.errors import InputError
from jsurgery.wan.model_config import TextEncoderConfig
from jsurgery.wan.text_encoder import position_buckets

from .mobile_model import Projection, RMSNorm, split_heads
from .torch_files import read_json, read_tensors

MASKED = -1e4  # added to the logits of padding: softmax makes it zero, and float16 can hold it


class Layer(nn.Module):
    """Self-attention with a relative position bias, which is constant for a fixed length, and a gated feed-forward."""

    bias_1xHxLxL: torch.Tensor

    def __init__(self, config: TextEncoderConfig, tensors: dict[str, torch.Tensor], number: int, length: int):
        super().__init__()
        weight = lambda name: tensors[f"encoder.block.{number}.layer.{name}.weight"]
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (Projection(weight(f"0.SelfAttention.{name}"), None) for name in "qkvo")
        table = weight("0.SelfAttention.relative_attention_bias")
        spans = config.relative_attention_num_buckets, config.relative_attention_max_distance
        buckets_LxL = torch.from_numpy(position_buckets(length, *spans)).long()
        self.register_buffer("bias_1xHxLxL", table[buckets_LxL].permute(2, 0, 1)[None].contiguous())
        self.wi_0, self.wi_1, self.wo = (
            Projection(weight(f"1.DenseReluDense.{name}"), None) for name in ("wi_0", "wi_1", "wo")
        )
        self.norms = nn.ModuleList(RMSNorm(weight(f"{i}.layer_norm"), config.layer_norm_epsilon) for i in range(2))

    def forward(self, x_1xLxE: torch.Tensor, mask_bias_1x1x1xL: torch.Tensor) -> torch.Tensor:
        h = self.norms[0](x_1xLxE)
        q, k, v = (split_heads(project(h), self.heads) for project in (self.q, self.k, self.v))
        p_1xHxLxL = (q @ k.transpose(2, 3) + self.bias_1xHxLxL + mask_bias_1x1x1xL).softmax(dim=-1)
        x = x_1xLxE + self.o((p_1xHxLxL @ v).transpose(1, 2).reshape(1, x_1xLxE.shape[1], -1))
        h = self.norms[1](x)
        return x + self.wo(F.gelu(self.wi_0(h), approximate="tanh") * self.wi_1(h))


class TextEncoder(nn.Module):
    """(token ids int32 [1, L], mask float32 [1, L]) -> embeddings [1, L, E], zero on padding."""

    def __init__(self, config: TextEncoderConfig, tensors: dict[str, torch.Tensor], length: int):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(tensors["shared.weight"])
        self.layers = nn.ModuleList(Layer(config, tensors, i, length) for i in range(config.num_layers))
        self.norm = RMSNorm(tensors["encoder.final_layer_norm.weight"], config.layer_norm_epsilon)

    def forward(self, token_ids_1xL: torch.Tensor, mask_1xL: torch.Tensor) -> torch.Tensor:
        x, bias_1x1x1xL = self.embedding(token_ids_1xL), (1 - mask_1xL)[:, None, None] * MASKED
        for layer in self.layers:
            x = layer(x, bias_1x1x1xL)
        return self.norm(x) * mask_1xL[:, :, None]


def load_text_encoder(path: str | pathlib.Path, length: int) -> TextEncoder:
    """Loads a `text_encoder/` folder, for prompts of `length` tokens. Raises InputError for a missing tensor."""
    folder = pathlib.Path(path)
    config = TextEncoderConfig.from_json(read_json(folder / "config.json"))
    tensors = {name: tensor.float() for name, tensor in read_tensors(folder).items()}
    try:
        return TextEncoder(config, tensors, length).eval()
    except KeyError as missing:
        raise InputError(f"{folder}: missing {missing.args[0]}") from None
