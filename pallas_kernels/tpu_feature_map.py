"""The polynomial feature map inside kernels on TPU, and its backward.

Tokens lie along lanes ("columns") where the next product sums over tokens, and along sublanes ("rows") where it sums
over features, so that no product has to transpose its operands.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.feature_map import ACTIVATIONS, PolynomialMap
from pallas_kernels.tpu_problem import LANES, Problem, lane_sums, whole

# Mosaic has no expm1, which jax.nn.elu needs.
KERNEL_ACTIVATIONS = ACTIVATIONS | {"elu1": lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))}
# The activations' derivatives as functions of their outputs, so that their inputs need not be kept.
SLOPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": lambda y: jnp.where(y > 0, 1.0, 0.0),
    "softplus": lambda y: 1.0 - jnp.exp(-y),
    "exp": lambda y: y,
    "sigmoid": lambda y: y * (1.0 - y),
    "elu1": lambda y: jnp.minimum(y, 1.0),
}


def map_flops(phi: PolynomialMap) -> int:
    """FLOPs of one head's map per token."""
    return sum(2 * kernel.shape[1] * kernel.shape[2] for kernel in phi.kernels)


def columns(phi: PolynomialMap, dtype: Any) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """phi's kernels [H, d_out, d_in] and biases [H, d_out, 1], for tokens along lanes."""
    arrays = [kernel.swapaxes(1, 2).astype(dtype) for kernel in phi.kernels] + [bias[..., None] for bias in phi.biases]
    return arrays, [whole(*array.shape[1:]) for array in arrays]


def rows(phi: PolynomialMap, dtype: Any) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """phi's kernels [H, d_in, d_out] and biases [H, 1, d_out], for tokens along sublanes."""
    arrays = [kernel.astype(dtype) for kernel in phi.kernels] + [bias[:, None] for bias in phi.biases]
    return arrays, [whole(*array.shape[1:]) for array in arrays]


def powers(psi: jax.Array, degree: int, axis: int) -> jax.Array:
    """[psi_1, psi_2^2, ..., psi_P^P] of the P = degree slices of psi along `axis`."""
    slices = jnp.split(psi, degree, axis)
    return jnp.concatenate([lax.integer_pow(x, p) for p, x in enumerate(slices, start=1)], axis)


def hidden_columns(problem: Problem, x_TxD: jax.Array, weights) -> list[jax.Array]:
    """The outputs [d_out, T] of all of phi's layers for tokens [T, D], in float32."""
    layers = len(weights) // 2
    after = []
    for layer, (kernel, bias) in enumerate(zip(weights[:layers], weights[layers:], strict=True)):
        h = problem.dot(kernel[...], after[-1]) if layer else problem.dot(kernel[...], x_TxD, (1, 1))
        after.append(KERNEL_ACTIVATIONS[problem.activation](h + bias[...]))
    return after


def features_rows(problem: Problem, x_TxD: jax.Array, weights) -> jax.Array:
    """phi [T, F] of tokens [T, D], without its scale."""
    layers = len(weights) // 2
    h = x_TxD
    for kernel, bias in zip(weights[:layers], weights[layers:], strict=True):
        h = KERNEL_ACTIVATIONS[problem.activation](problem.dot(h, kernel[...]) + bias[...])
    return powers(h, problem.degree, 1)


def map_operands(phi: PolynomialMap, dtype: Any) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """`columns`, followed by the kernels [H, d_in, d_out], which are the transposes of those in `columns`."""
    arrays, specs = columns(phi, dtype)
    transposed = [kernel.astype(dtype) for kernel in phi.kernels]
    return arrays + transposed, specs + [whole(*kernel.shape[1:]) for kernel in transposed]


def map_results(phi: PolynomialMap, problem: Problem) -> tuple[list[jax.ShapeDtypeStruct], list[pl.BlockSpec]]:
    """The gradients' shapes and specs: kernels [B, H, d_out, d_in], biases [B, H, d_out, 128], unsummed lanes."""
    shapes = [(kernel.shape[2], kernel.shape[1]) for kernel in phi.kernels]
    shapes += [(bias.shape[1], LANES) for bias in phi.biases]
    arrays = [jax.ShapeDtypeStruct((problem.batch, problem.heads, *shape), jnp.float32) for shape in shapes]
    return arrays, [whole(*shape, per_batch=True) for shape in shapes]


def map_gradient(phi: PolynomialMap, sums: list[jax.Array]) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The gradients of phi's kernels and of its biases, from the arrays that `map_results` describes."""
    layers = len(phi.kernels)
    kernels = tuple(kernel.sum(axis=0).swapaxes(1, 2) for kernel in sums[:layers])
    return kernels, tuple(bias.sum(axis=(0, 3)) for bias in sums[layers:])


def map_backward(problem: Problem, x_TxD, after, dphi_FxT, operands, sums, inputs: bool = True) -> jax.Array | None:
    """dx [T, D] of tokens [T, D], or None without `inputs`. Adds their gradients of the weights to `sums`, the
    references of `map_results`."""
    layers = len(after)
    slices = zip(jnp.split(after[-1], problem.degree), jnp.split(dphi_FxT, problem.degree), strict=True)
    d = jnp.concatenate([p * lax.integer_pow(psi, p - 1) * dphi for p, (psi, dphi) in enumerate(slices, start=1)])
    for layer in reversed(range(layers)):
        d *= SLOPES[problem.activation](after[layer])
        sums[layers + layer][...] += lane_sums(d)
        d = d.astype(problem.dtype)
        sums[layer][...] += problem.dot(d, after[layer - 1], (1, 1)) if layer else problem.dot(d, x_TxD)
        if layer or inputs:
            d = problem.dot(operands[2 * layers + layer][...], d)
    return d.astype(problem.dtype).T if inputs else None
