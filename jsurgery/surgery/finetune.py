"""finetune: all parameters of the operated model, by flow matching on data, the teacher's velocity, or a mix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from jsurgery.data.latents import batches, padded_text
from jsurgery.diffusion import add_noise, shift_sigma
from jsurgery.runtime.checkpoints import Checkpoints
from jsurgery.runtime.mesh import make_mesh, place, put_state, sharding
from jsurgery.runtime.progress import Metrics, Progress
from jsurgery.wan.pipeline import Pipeline
from jsurgery.wan.transformer import WanTransformer

VALIDATION_BATCH = 8


def velocity_loss(
    student: WanTransformer,
    teacher: WanTransformer,
    batch: dict[str, jax.Array],
    key: jax.Array,
    shift: float,
    teacher_weight: float,
) -> jax.Array:
    """Mean squared error against (1 - w) the flow-matching velocity and w the teacher's, at evenly spread levels."""
    latents, size = batch["latents"], batch["latents"].shape[0]
    key_level, key_noise = jax.random.split(key)
    sigma_B = shift_sigma((jnp.arange(size) + jax.random.uniform(key_level, (size,))) / size, shift)
    noisy, velocity = add_noise(latents, jax.random.normal(key_noise, latents.shape), sigma_B)
    predicted = student(noisy, 1000 * sigma_B, batch["text"])
    loss = (1 - teacher_weight) * jnp.mean((predicted - velocity) ** 2)
    if teacher_weight > 0:
        taught = jax.lax.stop_gradient(teacher(noisy, 1000 * sigma_B, batch["text"]))
        loss += teacher_weight * jnp.mean((predicted - taught) ** 2)
    return loss


def finetune(
    config: ConfigDict, student: WanTransformer, teacher: Pipeline, latents: epath.Path, folder: epath.Path
) -> WanTransformer:
    """Trains `student` (or goes on) on the shards in `latents`; checkpoints and metrics go to `folder`."""
    settings = config.finetune
    mesh = make_mesh(config.mesh)
    place(mesh, student)
    place(mesh, teacher.transformer)
    graph, params = nnx.split(student)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay)
    )
    blank = np.asarray(teacher.embed([""], config.text_length))[0]
    data = batches(latents, settings.batch, config.seed)

    def embedded(step: int) -> dict[str, jax.Array]:
        element = data[step]
        if "text" in element:
            text = padded_text(element["text"], config.text_length)
        else:
            text = np.array(teacher.embed(element["captions"], config.text_length))
        dropped = np.random.default_rng([config.seed, step]).random(len(text)) < settings.condition_dropout
        text[dropped] = blank
        return jax.device_put({"latents": element["latents"], "text": text}, sharding(mesh, "batch"))

    @jax.jit
    def update(state, teacher_params, batch, key):
        def loss(params):
            reference = nnx.merge(teacher_graph, teacher_params)
            return velocity_loss(
                nnx.merge(graph, params), reference, batch, key, config.sampler.shift, settings.teacher_weight
            )

        value, gradients = jax.value_and_grad(loss)(state["params"])
        updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
        return new, {"loss": value, "gradient_norm": optax.tree.norm(gradients)}

    teacher_graph, teacher_params = nnx.split(teacher.transformer)
    checkpoints = Checkpoints(folder / "checkpoints", every=config.checkpoint.every, keep=config.checkpoint.keep)
    start, state = checkpoints.restore(put_state(mesh, {"params": params, "opt_state": optimizer.init(params)}))
    metrics, progress = Metrics(folder, start), Progress("finetune", settings.steps, start)
    for step in progress.over(range(start, settings.steps)):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        state, values = update(state, teacher_params, embedded(step), key)
        if (step + 1) % config.log_every == 0:
            metrics.log(step + 1, **values)
            metrics.flush()
            progress.note = f"loss {values['loss']:.4f}"
        checkpoints.save(step + 1, state, last=step + 1 == settings.steps)
    metrics.flush()
    checkpoints.close()
    return nnx.merge(graph, state["params"])


@nnx.jit
def _validation_loss(model, batch, key, shift):
    return velocity_loss(model, model, batch, key, shift, 0.0)


def validation_loss(config: ConfigDict, model: WanTransformer, pipeline: Pipeline, latents: epath.Path) -> float:
    """Flow-matching loss on held-out clips, with the same noise and noise levels for every model."""
    data = batches(latents, VALIDATION_BATCH, seed=0)
    losses = []
    for index in range(max(1, config.evaluate.validation_clips // VALIDATION_BATCH)):
        element = data[index]
        batch = {"latents": element["latents"], "text": pipeline.embed(element["captions"], config.text_length)}
        losses.append(
            float(_validation_loss(model, batch, jax.random.fold_in(jax.random.key(0), index), config.sampler.shift))
        )
    return float(np.mean(losses))
