"""One update of distillation: the initial maps, the optimiser and the step over a batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from jsurgery.attention.feature_maps import FeatureMapConfig, FeatureMapPair, init_feature_maps
from jsurgery.config import block_numbers
from jsurgery.runtime.guard import keep_if_finite
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, loss_gradients
from jsurgery.wan.transformer import WanTransformer


def initial_maps(config: ConfigDict, teacher: WanTransformer) -> FeatureMapPair:
    """Fresh maps for every rate and every block of `config.distill.blocks`, the same whichever blocks are chosen."""
    hybrid, model = config.hybrid, teacher.config
    phi = FeatureMapConfig.of(config)
    count, chosen = model.num_layers * len(hybrid.rates), block_numbers(config.distill.blocks)

    def maps(key):
        stacked = init_feature_maps(key, count, model.num_attention_heads, model.attention_head_dim, phi)
        stacked = jax.tree.map(lambda leaf: leaf.reshape(model.num_layers, -1, *leaf.shape[1:]), stacked)
        return stacked if chosen is None else jax.tree.map(lambda leaf: leaf[np.array(chosen)], stacked)

    key_q, key_k = jax.random.split(jax.random.key(config.seed))
    return maps(key_q), maps(key_k)


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
        return apply_gradients(optimizer, state, losses, gradients)

    return update


def apply_gradients(
    optimizer: optax.GradientTransformation, state: dict[str, Any], losses: jax.Array, gradients: Any
) -> tuple[dict[str, Any], jax.Array]:
    """(state, losses) after an update. The state is unchanged if any loss or gradient is not finite; the losses are NaN
    where the gradient is not finite."""
    finite = [jnp.isfinite(leaf).all(axis=tuple(range(2, leaf.ndim))) for leaf in jax.tree.leaves(gradients)]
    losses = jnp.where(functools.reduce(jnp.logical_and, finite), losses, jnp.nan)
    updates, opt_state = optimizer.update(gradients, state["opt_state"], state["maps"])
    new = {"maps": optax.apply_updates(state["maps"], updates), "opt_state": opt_state}
    return keep_if_finite(jnp.isfinite(losses).all(), new, state), losses
