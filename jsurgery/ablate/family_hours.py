"""How long the bake-off will take: what is left to do, counted in forwards of the teacher and in steps of training."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jsurgery.ablate.family_bakeoff import LEARNED
from jsurgery.ablate.family_errors import CHOICE, REPORT, SETS, FamilyErrors
from jsurgery.ablate.family_plans import BUDGETS, families
from jsurgery.ablate.learned_selection import BATCH, STEPS
from jsurgery.ablate.seed_run import SeedRun, velocity
from jsurgery.diffusion import velocities_per_step
from jsurgery.runtime.machine import describe_machine
from jsurgery.runtime.progress import clock, say
from jsurgery.surgery.finetune import velocity_loss
from jsurgery.wan.cost import distillation_flops, model_flops, workload
from jsurgery.wan.vae_cost import vae_cost
from jsurgery.wan.video_size import latent_grid

UNITS = 2  # budgets are counted in FLOPs and in time
BLENDED_FORWARDS = 5  # a step of the learned selection: the teacher, and a forward and backward with two attentions
RUNS = 2  # timed, of which the faster counts


@dataclasses.dataclass(frozen=True)
class Work:
    """A part of one seed's work: so many forwards of one clip, and so many steps of fine-tuning."""

    name: str
    forwards: float
    training_steps: int = 0


def work_left(seed: SeedRun, errors: FamilyErrors) -> list[Work]:
    """What a seed still has to do, or more: of plans, only the largest number is known before."""
    config, kinds, stages = seed.config, len(errors.kinds), seed.run.stages
    clip = velocities_per_step(config.sampler.guidance) * config.sampler.steps
    work, traced = workload(config, seed.run.model_config), config.trace.keep_steps
    forward = model_flops(work, (1,) * seed.layers)
    encode, decode = (each.flops / forward for each in vae_cost(seed.run.sizes.vae, *size_of(config)))
    prompts, settings = {half: len(errors.half(half)) * traced for half in (CHOICE, REPORT)}, config.distill
    per_set = {name: seed.layers * prompts[half] for name, (half, _) in SETS.items()}

    # Arms of the families and the mix, whose models are sampled.
    models = len(BUDGETS) * (len(families(errors.kinds)) + 1)
    sampled = models * config.evaluate.prompts * (clip + decode)
    checks = 2 * models * (config.evaluate.validation_clips + prompts[REPORT])  # after half and all of the steps
    selections = UNITS * len(BUDGETS) * len(LEARNED)
    measured = seed.measurements.read(errors.plans_stage), seed.measurements.read(errors.learned_stage)
    plans = UNITS * len(BUDGETS) * (kinds * prompts[CHOICE] + (len(LEARNED) + models / len(BUDGETS)) * prompts[REPORT])
    blocks = errors.missing_blocks()
    parts = [
        Work(f"{config.trace.prompts} traces", 0 if stages["trace"].done() else config.trace.prompts * clip),
        Work(
            f"distillation of {kinds} kinds, {settings.steps} steps",
            0 if seed.distillation(config).done() or not blocks
            else settings.steps * settings.batch * distillation_flops(work, errors.kinds) / forward,
        ),
        Work("errors of single blocks", sum(per_set[name] for name, _ in blocks)),
        Work("errors of at most so many plans", max(0, plans - sum(prompts[f.partition(" ")[0]] for f in measured[0]))),
        Work(
            f"at most {selections} learned selections of {STEPS} steps",
            max(0, selections - len(measured[1])) * STEPS * BATCH * BLENDED_FORWARDS,
        ),
        Work(
            f"{config.data.clips} clips",
            0 if stages["latents"].done() else encode * (config.data.clips + config.evaluate.validation_clips),
        ),
        Work(
            f"{models} models, {config.finetune.steps} steps of fine-tuning and {config.evaluate.prompts} samples each",
            sampled + checks,
            models * config.finetune.steps,
        ),
    ]  # fmt: skip
    return [part for part in parts if part.forwards or part.training_steps]


def size_of(config: Any) -> tuple[int, int, int]:
    return config.video.frames, config.video.height, config.video.width


def announce(left: Sequence[tuple[int, Sequence[Work]]], seed: SeedRun) -> None:
    """Says what each seed has to do, and how long it takes at the rate of a forward and a step timed now."""
    forward, step = time_forward(seed), time_training_step(seed) if seed.config.finetune.steps else 0.0
    say(f"families: on {describe_machine()} a forward takes {forward:.3f} s, a step of fine-tuning {step:.2f} s")
    total = 0.0
    for number, parts in left:
        seconds = [part.forwards * forward + part.training_steps * step for part in parts]
        total += sum(seconds)
        listed = ", ".join(f"{part.name} {clock(each)}" for part, each in zip(parts, seconds, strict=True))
        say(f"families: seed {number}: {listed}")
    say(f"families: at most {total / 3600:.1f} hours in all, and what compiling takes")


def inputs(seed: SeedRun, batch: int) -> dict[str, jax.Array]:
    """Zeros in the shapes of the transformer's inputs."""
    config, model = seed.config, seed.run.model_config
    latents = (batch, *latent_grid(*size_of(config), model.strides), model.in_channels)
    text = (batch, config.text_length, model.text_dim)
    return {"latents": jnp.zeros(latents), "timestep": jnp.full(batch, 500.0), "text": jnp.zeros(text)}


def time_forward(seed: SeedRun) -> float:
    batch = inputs(seed, 1)
    return fastest(lambda: velocity(seed.run.teacher, batch))


def time_training_step(seed: SeedRun) -> float:
    """A loss and its gradients of a batch; the optimiser's share is small."""
    batch = inputs(seed, seed.config.finetune.batch)
    batch |= {"timesteps": batch["timestep"], "velocity": jnp.zeros(batch["latents"].shape)}
    graph, params = nnx.split(seed.run.teacher)
    loss = jax.jit(jax.grad(lambda params: velocity_loss(nnx.merge(graph, params), None, batch, 0.0)))
    return fastest(lambda: loss(params))


def fastest(run: Callable[[], Any]) -> float:
    """The least seconds of some runs after one in which the program compiles."""
    seconds = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return float(np.min(seconds[1:]))
