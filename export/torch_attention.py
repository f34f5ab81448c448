"""Hybrid attention, feature maps and rotary embeddings in plain torch.

At 480x832x81 there are 32,760 tokens. What is wider than a token (scores, features, a feed-forward's hidden layer) is
computed for a block of tokens at a time.
"""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

from jsurgery.attention.feature_maps import FeatureMapConfig
from pallas_kernels.reference import EPSILON

BLOCK_BYTES = 1 << 28  # of the widest intermediate of a block of tokens

ACTIVATIONS = {
    "relu": torch.relu,
    "softplus": F.softplus,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "elu1": lambda x: F.elu(x) + 1.0,
}


def hybrid_attention(
    q_BxHxNxD: torch.Tensor,
    k_BxHxNxD: torch.Tensor,
    v_BxHxNxD: torch.Tensor,
    phi_q: "TorchFeatureMap | None",
    phi_k: "TorchFeatureMap | None",
    *,
    num_softmax: int,
    stabilizer: str,
) -> torch.Tensor:
    """Eq. 5 of Attention Surgery on tokens in prefix order; without feature maps, softmax over the prefix alone.

    Numerator and denominator are divided by n_S, so that the softmax branch o_S / n_S is a plain softmax, which fused
    kernels compute. Then the linear terms carry the factor 1 / n_S. It is 1 for "lse". For "max" it is the largest
    probability, since the largest term of n_S is exp(0); fused kernels do not return that.

    Args:
      num_softmax: number of the first tokens that are softmax keys; 0 for a linear block.
      stabilizer: "max" or "lse".
    """
    k_S, k_L = k_BxHxNxD[:, :, :num_softmax], k_BxHxNxD[:, :, num_softmax:]
    v_S, v_L = v_BxHxNxD[:, :, :num_softmax], v_BxHxNxD[:, :, num_softmax:]
    if phi_q is None or phi_k is None or num_softmax == k_BxHxNxD.shape[2]:
        return F.scaled_dot_product_attention(q_BxHxNxD, k_S, v_S)

    scores = stabilizer == "max" and num_softmax > 0
    batch, heads, tokens, _ = q_BxHxNxD.shape
    block = block_length(4 * batch * heads * max(phi_q.width, num_softmax if scores else 0))
    state_BxHxFxD, mass_BxHxFx1 = linear_state(phi_k, k_L, v_L, block)
    o_BxHxNxD, n_S = None, 1.0 if num_softmax else EPSILON
    if scores:
        k_S, v_S = k_S.float(), v_S.float()
    elif num_softmax:
        o_BxHxNxD = F.scaled_dot_product_attention(q_BxHxNxD, k_S, v_S).float()
    blocks = []
    for start in range(0, tokens, block):
        q_BxHxTxD = q_BxHxNxD[:, :, start : start + block]
        phi_q_BxHxTxF = phi_q(q_BxHxTxD)
        o_BxHxTxD = 0.0 if o_BxHxNxD is None else o_BxHxNxD[:, :, start : start + block]
        if scores:
            p_BxHxTxS = (q_BxHxTxD.float() @ k_S.mT / math.sqrt(q_BxHxTxD.shape[-1])).softmax(dim=-1)
            o_BxHxTxD = p_BxHxTxS @ v_S
            phi_q_BxHxTxF = phi_q_BxHxTxF * p_BxHxTxS.amax(dim=-1, keepdim=True)
        y_BxHxTxD = (o_BxHxTxD + phi_q_BxHxTxF @ state_BxHxFxD) / (n_S + phi_q_BxHxTxF @ mass_BxHxFx1)
        blocks.append(y_BxHxTxD.to(v_BxHxNxD.dtype))
    return torch.cat(blocks, dim=2)


def block_length(token_bytes: int) -> int:
    """How many tokens a block has whose widest intermediate takes `token_bytes` for each."""
    return max(1, BLOCK_BYTES // token_bytes)


def linear_state(
    phi_k: "TorchFeatureMap", k_BxHxLxD: torch.Tensor, v_BxHxLxD: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the linear keys, in float32: of phi_k(k) v [B, H, F, D], and of phi_k(k) [B, H, F, 1]."""
    batch, heads, _, width = v_BxHxLxD.shape
    state_BxHxFxD = v_BxHxLxD.new_zeros(batch, heads, phi_k.width, width, dtype=torch.float32)
    mass_BxHxFx1 = v_BxHxLxD.new_zeros(batch, heads, phi_k.width, 1, dtype=torch.float32)
    for k_BxHxTxD, v_BxHxTxD in zip(k_BxHxLxD.split(block, dim=2), v_BxHxLxD.split(block, dim=2), strict=True):
        phi_k_BxHxTxF = phi_k(k_BxHxTxD)
        state_BxHxFxD = state_BxHxFxD + phi_k_BxHxTxF.mT @ v_BxHxTxD.float()
        mass_BxHxFx1 = mass_BxHxFx1 + phi_k_BxHxTxF.sum(dim=2)[..., None]
    return state_BxHxFxD, mass_BxHxFx1


class TorchFeatureMap(nn.ModuleList):
    """phi of eq. 8, one network for each head: [B, H, N, D] -> non-negative features [B, H, N, P*D], float32."""

    def __init__(self, heads: int, head_dim: int, config: FeatureMapConfig):
        widths = [head_dim] + [config.degree * head_dim] * config.layers
        super().__init__(HeadLinear(heads, d_in, d_out) for d_in, d_out in itertools.pairwise(widths))
        self.log_scale = nn.Parameter(torch.zeros(heads))
        self.degree, self.activation = config.degree, config.activation
        self.width = widths[-1]  # F, the features of a head

    def forward(self, x_BxHxNxD: torch.Tensor) -> torch.Tensor:
        h = x_BxHxNxD
        for layer in self:
            h = ACTIVATIONS[self.activation](layer(h))
        features = torch.cat([psi**p for p, psi in enumerate(h.chunk(self.degree, dim=-1), start=1)], dim=-1)
        return features.float() * self.log_scale.float().exp()[:, None, None]


class HeadLinear(nn.Module):
    """One linear layer for each head: [B, H, N, d_in] -> [B, H, N, d_out]."""

    def __init__(self, heads: int, d_in: int, d_out: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(heads, d_in, d_out) / math.sqrt(d_in))
        self.bias = nn.Parameter(torch.zeros(heads, d_out))

    def forward(self, x_BxHxNxD: torch.Tensor) -> torch.Tensor:
        return x_BxHxNxD @ self.kernel + self.bias[:, None]


def apply_rope(x_BxHxNxD: torch.Tensor, cos_NxE: torch.Tensor, sin_NxE: torch.Tensor) -> torch.Tensor:
    """Rotates the channel pairs (0, 1), (2, 3), ... of every head by the angles of its token; E = D / 2."""
    real, imag = x_BxHxNxD[..., 0::2], x_BxHxNxD[..., 1::2]
    rotated = torch.stack([real * cos_NxE - imag * sin_NxE, real * sin_NxE + imag * cos_NxE], dim=-1)
    return rotated.flatten(-2).to(x_BxHxNxD.dtype)
