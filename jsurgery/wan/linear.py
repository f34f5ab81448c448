"""The linear layers of the transformer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh


class Linear(nnx.Linear):
    """A linear layer that, on one device, flattens its batch axes and accumulates in float32.

    On CPU, flat axes make the backward pass twice as fast, and float32 sums make bfloat16 twice as fast. Over a mesh
    neither pays: a flat axis cannot be split by examples and by tokens, so that every example's tokens would be
    gathered, and float32 sums would be exchanged at twice the width of bfloat16.
    """

    def __init__(self, in_features: int, out_features: int, *, dtype: Any = None, rngs: nnx.Rngs):
        super().__init__(in_features, out_features, dtype=dtype, rngs=rngs)
        self.set_mesh(None)

    def set_mesh(self, mesh: Mesh | None) -> None:
        """Chooses the form for a mesh, or for one device where `mesh` is None."""
        self.flat = mesh is None
        self.preferred_element_type = jnp.float32 if self.flat else None

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        if not self.flat:
            return self.with_low_rank(super().__call__(x), x)
        rows = x.reshape(-1, x.shape[-1])
        y = self.with_low_rank(super().__call__(rows).astype(x.dtype), rows)
        return y.reshape(*x.shape[:-1], -1)

    def with_low_rank(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """The layer's output with its low-rank change, if it has one (see `low_rank`)."""
        change = getattr(self, "low_rank", None)
        return y if change is None else y + change(x, y.dtype)
