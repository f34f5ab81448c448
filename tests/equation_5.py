"""Hybrid attention (eq. 5) and its feature maps (eq. 8) as the paper writes them: torch, float64, all pairs of tokens.

Every test of hybrid attention compares with this module, which shares no code with what it checks: the caller says
which keys get softmax weights and which get linear weights, and torch computes the gradients.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Attention(NamedTuple):
    """y, the softmax branch's share of the denominator and the stabiliser c; the last two have no channel axis."""

    y: Any
    softmax_share: Any
    c: Any


def feature_map(x, kernels, biases, log_scale, degree: int, activation: str) -> torch.Tensor:
    """Eq. 8 of x [..., H, N, D], with kernels [H, D_in, D_out], biases [H, D_out] and scales [H]."""
    for kernel, bias in zip(kernels, biases, strict=True):
        x = ACTIVATIONS[activation](x @ kernel + bias[:, None])
    powers = [psi**p for p, psi in enumerate(x.chunk(degree, -1), start=1)]
    return torch.cat(powers, -1) * log_scale.exp()[:, None, None]


def equation_5(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    phi_q: Callable[[torch.Tensor], torch.Tensor],
    phi_k: Callable[[torch.Tensor], torch.Tensor],
    in_S: torch.Tensor,
    in_L: torch.Tensor,
    *,
    key_valid: torch.Tensor | None = None,
    stabilizer: str = "max",
    c: torch.Tensor | None = None,
) -> Attention:
    """Attention of q [..., H, N, D] over k and v [..., H, M, D]; `c` [..., H, N] replaces the stabiliser.

    in_S and in_L, bool [1 or N, M], say whether a query gives a key a softmax weight or a linear weight. Keys where
    `key_valid` [..., M] is false get no weight. A query without softmax keys has 1e-6 added to its denominator.
    """
    key_valid = torch.ones(k.shape[-2], dtype=torch.bool) if key_valid is None else key_valid
    S, L = in_S.any(0), in_L.any(0)
    numerator, softmax_mass, linear_mass = torch.zeros_like(q), torch.zeros_like(q[..., 0]), torch.zeros_like(q[..., 0])
    stabilizers = softmax_mass
    if S.any():
        seen = in_S[:, S] & key_valid[..., None, None, S]
        scores = (q @ k[..., S, :].mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
        stabilizers = scores.amax(-1) if stabilizer == "max" else scores.logsumexp(-1)
        stabilizers = torch.where(stabilizers.isfinite(), stabilizers, 0.0) if c is None else c
        weights = (scores - stabilizers[..., None]).exp()
        softmax_mass, numerator = weights.sum(-1), weights @ v[..., S, :]
    if L.any():
        seen = in_L[:, L] & key_valid[..., None, None, L]
        weights = (phi_q(q) @ phi_k(k[..., L, :]).mT).masked_fill(~seen, 0.0)
        linear_mass, numerator = weights.sum(-1), numerator + weights @ v[..., L, :]
    denominator = softmax_mass + linear_mass + 1e-6 * ~in_S.any(-1)
    return Attention(numerator / denominator[..., None], softmax_mass / denominator, stabilizers)


def _features(phi, x: torch.Tensor) -> torch.Tensor:
    return feature_map(x, phi.kernels, phi.biases, phi.log_scale, phi.degree, phi.activation)


def features(phi, x: np.ndarray) -> np.ndarray:
    """Eq. 8 for one of the kernels' `PolynomialMap`s and x [..., N, H, D]."""
    phi, x = jax.tree.map(lambda leaf: torch.tensor(np.float64(leaf)), (phi, x))
    return _features(phi, x.transpose(-2, -3)).transpose(-2, -3).numpy()


def _of_arguments(arguments, num_softmax, key_valid=None, stabilizer="max", *, masks=None, c=None) -> Attention:
    """Eq. 5 for torch tensors (q, k, v, query_map, key_map) in the layout of the kernels: heads come after tokens."""
    q, k, v, *maps = arguments
    key = np.arange(k.shape[1])[None]
    in_S, in_L = map(torch.tensor, (key < num_softmax, key >= num_softmax) if masks is None else masks)
    phi_q, phi_k = (phi and functools.partial(_features, phi) for phi in maps)
    key_valid = None if key_valid is None else torch.tensor(key_valid)
    c = None if c is None else torch.tensor(c).transpose(1, 2)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    attention = equation_5(*heads_first, phi_q, phi_k, in_S, in_L, key_valid=key_valid, stabilizer=stabilizer, c=c)
    return Attention(*(x.transpose(1, 2) for x in attention))


def values(arguments, num_softmax: int | None = None, **options) -> Attention:
    """Eq. 5 for the arguments of the kernels' `hybrid_attention`, as NumPy arrays [B, N, H, ...].

    The first `num_softmax` keys get softmax weights and the others linear weights, unless `masks` gives in_S and in_L.
    """
    arguments = jax.tree.map(lambda leaf: torch.tensor(np.float64(leaf)), arguments)
    return Attention(*(x.numpy() for x in _of_arguments(arguments, num_softmax, **options)))


def values_and_gradients(arguments, cotangent, num_softmax: int | None = None, *rest, **options):
    """y, and the gradient of the sum of y * cotangent for every array of the arguments; options as for `values`."""
    leaves, tree = jax.tree.flatten(arguments)
    leaves = [torch.tensor(np.float64(leaf), requires_grad=True) for leaf in leaves]
    y = _of_arguments(jax.tree.unflatten(tree, leaves), num_softmax, *rest, **options).y
    gradients = torch.autograd.grad(y, leaves, torch.tensor(np.float64(cotangent)), materialize_grads=True)
    return y.detach().numpy(), jax.tree.unflatten(tree, [gradient.numpy() for gradient in gradients])
