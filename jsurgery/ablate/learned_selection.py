"""Which blocks keep softmax, learned by gradients as in LinVideo (arXiv 2510.08318): the planner's rival.

Every block has a share r: its output is r times softmax plus 1 - r times one other kind. To the error come two
penalties: the square of (sum of round(r) - target), with a straight-through gradient, and the sum of 1 - |2 r - 1|^a,
which drives shares to 0 or 1 as a falls. Nothing else is trained.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jsurgery.attention.hybrid import token_order
from jsurgery.rates import Rate
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.surgery.plan_forward import relative_errors
from jsurgery.wan.transformer import WanTransformer

STEPS, BATCH = 100, 2  # updates of the shares, and examples in each
LEARNING_RATE = 0.03  # of Adam
PENALTY_WEIGHT = 0.01  # LinVideo's
FIRST_POWER, LAST_POWER = 20.0, 2.0  # a, which falls linearly
# The error is scaled so that converting all blocks has this much: an error far larger than the penalties would leave
# all shares at 1, a far smaller one would leave the choice to chance.
WHOLE_ERROR = 0.1

Error = Callable[[jax.Array, Any], jax.Array]  # (shares [blocks], batch) -> the error; hashable


def learn_selection(error: Error, batches: Iterable[Any], steps: int, blocks: int, keep: int) -> dict[str, Any]:
    """Learns the shares of `blocks` blocks of which `keep` are to stay softmax, in as many updates as batches: `steps`.

    Returns `shares`, `converted` (the numbers of the blocks with the smallest shares, exactly blocks - keep of them)
    and `rounded`, how many shares round to 1: `keep`, where the penalty has reached its target.
    """
    batches, shares_L = iter(batches), jnp.full(blocks, 0.5)
    first = next(batches)
    scale = WHOLE_ERROR / jnp.maximum(whole_error(error, jnp.zeros(blocks), first), 1e-12)
    opt_state = optax.adam(LEARNING_RATE).init(shares_L)
    for batch, power in zip(
        itertools.chain([first], batches), np.linspace(FIRST_POWER, LAST_POWER, steps), strict=True
    ):
        shares_L, opt_state = update_shares(error, shares_L, opt_state, batch, scale, keep, power)
    shares = np.asarray(shares_L, np.float64)
    converted = np.sort(np.argsort(shares, kind="stable")[: blocks - keep])
    return {
        "shares": shares.tolist(),
        "converted": converted.tolist(),
        "rounded": int((shares >= 0.5).sum()),
    }


@functools.partial(jax.jit, static_argnames="error")
def update_shares(
    error: Error, shares_L: jax.Array, opt_state: Any, batch: Any, scale: Any, keep: Any, power: Any
) -> Any:
    """(shares, state) after one step of Adam; shares stay between 0 and 1."""

    def loss(shares_L: jax.Array) -> jax.Array:
        return scale * error(shares_L, batch) + PENALTY_WEIGHT * penalties(shares_L, keep, power)

    updates, opt_state = optax.adam(LEARNING_RATE).update(jax.grad(loss)(shares_L), opt_state)
    shares_L = jnp.asarray(optax.apply_updates(shares_L, updates))
    return jnp.clip(shares_L, 0.0, 1.0), opt_state


@functools.partial(jax.jit, static_argnames="error")
def whole_error(error: Error, shares_L: jax.Array, batch: Any) -> jax.Array:
    return error(shares_L, batch)


def penalties(shares_L: jax.Array, keep: Any, power: Any) -> jax.Array:
    """LinVideo's two penalties. The gradient of rounding is taken as 1."""
    rounded_L = shares_L + jax.lax.stop_gradient((shares_L >= 0.5).astype(shares_L.dtype) - shares_L)
    # The square root of a square, away from 0, has a gradient at r = 1/2.
    distance_L = jnp.sqrt((2 * shares_L - 1) ** 2 + 1e-12)
    return (rounded_L.sum() - keep) ** 2 + (1 - distance_L**power).sum()


@dataclasses.dataclass(frozen=True)
class BlendedError:
    """The squared relative error of the velocity of a model whose blocks blend softmax and `kind`.

    A batch is (the teacher, the maps of `kind` for every block, the transformer's inputs, the teacher's velocity).
    """

    kind: Rate
    spec: DistillSpec

    def __call__(self, shares_L: jax.Array, batch: tuple[WanTransformer, Any, dict, jax.Array]) -> jax.Array:
        model, maps, inputs, teacher = batch
        return relative_errors(blended_velocity(model, inputs, maps, shares_L, self.kind, self.spec), teacher)[
            "squared"
        ]


def blended_velocity(
    model: WanTransformer, batch: dict[str, jax.Array], maps: Any, shares_L: jax.Array, kind: Rate, spec: DistillSpec
) -> jax.Array:
    """The velocity [B, T, H, W, C] with `shares_L` of softmax in every block. `maps` have leaves [blocks, ...]."""
    grid = model.config.token_grid(batch["latents"].shape[1:4])
    order = token_order(grid, spec.chain, spec.lattice, model.shards)

    def blended(q, k, v, layer):
        share, pair = layer
        attend = functools.partial(model.attend, q, k, v, grid=grid, order=order, stabilizer=spec.stabilizer)
        softmax, other = attend(maps=None, rate=1), attend(maps=pair, rate=kind)
        return (share * softmax + (1 - share) * other).astype(v.dtype), None

    return model.apply_blocks(
        batch["latents"], batch["timestep"], batch["text"], blended, (shares_L, maps), order=order
    )[0]
