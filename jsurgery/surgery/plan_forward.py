"""A forward pass whose plan is data: one compilation serves every plan of a model's blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jsurgery.attention.hybrid import token_order
from jsurgery.rates import Rate
from jsurgery.surgery.distillation.saved_maps import FeatureMapPair
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.wan.transformer import WanTransformer


def plan_forward(
    model: WanTransformer,
    batch: dict[str, jax.Array],
    maps: FeatureMapPair,
    choice_L: jax.Array,
    spec: DistillSpec,
    *,
    shares: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Velocity [B, T, H, W, C] and, with `shares`, the softmax branch's mean share of each block's denominator [L].

    `maps` have leaves [blocks, rates, heads, ...]; `choice_L` is 0 for softmax, i + 1 for `spec.rates[i]`.
    """
    grid = model.config.token_grid(batch["latents"].shape[1:4])
    order = token_order(grid, spec.chain, spec.lattice, model.shards)

    def at(rate: Rate):
        """Attention at a rate. The share is the attention to values that are 1 at softmax keys and 0 elsewhere."""

        def attention(q, k, v, maps_R):
            pair = None if rate == 1 else jax.tree.map(lambda leaf: leaf[spec.rates.index(rate)], maps_R)
            y = model.attend(q, k, v, pair, rate, order, spec.stabilizer)
            if not shares:
                return y, None
            softmax_key_N = jnp.arange(k.shape[1]) < order.num_softmax(rate)
            ones = jnp.broadcast_to(softmax_key_N[None, :, None, None], v.shape).astype(v.dtype)
            return y, model.attend(q, k, ones, pair, rate, order, spec.stabilizer)[..., 0].mean()

        return attention

    branches = [at(rate) for rate in (1, *spec.rates)]

    def planned(q, k, v, layer):
        choice, maps_R = layer
        return lax.switch(choice, branches, q, k, v, maps_R)

    inputs = batch["latents"], batch["timestep"], batch["text"]
    return model.apply_blocks(*inputs, planned, (choice_L, maps), order=order)


@functools.partial(jax.jit, static_argnames="spec")
def softmax_shares(model: WanTransformer, batch: dict[str, jax.Array], maps: FeatureMapPair, spec: DistillSpec) -> Any:
    """The mean share of the softmax branch in each block [L], with all blocks at the only rate of `spec`."""
    return plan_forward(model, batch, maps, jnp.ones(model.config.num_layers, int), spec, shares=True)[1]


@functools.partial(jax.jit, static_argnames="spec")
def velocity_errors(
    model: WanTransformer, batch: dict[str, jax.Array], maps: FeatureMapPair, plans_PxL: jax.Array, spec: DistillSpec
) -> dict[str, Any]:
    """Relative errors of the velocity of P plans against the softmax model: "l1" and "squared", each [P].

    "squared" is the mean over the batch of relative squared errors. Squared errors of blocks add up if the blocks'
    errors are uncorrelated.
    """
    teacher = plan_forward(model, batch, maps, jnp.zeros(model.config.num_layers, int), spec)[0]

    def errors(choice_L):
        difference = plan_forward(model, batch, maps, choice_L, spec)[0] - teacher
        of_each = tuple(range(1, teacher.ndim))
        squared_B = (difference**2).sum(of_each) / (teacher**2).sum(of_each)
        return jnp.abs(difference).sum() / jnp.abs(teacher).sum(), squared_B.mean()

    l1_P, squared_P = lax.map(errors, plans_PxL)
    return {"l1": l1_P, "squared": squared_P}
