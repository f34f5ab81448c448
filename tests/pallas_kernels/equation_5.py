"""Eq. 5 as written, with all its gradients: by torch in float64, which compiles nothing and shares no code with JAX."""

import math
from typing import Any

import jax
import numpy as np
import torch

ACTIVATIONS = {
    "relu": torch.relu,
    "softplus": torch.nn.functional.softplus,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "elu1": lambda x: torch.nn.functional.elu(x) + 1,
}


def features(phi: Any, x_BxNxHxD: torch.Tensor) -> torch.Tensor:
    """Eq. 8."""
    for kernel, bias in zip(phi.kernels, phi.biases, strict=True):
        x_BxNxHxD = ACTIVATIONS[phi.activation](torch.einsum("bnhd,hdf->bnhf", x_BxNxHxD, kernel) + bias)
    slices = x_BxNxHxD.chunk(phi.degree, -1)
    powers = torch.cat([psi**p for p, psi in enumerate(slices, start=1)], -1)
    return powers * phi.log_scale.exp()[:, None]


def equation_5(
    arguments: Any, cotangent: Any, num_softmax: int, key_valid: np.ndarray | None = None, stabilizer: str = "max"
) -> tuple[np.ndarray, Any]:
    """y of (q, k, v, query_map, key_map), and the gradient of y . cotangent for each of their arrays."""
    leaves, tree = jax.tree.flatten(arguments)
    leaves = [torch.tensor(np.float64(leaf), requires_grad=True) for leaf in leaves]
    q, k, v, query_map, key_map = jax.tree.unflatten(tree, leaves)
    valid = torch.ones(k.shape[:2], dtype=torch.bool) if key_valid is None else torch.tensor(key_valid)
    valid = valid[:, None, None]
    weights = []
    if num_softmax:
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k[:, :num_softmax]) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~valid[..., :num_softmax], -math.inf)
        c = scores.amax(-1, True) if stabilizer == "max" else scores.logsumexp(-1, True)
        weights.append((scores - c).exp())
    if num_softmax < k.shape[1]:
        linear = torch.einsum("bnhf,bmhf->bhnm", features(query_map, q), features(key_map, k[:, num_softmax:]))
        weights.append(linear * valid[..., num_softmax:])
    weights = torch.cat(weights, -1)
    denominator = weights.sum(-1, True) + (0.0 if num_softmax else 1e-6)
    y = torch.einsum("bhnm,bmhd->bnhd", weights / denominator, v)
    loss = (y * torch.tensor(np.float64(cotangent))).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
    return y.detach().numpy(), jax.tree.unflatten(tree, [grad.numpy() for grad in grads])
