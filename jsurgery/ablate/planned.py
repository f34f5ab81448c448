"""A forward pass whose plan is data: one compilation serves every plan of a model's blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jsurgery.attention.hybrid import attend, token_order
from jsurgery.surgery.distilled import Maps
from jsurgery.surgery.visits import Setup
from jsurgery.wan.transformer import WanTransformer


def forward(
    model: WanTransformer,
    batch: dict[str, jax.Array],
    maps: Maps,
    choice_L: jax.Array,
    setup: Setup,
    *,
    shares: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Velocity [B, T, H, W, C] and, with `shares`, the softmax branch's mean share of each block's denominator [L].

    `maps` have leaves [blocks, rates, heads, ...]; `choice_L` is 0 for softmax, i + 1 for `setup.rates[i]`.
    """
    order = token_order(model.config.token_grid(batch["latents"].shape[1:4]), setup.chain, setup.lattice)

    def at(index: int):
        """Attention at a rate, or for -1 softmax; the share is attention to values of 1 at the softmax keys alone."""
        kept = order.num_tokens if index < 0 else order.num_softmax(setup.rates[index])
        options = {"num_softmax": kept, "stabilizer": setup.stabilizer}

        def attention(q, k, v, maps_R):
            pair = (None, None) if index < 0 else jax.tree.map(lambda leaf: leaf[index], maps_R)
            y = attend(q, k, v, *pair, **options)
            if not shares:
                return y, None
            softmax_key_N = jnp.arange(k.shape[1]) < kept
            ones = jnp.broadcast_to(softmax_key_N[None, :, None, None], v.shape).astype(v.dtype)
            return y, attend(q, k, ones, *pair, **options)[..., 0].mean()

        return attention

    branches = [at(index) for index in range(-1, len(setup.rates))]

    def planned(q, k, v, layer):
        choice, maps_R = layer
        return lax.switch(choice, branches, q, k, v, maps_R)

    inputs = batch["latents"], batch["timestep"], batch["text"]
    return model.apply_blocks(*inputs, planned, (choice_L, maps), order=order)


@functools.partial(nnx.jit, static_argnames="setup")
def softmax_shares(model: WanTransformer, batch: dict[str, jax.Array], maps: Maps, setup: Setup) -> Any:
    """[L], of a model whose blocks are all at the one rate of `setup`."""
    return forward(model, batch, maps, jnp.ones(model.config.num_layers, int), setup, shares=True)[1]


@functools.partial(nnx.jit, static_argnames="setup")
def velocity_errors(
    model: WanTransformer, batch: dict[str, jax.Array], maps: Maps, plans_PxL: jax.Array, setup: Setup
) -> dict[str, Any]:
    """Of every plan against the softmax model, relative errors of the velocity: "l1" and "squared", each [P].

    "squared" is the relative squared error, which adds up over blocks as far as their errors are uncorrelated.
    """
    teacher = forward(model, batch, maps, jnp.zeros(model.config.num_layers, int), setup)[0]

    def errors(choice_L):
        difference = forward(model, batch, maps, choice_L, setup)[0] - teacher
        return jnp.abs(difference).sum() / jnp.abs(teacher).sum(), (difference**2).sum() / (teacher**2).sum()

    l1_P, squared_P = lax.map(errors, plans_PxL)
    return {"l1": l1_P, "squared": squared_P}
