"""finetune: trains the hybrid model by flow matching on data, the teacher's velocity, or a mix.

It trains all parameters, or with a `lora_rank` low-rank changes of the blocks' linear layers and the feature maps.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from jsurgery.data.latents import batches, captions_to_embed, padded_text
from jsurgery.diffusion import add_noise_at_random_levels, schedule
from jsurgery.runtime.finite import check_finite
from jsurgery.runtime.garbage import free_dropped_models
from jsurgery.runtime.guard import likely_causes, rows_with_faults
from jsurgery.runtime.loop import run_steps
from jsurgery.runtime.mesh import global_batch, local_rows, make_mesh, put_state
from jsurgery.runtime.optimizer import adamw, initial_train_state, train_step, trained_parameters
from jsurgery.wan.low_rank import add_low_rank, trained_with_low_rank
from jsurgery.wan.pipeline import Pipeline
from jsurgery.wan.transformer import WanTransformer

VALIDATION_BATCH = 8


def noised_batch(
    batch: dict[str, jax.Array], key: jax.Array, shift: float, timesteps: tuple[float, ...] = ()
) -> dict[str, jax.Array]:
    """Noisy latents with their timesteps and text, and the flow-matching velocity that a model should predict.

    Noise levels are random, or a random one of `timesteps`, where a few-step model knows no others.
    """
    latents, timesteps_B, velocity = add_noise_at_random_levels(batch["latents"], key, shift, timesteps)
    return {"latents": latents, "timesteps": timesteps_B, "text": batch["text"], "velocity": velocity}


def velocity_loss(
    student: WanTransformer, teacher: WanTransformer | None, batch: dict[str, jax.Array], teacher_weight: float
) -> jax.Array:
    """(1 - w) times the mean squared error to the flow-matching velocity, plus w times that to the teacher's.

    With a weight of 0 no teacher is needed.
    """
    inputs = batch["latents"], batch["timesteps"], batch["text"]
    predicted = student(*inputs)
    loss = (1 - teacher_weight) * jnp.mean((predicted - batch["velocity"]) ** 2)
    if teacher is not None and teacher_weight > 0:
        teacher_velocity = jax.lax.stop_gradient(teacher(*inputs))
        loss += teacher_weight * jnp.mean((predicted - teacher_velocity) ** 2)
    return loss


def make_update(
    config: ConfigDict, optimizer: optax.GradientTransformation, graph: nnx.GraphDef, teacher_graph: nnx.GraphDef
) -> Any:
    """The jitted step (state, teacher's parameters, batch, key, frozen) -> (state, metrics, faults).

    It overwrites the state. `frozen` are the student's parameters that are not trained, None if all are.

    Equal settings give the same function, so that a second run in this process compiles nothing.
    """
    settings = config.finetune
    noise = config.sampler.shift, own_timesteps(config)
    fixed = settings.teacher_weight, settings.accumulate, settings.ema, *noise
    return _make_update(optimizer, graph, teacher_graph, *fixed)


def own_timesteps(config: ConfigDict) -> tuple[float, ...]:
    """The timesteps that a few-step model knows; none for other models, which know all."""
    sampler = config.sampler
    if sampler.solver != "lcm":
        return tuple(sampler.timesteps)
    return tuple(schedule("lcm", sampler.steps, sampler.shift, sampler.timesteps).timestep.tolist())


@functools.lru_cache(maxsize=8)
def _make_update(
    optimizer: optax.GradientTransformation,
    graph: nnx.GraphDef,
    teacher_graph: nnx.GraphDef,
    teacher_weight: float,
    accumulate: int,
    ema: float,
    shift: float,
    timesteps: tuple[float, ...],
) -> Any:
    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, teacher_params, batch, key, frozen=None):
        def loss(params, piece):
            teacher = nnx.merge(teacher_graph, teacher_params) if teacher_weight > 0 else None
            student = nnx.merge(graph, params, *([] if frozen is None else [frozen]))
            return velocity_loss(student, teacher, piece, teacher_weight)

        noisy = noised_batch(batch, key, shift, timesteps)
        return train_step(state, loss, noisy, optimizer, pieces=accumulate, ema=ema)

    return update


def finetune(
    config: ConfigDict,
    student: WanTransformer,
    teacher: Pipeline,
    latents: epath.Path,
    folder: epath.Path,
    *,
    overwrite: bool = False,
    profile: epath.Path | None = None,
) -> WanTransformer:
    """Trains `student` on the shards in `latents`, from the newest checkpoint in `folder` on if there is one.

    With `overwrite` the student is lost, which saves 4 bytes for each of its parameters; otherwise it stays as it was.
    Checkpoints and metrics go to `folder`. `profile` gets the trace of `config.profile` steps. With a `lora_rank` the
    result has low-rank changes beside its weights, which `save_model` adds up. Raises ValueError unless the trained
    parameters are float32: updates are too small for 16 bits.
    """
    settings = config.finetune
    mesh = make_mesh(config.mesh)
    if settings.lora_rank:
        add_low_rank(student, settings.lora_rank, config.seed)
    student.shard(mesh, config.mesh.exchange)
    graph, params, frozen = split_trained(student, settings.lora_rank)
    if types := {str(leaf.dtype) for leaf in jax.tree.leaves(params)} - {"float32"}:
        raise ValueError(f"student: expected trained parameters in float32, found {', '.join(types)}")
    teacher_graph, teacher_params = graph, None
    if settings.teacher_weight > 0:
        teacher.transformer.shard(mesh, config.mesh.exchange)
        teacher_graph, teacher_params = nnx.split(teacher.transformer)
    optimizer = adamw(settings)
    update = make_update(config, optimizer, graph, teacher_graph)
    rows = local_rows(mesh, settings.batch)
    data = batches(latents, settings.batch, config.seed, rows)
    teacher.embedder.unpadded(["", *captions_to_embed(latents)], config.text_length)
    negative_text = np.asarray(teacher.embed([""], config.text_length))[0]

    def embedded(step: int) -> dict[str, jax.Array]:
        element = data[step]
        if "text" in element:
            text = padded_text(element["text"], config.text_length)
        else:
            text = np.array(teacher.embed(element["captions"], config.text_length))
        dropped = np.random.default_rng([config.seed, step]).random(settings.batch) < settings.condition_dropout
        text[dropped[rows]] = negative_text
        return global_batch(mesh, rows, settings.batch, {"latents": element["latents"], "text": text})

    def one_step(state: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, jax.Array], Any]:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        return update(state, teacher_params, embedded(step), key, frozen)

    def likely_cause(step: int, values: dict[str, Any], faults: Any, state: dict[str, Any]) -> str:
        bad = rows_with_faults(data[step]["latents"], rows)
        return likely_causes(values["loss"], step, bad, state["params"], faults)

    if not overwrite:
        params = jax.tree.map(jnp.copy, params)  # an update overwrites its state
    fresh = [put_state(mesh, initial_train_state(params, optimizer, settings.ema))]
    del student, params
    free_dropped_models()
    state = run_steps(  # `pop`, so that a resumed run does not keep the fresh state on the devices
        "finetune", config, fresh.pop(), one_step,
        steps=settings.steps, checkpoints=folder / "checkpoints", metrics=folder, profile=profile,
        format_metrics=lambda values: (values, f"loss {values['loss']:.4f}"), likely_cause=likely_cause,
    )  # fmt: skip
    return nnx.merge(graph, trained_parameters(state), *([] if frozen is None else [frozen]))


def split_trained(student: WanTransformer, lora_rank: int) -> tuple[nnx.GraphDef, nnx.State, nnx.State | None]:
    """(graph, trained parameters, frozen ones); without a rank all are trained, and the last is None."""
    if not lora_rank:
        return *nnx.split(student), None
    graph, trained, frozen, *_ = nnx.split(student, trained_with_low_rank, ...)
    return graph, trained, frozen


@jax.jit
def _validation_loss(model, batch, key, shift):
    return velocity_loss(model, None, noised_batch(batch, key, shift), 0.0)


def validation_loss(config: ConfigDict, model: WanTransformer, pipeline: Pipeline, latents: epath.Path) -> float:
    """Flow-matching loss on held-out clips, with the same noise and noise levels for every model."""
    data = batches(latents, VALIDATION_BATCH, seed=0)
    losses = []
    elements = [data[index] for index in range(max(1, config.evaluate.validation_clips // VALIDATION_BATCH))]
    pipeline.embedder.unpadded([word for each in elements for word in each["captions"]], config.text_length)
    for index, element in enumerate(elements):
        batch = {"latents": element["latents"], "text": pipeline.embed(element["captions"], config.text_length)}
        losses.append(
            float(_validation_loss(model, batch, jax.random.fold_in(jax.random.key(0), index), config.sampler.shift))
        )
    check_finite(np.array(losses), "evaluate: the validation losses of batches")
    return float(np.mean(losses))
