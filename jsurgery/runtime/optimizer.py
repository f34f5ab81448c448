"""One update of a model's parameters: gradients of a batch taken in pieces, clipping, AdamW, an average of weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from ml_collections import ConfigDict, FrozenConfigDict

from jsurgery.runtime.guard import keep_if_finite, non_finite

Loss = Callable[[Any, Any], jax.Array]  # of parameters and a batch, a mean over its examples


def learning_rate(settings: ConfigDict | FrozenConfigDict) -> optax.Schedule:
    """Up from zero over `warmup` steps, then constant, or down to zero along a cosine at the last of `steps`."""
    peak, warmup = settings.learning_rate, settings.warmup
    if settings.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(settings.steps, warmup + 1))
    return optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)


def adamw(settings: ConfigDict) -> optax.GradientTransformation:
    """AdamW with `learning_rate` and `weight_decay`, on gradients whose norm is cut to `clip_norm`.

    Equal settings give the same object, so that what was compiled with it is found again.
    """
    fields = ["learning_rate", "warmup", "schedule", "weight_decay", "clip_norm"]
    fields += ["steps"] if settings.schedule == "cosine" else []
    return _adamw(FrozenConfigDict({field: settings[field] for field in fields}))


@functools.lru_cache
def _adamw(settings: FrozenConfigDict) -> optax.GradientTransformation:
    optimizer = optax.adamw(learning_rate(settings), weight_decay=settings.weight_decay)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)


def value_and_gradients(loss: Loss, params: Any, batch: Any, pieces: int) -> tuple[jax.Array, Any]:
    """The mean loss of a batch (leaves [B, ...]) and its gradients, in `pieces` equal pieces one after the other.

    A piece takes every `pieces`-th example, so that a batch spread over devices stays where it is.
    """
    gradient = jax.value_and_grad(loss)
    if pieces == 1:
        return gradient(params, batch)
    split = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (jax.ShapeDtypeStruct((), jnp.float32), params))
    total, _ = lax.scan(lambda sums, piece: (jax.tree.map(jnp.add, sums, gradient(params, piece)), None), zeros, split)
    return jax.tree.map(lambda x: x / pieces, total)


def initial_train_state(params: Any, optimizer: optax.GradientTransformation, ema: float) -> dict[str, Any]:
    """What is trained and saved; with `ema` > 0 also the average of the parameters."""
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
    return state | ({"ema": jax.tree.map(jnp.copy, params)} if ema else {})


def train_step(
    state: dict[str, Any], loss: Loss, batch: Any, optimizer: optax.GradientTransformation, *, pieces: int, ema: float
) -> tuple[dict[str, Any], dict[str, jax.Array], Any]:
    """The state after one step, its `loss` and `gradient_norm`, and `faults`; to be jitted by the caller.

    Where one of the two is not finite the state stays as it is, and the faults tell in which gradients.
    """
    value, gradients = value_and_gradients(loss, state["params"], batch, pieces)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    new = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
    if ema:
        # A young average would remember the initialisation for long.
        decay = jnp.minimum(ema, (1 + state["step"]) / (10 + state["step"]))
        new["ema"] = jax.tree.map(lambda average, x: decay * average + (1 - decay) * x, state["ema"], params)
    clean = lambda gradients: jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, bool), jax.eval_shape(non_finite, gradients)
    )
    found = lax.cond(finite, clean, non_finite, gradients)
    return keep_if_finite(finite, new, state), {"loss": value, "gradient_norm": norm}, found


def trained_parameters(state: dict[str, Any]) -> Any:
    """The average where there is one."""
    return state.get("ema", state["params"])
