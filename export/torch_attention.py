"""Hybrid attention, feature maps and rotary embeddings in plain torch."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

from jsurgery.attention.feature_maps import FeatureMapConfig
from pallas_kernels.reference import EPSILON

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
    phi_q: nn.Module | None,
    phi_k: nn.Module | None,
    *,
    num_softmax: int,
    stabilizer: str,
) -> torch.Tensor:
    """Eq. 5 of Attention Surgery on tokens in prefix order; without feature maps, softmax over the prefix alone.

    Numerator and denominator are divided by n_S, so that the softmax branch o_S / n_S is a plain softmax, which fused
    kernels compute. Then the linear terms carry the factor 1 / n_S. It is 1 for "lse". For "max" it is the largest
    probability, since the largest term of n_S is exp(0).

    Args:
      num_softmax: number of the first tokens that are softmax keys; 0 for a linear block.
      stabilizer: "max" or "lse".
    """
    dtype = v_BxHxNxD.dtype
    k_S, k_L = k_BxHxNxD[:, :, :num_softmax], k_BxHxNxD[:, :, num_softmax:]
    v_S, v_L = v_BxHxNxD[:, :, :num_softmax], v_BxHxNxD[:, :, num_softmax:]
    if phi_q is None or phi_k is None or num_softmax == k_BxHxNxD.shape[2]:
        return F.scaled_dot_product_attention(q_BxHxNxD, k_S, v_S)

    phi_q_BxHxNxF, phi_k_BxHxLxF = phi_q(q_BxHxNxD), phi_k(k_L)
    state_BxHxFxD = phi_k_BxHxLxF.mT @ v_L.float()
    mass_BxHxFx1 = phi_k_BxHxLxF.sum(dim=2)[..., None]
    if num_softmax == 0:
        return (phi_q_BxHxNxF @ state_BxHxFxD / (phi_q_BxHxNxF @ mass_BxHxFx1 + EPSILON)).to(dtype)

    if stabilizer == "lse":
        o_BxHxNxD = F.scaled_dot_product_attention(q_BxHxNxD, k_S, v_S).float()
    else:
        scores_BxHxNxS = q_BxHxNxD.float() @ k_S.float().mT / math.sqrt(q_BxHxNxD.shape[-1])
        p_BxHxNxS = scores_BxHxNxS.softmax(dim=-1)
        o_BxHxNxD = p_BxHxNxS @ v_S.float()
        phi_q_BxHxNxF = phi_q_BxHxNxF * p_BxHxNxS.amax(dim=-1, keepdim=True)
    y_BxHxNxD = (o_BxHxNxD + phi_q_BxHxNxF @ state_BxHxFxD) / (1.0 + phi_q_BxHxNxF @ mass_BxHxFx1)
    return y_BxHxNxD.to(dtype)


class TorchFeatureMap(nn.ModuleList):
    """phi of eq. 8, one network for each head: [B, H, N, D] -> non-negative features [B, H, N, P*D], float32."""

    def __init__(self, heads: int, head_dim: int, config: FeatureMapConfig):
        widths = [head_dim] + [config.degree * head_dim] * config.layers
        super().__init__(HeadLinear(heads, d_in, d_out) for d_in, d_out in itertools.pairwise(widths))
        self.log_scale = nn.Parameter(torch.zeros(heads))
        self.degree, self.activation = config.degree, config.activation

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
