"""The tokens of frames that are given to a video model, as in image to video."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class GivenTokens(NamedTuple):
    """The tokens of given frames, which hold no noise and have timestep 0 whatever the timestep of the others.

    A token has one of two timesteps, so that shifts, scales and gates are two rows and a mask. As arrays [N, 6, D] they
    would take more memory than the tokens themselves.

    Attributes:
      mask: bool [1, N, 1], true at given tokens.
      time: the embedding [1, D] of timestep 0.
      modulation: [1, 6, D], of timestep 0.
    """

    mask: jax.Array
    time: jax.Array
    modulation: jax.Array

    def choose(self, given_1x1xD: jax.Array, others_Bx1xD: jax.Array) -> jax.Array:
        """[B, N, D], computed where it is used: each token's row."""
        return jnp.where(self.mask, given_1x1xD, others_Bx1xD)
