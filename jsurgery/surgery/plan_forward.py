"""A forward pass whose plan is data: one compilation serves every plan of a model's blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jsurgery.attention.feature_maps import LearnedMaps
from jsurgery.attention.hybrid import token_order
from jsurgery.attention.kinds.candidates import maps_of
from jsurgery.rates import Rate
from jsurgery.runtime.mesh import to_host
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.wan.transformer import WanTransformer


def plan_forward(
    model: WanTransformer,
    batch: dict[str, jax.Array],
    maps: LearnedMaps,
    choice_L: jax.Array,
    spec: DistillSpec,
    *,
    shares: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Velocity [B, T, H, W, C] and, with `shares`, the softmax branch's mean share of each block's denominator [L].

    `maps` have leaves [blocks, rates, ...]; `choice_L` is 0 for softmax, i + 1 for `spec.rates[i]`.
    """
    grid = model.config.token_grid(batch["latents"].shape[1:4])
    order = token_order(grid, spec.chain, spec.lattice, model.shards)

    def at(rate: Rate):
        """Attention at a rate. The share is the attention to values that are 1 at softmax keys and 0 elsewhere."""

        def attention(q, k, v, maps_R):
            own = None if rate == 1 else maps_of(maps_R, spec.rates, spec.rates.index(rate))
            y = model.attend(q, k, v, own, rate, grid, order, spec.stabilizer)
            if not shares:
                return y, None
            softmax_key_N = jnp.arange(k.shape[1]) < order.num_softmax(rate)
            ones = jnp.broadcast_to(softmax_key_N[None, :, None, None], v.shape).astype(v.dtype)
            return y, model.attend(q, k, ones, own, rate, grid, order, spec.stabilizer)[..., 0].mean()

        return attention

    branches = [at(rate) for rate in (1, *spec.rates)]

    def planned(q, k, v, layer):
        choice, maps_R = layer
        return lax.switch(choice, branches, q, k, v, maps_R)

    inputs = batch["latents"], batch["timestep"], batch["text"]
    return model.apply_blocks(*inputs, planned, (choice_L, maps), order=order)


@functools.partial(jax.jit, static_argnames="spec")
def softmax_shares(model: WanTransformer, batch: dict[str, jax.Array], maps: LearnedMaps, spec: DistillSpec) -> Any:
    """The mean share of the softmax branch in each block [L], with all blocks at the only rate of `spec`."""
    return plan_forward(model, batch, maps, jnp.ones(model.config.num_layers, int), spec, shares=True)[1]


@functools.partial(jax.jit, static_argnames="spec")
def plan_velocity(
    model: WanTransformer, batch: dict[str, jax.Array], maps: LearnedMaps, choice_L: ArrayLike, spec: DistillSpec
) -> jax.Array:
    """The velocity [B, T, H, W, C] of a plan; all zeros in `choice_L`: the softmax model's."""
    return plan_forward(model, batch, maps, jnp.asarray(choice_L), spec)[0]


def velocity_errors(
    model: WanTransformer,
    batch: dict[str, jax.Array],
    maps: LearnedMaps,
    plans_PxL: np.ndarray,
    spec: DistillSpec,
    teacher: jax.Array,
) -> dict[str, np.ndarray]:
    """Relative errors of the velocity of P plans against `teacher`, the softmax model's: "l1" and "squared", each [P].

    "squared" is the mean over the batch of relative squared errors. Squared errors of blocks add up if the blocks'
    errors are uncorrelated.
    """
    errors = [relative_errors(plan_velocity(model, batch, maps, choice_L, spec), teacher) for choice_L in plans_PxL]
    return jax.tree.map(lambda *of_plans: np.stack(of_plans), *to_host(errors))


@jax.jit
def relative_errors(velocity: jax.Array, teacher: jax.Array) -> dict[str, jax.Array]:
    """The errors of one velocity; see `velocity_errors`."""
    difference, of_each = velocity - teacher, tuple(range(1, teacher.ndim))
    squared_B = (difference**2).sum(of_each) / (teacher**2).sum(of_each)
    return {"l1": jnp.abs(difference).sum() / jnp.abs(teacher).sum(), "squared": squared_B.mean()}
