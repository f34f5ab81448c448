"""One update of a model's parameters: gradient accumulation, clipping, AdamW, a moving average of the weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from ml_collections import ConfigDict, FrozenConfigDict

from jsurgery.runtime.guard import keep_if_finite, non_finite

Loss = Callable[[Any, Any], jax.Array]  # (parameters, batch) -> the mean over the batch's examples


def learning_rate(settings: ConfigDict | FrozenConfigDict) -> optax.Schedule:
    """Rises from zero over `warmup` steps; then constant, or a cosine that reaches zero at the last of `steps`."""
    peak, warmup = settings.learning_rate, settings.warmup
    if settings.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(settings.steps, warmup + 1))
    return optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)


def adamw(settings: ConfigDict) -> optax.GradientTransformation:
    """AdamW with `learning_rate` and `weight_decay`, on gradients whose global norm is clipped to `clip_norm`.

    Equal settings give the same object, so that a jitted step that closes over it is not compiled again.
    """
    fields = ["learning_rate", "warmup", "schedule", "weight_decay", "clip_norm"]
    fields += ["steps"] if settings.schedule == "cosine" else []
    return _adamw(FrozenConfigDict({field: settings[field] for field in fields}))


@functools.lru_cache
def _adamw(settings: FrozenConfigDict) -> optax.GradientTransformation:
    optimizer = optax.adamw(learning_rate(settings), weight_decay=settings.weight_decay)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)


def value_and_gradients(loss: Loss, params: Any, batch: Any, pieces: int) -> tuple[jax.Array, Any]:
    """The mean loss of a batch (leaves [B, ...]) and its gradients, accumulated over `pieces` equal pieces.

    Each piece takes every `pieces`-th example, so that no example of a sharded batch moves to another device.
    """
    gradient = jax.value_and_grad(loss)
    if pieces == 1:
        return gradient(params, batch)
    split = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (jax.ShapeDtypeStruct((), jnp.float32), params))
    total, _ = lax.scan(lambda sums, piece: (jax.tree.map(jnp.add, sums, gradient(params, piece)), None), zeros, split)
    return jax.tree.map(lambda x: x / pieces, total)


def initial_train_state(params: Any, optimizer: optax.GradientTransformation, ema: float) -> dict[str, Any]:
    """The state that training updates and checkpoints hold; with `ema` > 0 also the average of the parameters."""
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
    return state | ({"ema": jax.tree.map(jnp.copy, params)} if ema else {})


def train_step(
    state: dict[str, Any], loss: Loss, batch: Any, optimizer: optax.GradientTransformation, *, pieces: int, ema: float
) -> tuple[dict[str, Any], dict[str, jax.Array], Any]:
    """(state after one step, its `loss` and `gradient_norm`, faults); to be jitted by the caller.

    If the loss or the norm is not finite, the state stays unchanged. The faults flag the gradients that are not finite
    (see `guard.non_finite`).
    """
    value, gradients = value_and_gradients(loss, state["params"], batch, pieces)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    new = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
    if ema:
        # A smaller decay in the first steps, so that the average soon forgets the initialisation.
        decay = jnp.minimum(ema, (1 + state["step"]) / (10 + state["step"]))
        new["ema"] = jax.tree.map(lambda average, x: decay * average + (1 - decay) * x, state["ema"], params)
    no_faults = lambda gradients: jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, bool), jax.eval_shape(non_finite, gradients)
    )
    faults = lax.cond(finite, no_faults, non_finite, gradients)
    return keep_if_finite(finite, new, state), {"loss": value, "gradient_norm": norm}, faults


def trained_parameters(state: dict[str, Any]) -> Any:
    """The moving average if the state has one, otherwise the parameters of the last step."""
    return state.get("ema", state["params"])
