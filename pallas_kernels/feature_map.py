"""Feature maps phi of linear attention, as pytrees. An attention kernel calls a map, or computes it from its weights.

A map takes heads [B, N, H, D] and returns non-negative features [B, N, H, F]. Its leaves are float32. Callers may stack
maps over blocks or rates and `jax.vmap` over the stack.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

# All are non-negative, so that odd powers, and with them the features and the attention weights, are non-negative too.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "exp": jnp.exp,
    "sigmoid": jax.nn.sigmoid,
    "elu1": lambda x: jax.nn.elu(x) + 1.0,
}


class FeatureMap(Protocol):
    """What attention needs of phi: a function of heads [B, N, H, D] to non-negative features [B, N, H, F].

    It is a pytree whose leaves have the head as first axis, so that kernels can process one head at a time.
    """

    def __call__(self, x: jax.Array, /) -> jax.Array: ...


def by_head(x_BxNxHxD: jax.Array, kernel_HxDxF: jax.Array) -> jax.Array:
    """Each head times its kernel, [B, N, H, F]."""
    if len(kernel_HxDxF) == 1:  # of a product over no head, XLA for CPUs makes no transposed copies
        y_TxF = x_BxNxHxD.reshape(-1, x_BxNxHxD.shape[-1]) @ kernel_HxDxF[0]
        return y_TxF.reshape(*x_BxNxHxD.shape[:-1], y_TxF.shape[-1])
    return jnp.einsum("bnhd,hdf->bnhf", x_BxNxHxD, kernel_HxDxF)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PolynomialMap:
    """phi(x) = exp(log_scale) [psi_1(x)^1, ..., psi_P(x)^P]: Attention Surgery, eq. 8, with a calibration per head.

    The psi_p are the P equal slices of one network per head, D -> P*D -> ... -> P*D, with the activation after every
    layer, the last included.

    Attributes:
        kernels: per layer [H, d_in, d_out].
        biases: per layer [H, d_out].
        log_scale: [H]. It sets the mass of the linear branch. Calibration sets that of the key's map alone.
        degree: P.
        activation: a key of `ACTIVATIONS`.
    """

    kernels: tuple[jax.Array, ...]
    biases: tuple[jax.Array, ...]
    log_scale: jax.Array
    degree: int = dataclasses.field(metadata={"static": True})
    activation: str = dataclasses.field(metadata={"static": True})

    def __call__(self, x_BxNxHxD: jax.Array) -> jax.Array:
        """Features [B, N, H, P*D] of heads [B, N, H, D]."""
        activation = ACTIVATIONS[self.activation]
        h_BxNxHxF = x_BxNxHxD
        for kernel_HxDxF, bias_HxF in zip(self.kernels, self.biases, strict=True):
            h_BxNxHxF = by_head(h_BxNxHxF, kernel_HxDxF.astype(x_BxNxHxD.dtype))
            h_BxNxHxF = activation(h_BxNxHxF + bias_HxF.astype(x_BxNxHxD.dtype)[None, None])
        # Powers by masks, not by slices: XLA then makes one loop of bias, activation, powers and scale.
        power_1x1x1xF = (jnp.arange(h_BxNxHxF.shape[-1]) // x_BxNxHxD.shape[-1])[None, None, None] + 1
        features_BxNxHxF = h_BxNxHxF
        for power in range(2, self.degree + 1):
            features_BxNxHxF = features_BxNxHxF * jnp.where(power_1x1x1xF >= power, h_BxNxHxF, 1)
        return features_BxNxHxF * jnp.exp(self.log_scale).astype(x_BxNxHxD.dtype)[None, None, :, None]


def init_polynomial_map(
    key: jax.Array, heads: int, width: int, degree: int = 2, layers: int = 2, activation: str = "relu"
) -> PolynomialMap:
    """A PolynomialMap for `heads` heads of `width` channels: LeCun-normal kernels, zero biases, zero log_scale.

    Raises:
        ValueError: fewer than one head, channel, degree or layer, or an unknown activation.
    """
    for name, value in (("heads", heads), ("width", width), ("degree", degree), ("layers", layers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, found {activation!r}")
    widths = [width] + [degree * width] * layers
    initializer = jax.nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
    kernels = tuple(
        initializer(layer_key, (heads, d_in, d_out), jnp.float32)
        for layer_key, d_in, d_out in zip(jax.random.split(key, layers), widths[:-1], widths[1:], strict=True)
    )
    biases = tuple(jnp.zeros((heads, d_out), jnp.float32) for d_out in widths[1:])
    return PolynomialMap(kernels, biases, jnp.zeros((heads,), jnp.float32), degree, activation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HedgehogMap:
    """phi(x) = exp(log_scale) softmax([W x, -W x]): HedgeHog (arXiv 2402.04347), 2D features.

    Attributes:
        kernel: [H, D, D].
        log_scale: [H].
    """

    kernel: jax.Array
    log_scale: jax.Array
    activation = "hedgehog"  # activation, degree, kernels and biases correspond to those of a PolynomialMap
    degree = 1

    @property
    def kernels(self) -> tuple[jax.Array, ...]:
        return (self.kernel,)

    @property
    def biases(self) -> tuple[jax.Array, ...]:
        return ()

    def __call__(self, x_BxNxHxD: jax.Array) -> jax.Array:
        """Features [B, N, H, 2*D] of heads [B, N, H, D]."""
        h_BxNxHxD = by_head(x_BxNxHxD, self.kernel.astype(x_BxNxHxD.dtype))
        features_BxNxHxF = jax.nn.softmax(jnp.concatenate([h_BxNxHxD, -h_BxNxHxD], axis=-1), axis=-1)
        return features_BxNxHxF * jnp.exp(self.log_scale).astype(x_BxNxHxD.dtype)[None, None, :, None]


def init_hedgehog_map(heads: int, width: int) -> HedgehogMap:
    """A HedgehogMap that starts, as in the paper, from the identity."""
    return HedgehogMap(jnp.tile(jnp.eye(width), (heads, 1, 1)), jnp.zeros((heads,), jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxMap:
    """phi(x) = softmax of x over its channels, in float32: SLA's, with nothing to train."""

    def __call__(self, x_BxNxHxD: jax.Array) -> jax.Array:
        """Features [B, N, H, D] of heads [B, N, H, D]."""
        return jax.nn.softmax(x_BxNxHxD.astype(jnp.float32), axis=-1).astype(x_BxNxHxD.dtype)
