"""Velocity errors of plans and of single blocks on held-out traces, by prompt, each of them measured once.

All errors are relative squared errors of the velocity, as the planner adds them up. The held-out prompts are divided:
plans are made and kinds are chosen by errors on the first half, and errors on the second half are reported.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jsurgery.ablate.family_plans import Plan
from jsurgery.ablate.learned_selection import BATCH, LEARNING_RATE, STEPS, BlendedError, learn_selection
from jsurgery.ablate.seed_run import Model, SeedRun, velocity
from jsurgery.attention.feature_maps import FeatureMapConfig, LearnedMaps
from jsurgery.attention.kinds.candidates import maps_of
from jsurgery.rates import Rate
from jsurgery.runtime.progress import Progress
from jsurgery.surgery.distillation.saved_maps import INITIAL, TRAINED, load_all_maps
from jsurgery.surgery.distillation.teacher_pass import DistillSpec
from jsurgery.surgery.plan_forward import relative_errors, velocity_errors
from jsurgery.surgery.trace import TraceSteps

CHOICE, REPORT = "choice", "report"  # halves of the held-out prompts
T = TypeVar("T")
SETS = {CHOICE: (CHOICE, TRAINED), REPORT: (REPORT, TRAINED), "initial": (REPORT, INITIAL)}  # -> (half, maps)


class FamilyErrors:
    """The errors of one seed. Nothing is loaded before something is missing in its file of measurements."""

    def __init__(self, seed: SeedRun):
        self.seed, self.spec, self.layers = seed, DistillSpec.of(seed.config), seed.layers
        self.kinds = self.spec.rates
        self._loaded: dict[str, LearnedMaps] = {}
        named = functools.partial(seed.stage, config=seed.config, fields=(), after=[seed.distillation(seed.config)])
        self.blocks_stage, self.plans_stage = named("family_blocks"), named("family_plans")
        self.learned_stage = named("family_learned", updates=f"{STEPS} of {BATCH} at {LEARNING_RATE}")

    def half(self, name: str) -> range:
        """The numbers of the held-out prompts of a half; the first has the odd one."""
        prompts = self.seed.config.trace.holdout
        middle = (prompts + 1) // 2
        return range(middle) if name == CHOICE else range(middle, prompts)

    def missing_blocks(self) -> list[tuple[str, Rate]]:
        """The sets of SETS, with the kind, whose errors of single blocks are not measured yet."""
        measured = self.seed.measurements.read(self.blocks_stage)
        return [(name, kind) for name in SETS for kind in self.kinds if block_file(name, kind) not in measured]

    def blocks(self) -> dict[str, np.ndarray]:
        """By the names of SETS: the errors of converting one block alone, [prompts, blocks, kinds]."""
        missing = self.missing_blocks()
        for name, kind in shown(f"families: single blocks, seed {self.seed.number}", missing):
            half, maps = SETS[name]
            plans: list[Plan] = [tuple(kind if at == block else 1 for at in range(self.layers))
                                 for block in range(self.layers)]  # fmt: skip
            values = self._errors(plans, self.half(half), maps)
            self.seed.measurements.add(self.blocks_stage, {block_file(name, kind): {"squared": values.tolist()}})
        files = self.seed.measurements.read(self.blocks_stage)
        of_kind = lambda name, kind: files[block_file(name, kind)]["squared"]
        return {name: np.stack([of_kind(name, kind) for kind in self.kinds], axis=2) for name in SETS}

    def plans(self, plans: Iterable[Plan], half: str) -> dict[Plan, np.ndarray]:
        """The errors of whole plans on a half, each [prompts]."""
        distinct, measured = list(dict.fromkeys(plans)), self.seed.measurements.read(self.plans_stage)
        missing = [plan for plan in distinct if plan_file(half, plan) not in measured]
        for plan in shown(f"families: plans, {half}, seed {self.seed.number}", missing):
            values, file = self._errors([plan], self.half(half), TRAINED)[:, 0], plan_file(half, plan)
            self.seed.measurements.add(self.plans_stage, {file: {"squared": values.tolist()}})
        files = self.seed.measurements.read(self.plans_stage)
        return {plan: np.array(files[plan_file(half, plan)]["squared"]) for plan in distinct}

    def learned(self, kind: Rate, count: int) -> dict[str, Any]:
        """LinVideo's selection of `count` blocks for `kind`; see `learn_selection`. Also the plan, `rates`."""
        file = learned_file(kind, count)
        found = self.seed.measured_once(self.learned_stage, file, lambda: self._learn(kind, count))
        rates = tuple(kind if block in found["converted"] else 1 for block in range(self.layers))
        return {**found, "rates": rates}

    def of_model(self, model: Model) -> list[float]:
        """The errors of a model on the reported half, by prompt."""

        def measure() -> dict[str, list[float]]:
            loaded, errors = model.load(), []
            for number in self.half(REPORT):
                error = relative_errors(velocity(loaded, self.seed.held_out[number]), self._teacher(number))
                errors.append(float(error["squared"]))
            return {"squared": errors}

        stage = self.seed.stage("family_models", self.seed.config, (), [self.seed.run.stages["trace"]])
        return self.seed.measured_once(stage, f"{model.name}.json", measure)["squared"]

    def _teacher(self, number: int) -> jax.Array:
        return jnp.asarray(self.seed.teacher_velocities[number])

    def _errors(self, plans: Sequence[Plan], prompts: range, maps: str) -> np.ndarray:
        """[prompts, plans]."""
        choice = {1: 0} | {kind: index + 1 for index, kind in enumerate(self.kinds)}
        plans_PxL, loaded = np.array([[choice[rate] for rate in plan] for plan in plans]), self._maps(maps)
        teacher, batches = self.seed.run.teacher, self.seed.held_out
        each = [
            velocity_errors(teacher, batches[number], loaded, plans_PxL, self.spec, self._teacher(number))["squared"]
            for number in prompts
        ]
        return np.stack(each).astype(np.float64)

    def _maps(self, file: str) -> LearnedMaps:
        if file not in self._loaded:
            path, phi = self.seed.distilled(self.seed.config) / file, FeatureMapConfig.of(self.seed.config)
            self._loaded[file] = load_all_maps(path, self.kinds, self.layers, phi)
        return self._loaded[file]

    def _learn(self, kind: Rate, count: int) -> dict[str, Any]:
        seed, settings = self.seed, self.seed.config.trace
        maps = maps_of(self._maps(TRAINED), self.kinds, self.kinds.index(kind), axis=1)
        steps, teacher = TraceSteps(seed.trace().folder, range(settings.prompts - settings.holdout)), seed.run.teacher
        rng = np.random.default_rng([seed.number, count])
        numbers = rng.integers(len(steps), size=(STEPS, BATCH))
        label = f"families: learned selection of {count} {kind}, seed {seed.number}"

        def batches():
            for drawn in shown(label, list(numbers)):
                examples = [steps[int(number)] for number in drawn]
                batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
                yield teacher, maps, batch, velocity(teacher, batch)

        return learn_selection(BlendedError(kind, self.spec), batches(), STEPS, self.layers, self.layers - count)


def shown(label: str, items: Sequence[T]) -> Iterator[T]:
    """The items, with progress; nothing is shown of none."""
    if items:
        yield from (items[number] for number in Progress(label, len(items)).over(range(len(items))))


def block_file(name: str, kind: Rate) -> str:
    return f"{name} {kind}.json"


def plan_file(half: str, plan: Plan) -> str:
    return f"{half} {','.join(map(str, plan))}.json"


def learned_file(kind: Rate, count: int) -> str:
    return f"{count} {kind}.json"
