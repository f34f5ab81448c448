"""Tokens of one device while blocks are distilled: sums over all devices, and the other orders of the tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsurgery.attention.token_order import TokenOrder
from pallas_kernels.sharded import own_heads, tokens_for_heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxBranch:
    """Softmax over a set of keys: output [B, N, H, D], log-sum-exp and largest score [B, N, H], float32."""

    output: jax.Array
    lse: jax.Array
    largest: jax.Array


@dataclasses.dataclass(frozen=True)
class TokenShards:
    """How tokens in the order `order` are sharded: along the mesh axis `axis`, or not at all if it is None.

    q, k and v are the tokens of one device. Sums over them are partial, and `total` adds up the partial sums of all
    devices. The batch is divided into `batch_pieces`.
    """

    order: TokenOrder
    axis: str | None = None
    batch_pieces: int = 1

    @property
    def pieces(self) -> int:
        """The number of devices that the tokens are on."""
        return 1 if self.axis is None else self.order.shards

    @property
    def valid(self) -> jax.Array | None:
        """bool [N], False at the padding of this device's tokens."""
        if self.axis is None or self.order.valid is None:
            return None
        return jnp.asarray(self.order.valid).reshape(self.order.shards, -1)[jax.lax.axis_index(self.axis)]

    def own(self, x_PxF: np.ndarray) -> jax.Array:
        """This device's tokens [N, F] of an array over all tokens."""
        if self.axis is None:
            return jnp.asarray(x_PxF)
        return jnp.asarray(x_PxF).reshape(self.order.shards, -1, x_PxF.shape[-1])[jax.lax.axis_index(self.axis)]

    def valid_rows(self, batch: int) -> jax.Array | None:
        """`valid`, for every example: [B, N]."""
        return None if self.valid is None else jnp.broadcast_to(self.valid, (batch, len(self.valid)))

    def masked(self, x_BxNx: jax.Array) -> jax.Array:
        """x [B, N, ...] with zeros at padding."""
        valid = self.valid
        return x_BxNx if valid is None else jnp.where(valid.reshape(1, -1, *[1] * (x_BxNx.ndim - 2)), x_BxNx, 0)

    def total(self, x: Any) -> Any:
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def gathered(self, x_BxNx: jax.Array, sizes: Sequence[int]) -> jax.Array:
        """The tokens of all devices, zone by zone. On every device, zone z is the tokens sizes[z - 1] to sizes[z]."""
        if self.axis is None:
            return x_BxNx
        zones = [x_BxNx[:, start:stop] for start, stop in zip((0, *sizes), sizes, strict=False) if start < stop]
        return jnp.concatenate([jax.lax.all_gather(zone, self.axis, axis=1, tiled=True) for zone in zones], axis=1)

    def gathered_valid(self, sizes: Sequence[int]) -> np.ndarray | None:
        """bool [M], False at the padding of `gathered`."""
        if self.axis is None or self.order.valid is None:
            return None
        valid = self.order.valid.reshape(self.order.shards, -1)
        return np.concatenate(
            [valid[:, start:stop].reshape(-1) for start, stop in zip((0, *sizes), sizes, strict=False)]
        )

    def mean(self, x_BxNxH: jax.Array) -> jax.Array:
        """[H]: this device's contribution to the mean over the batch and all tokens."""
        return self.masked(x_BxNxH).sum(axis=(0, 1)) / (x_BxNxH.shape[0] * self.batch_pieces * self.order.num_tokens)

    def raster(self, x_BxNxHx: jax.Array) -> jax.Array:
        """All tokens [B, N, H / devices, ...] in raster order, without padding; each device gets some of its heads."""
        if self.axis is not None:
            x_BxNxHx = tokens_for_heads(x_BxNxHx, self.axis)
        return x_BxNxHx[:, self.order.inverse]

    def own_heads(self, tree: Any) -> Any:
        """The heads, on the first axis of every leaf, that `raster` gives this device."""
        return tree if self.axis is None else own_heads(tree, self.axis)

    def all_heads(self, x_Hx: jax.Array) -> jax.Array:
        """The inverse of `own_heads`, with zeros in the heads of other devices: `total` adds them up."""
        if self.axis is None:
            return x_Hx
        whole = jnp.zeros((x_Hx.shape[0] * self.pieces, *x_Hx.shape[1:]), x_Hx.dtype)
        start = jax.lax.axis_index(self.axis) * x_Hx.shape[0]
        return jax.lax.dynamic_update_slice_in_dim(whole, x_Hx, start, axis=0)
