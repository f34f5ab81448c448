"""One update of distillation: the initial maps, the optimiser and the step over a batch."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from jsurgery.attention.feature_maps import FeatureMapConfig, LearnedMaps, init_feature_maps, init_projections
from jsurgery.attention.kinds.candidates import learning, maps_of
from jsurgery.config import block_numbers
from jsurgery.rates import Rate
from jsurgery.runtime.guard import keep_if_finite
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, loss_gradients
from jsurgery.wan.transformer import WanTransformer


def initial_maps(config: ConfigDict, teacher: WanTransformer) -> LearnedMaps:
    """Fresh maps for every rate and every block of `config.distill.blocks`, the same whichever blocks are chosen."""
    hybrid, model = config.hybrid, teacher.config
    phi = FeatureMapConfig.of(config)
    mapped, projected = (len(learning(hybrid.rates, what)) for what in ("feature_maps", "projection"))
    count, chosen = model.num_layers * mapped, block_numbers(config.distill.blocks)

    def maps(key):
        if not mapped:
            return None
        stacked = init_feature_maps(key, count, model.num_attention_heads, model.attention_head_dim, phi)
        stacked = jax.tree.map(lambda leaf: leaf.reshape(model.num_layers, -1, *leaf.shape[1:]), stacked)
        return stacked if chosen is None else jax.tree.map(lambda leaf: leaf[np.array(chosen)], stacked)

    key_q, key_k = jax.random.split(jax.random.key(config.seed))
    projections = None
    if projected:
        blocks = model.num_layers if chosen is None else len(chosen)
        projections = init_projections(blocks, projected, model.attention_head_dim)
    return LearnedMaps(maps(key_q), maps(key_k), projections)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW. Equal settings give the same object, so that a program compiled for it is used again."""
    return _adamw(config.distill.learning_rate, config.distill.weight_decay)


@functools.lru_cache
def _adamw(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, weight_decay=weight_decay)


@functools.lru_cache(maxsize=8)
def make_update(optimizer: optax.GradientTransformation, graph: nnx.GraphDef, spec: DistillSpec) -> Any:
    """The step (state, teacher's parameters, batch) -> (state, losses [blocks, rates]), overwriting the state."""

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: dict[str, Any], teacher_params: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        _, losses, gradients = loss_gradients(nnx.merge(graph, teacher_params), batch, state["maps"], spec)
        return apply_gradients(optimizer, state, losses, gradients, spec.rates)

    return update


def apply_gradients(
    optimizer: optax.GradientTransformation,
    state: dict[str, Any],
    losses: jax.Array,
    gradients: LearnedMaps,
    rates: Sequence[Rate],
) -> tuple[dict[str, Any], jax.Array]:
    """(state, losses) after an update. The state is unchanged if any loss or gradient is not finite; the losses are NaN
    where the gradient is not finite."""
    of_block = lambda leaf: jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
    of_rate = [jax.tree.map(of_block, maps_of(gradients, rates, place, axis=1)) for place in range(len(rates))]
    finite_BxR = jnp.stack([functools.reduce(jnp.logical_and, jax.tree.leaves(tree)) for tree in of_rate], axis=1)
    losses = jnp.where(finite_BxR, losses, jnp.nan)
    updates, opt_state = optimizer.update(gradients, state["opt_state"], state["maps"])  # type: ignore[arg-type]
    new = {"maps": optax.apply_updates(state["maps"], updates), "opt_state": opt_state}
    return keep_if_finite(jnp.isfinite(losses).all(), new, state), losses
