"""The example of the guide "A new attention family": a kind that no file of the package knows."""

import dataclasses
import functools
import inspect
import pathlib
import re

import torch
from flax import nnx

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.attention.kinds import registry
from jsurgery.attention.kinds.query_blocks import QueryBlockKind
from jsurgery.config import base
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, losses_and_gradients
from jsurgery.surgery.distillation.update import initial_maps
from jsurgery.surgery.plan import block_costs
from jsurgery.wan.checkpoint import load_transformer, save_transformer
from jsurgery.wan.model_config import WanConfig
from pallas_kernels import QueryBlock
from tests.wan.second_model import SIZES, brute_force_batch, in_double, inputs, relative_error, run

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "guides" / "new_attention_family.md"


@dataclasses.dataclass(frozen=True)
class SlidingWindow(QueryBlockKind):
    """ "W2": softmax for frames at most 2 away, linear attention for all others."""

    reach: int
    family, spelling = "sliding window", "names like 'W2'"

    @classmethod
    def parse(cls, rate):
        match = re.fullmatch(r"W(\d{1,4})", str(rate))
        return cls(int(match[1])) if match else None

    @property
    def rate(self):
        return f"W{self.reach}"

    @property
    def description(self):
        return f"softmax for frames at most {self.reach} away, all others linear"

    def blocks(self, frames, tokens_per_frame):
        found = []
        for frame in range(frames):
            first, last = max(frame - self.reach, 0), min(frame + self.reach + 1, frames)
            ranges = (frame, frame + 1), (first, last), (0, first), (last, frames)
            queries, softmax, *linear = ((a * tokens_per_frame, b * tokens_per_frame) for a, b in ranges)
            found.append(QueryBlock(queries, softmax, tuple(linear)))
        return found


def test_a_kind_is_one_class_and_one_registration(random_transformer, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", [*registry.FAMILIES])
    monkeypatch.setattr(registry, "kind_or_none", functools.lru_cache(registry.kind_or_none.__wrapped__))
    registry.register(SlidingWindow)
    hybrid, (latents, timesteps, text) = HybridConfig(("W1", 2)), inputs((3, 3, 3))
    model = random_transformer(WanConfig(**SIZES, num_layers=2, hybrid=hybrid))
    save_transformer(model, tmp_path)
    velocity = run(*nnx.split(load_transformer(tmp_path)), latents, timesteps, text)
    window = lambda query, key, reach, causal: (abs(query - key) <= reach, abs(query - key) > reach)
    with torch.no_grad():
        expected = brute_force_batch(in_double(model), model.config, latents, timesteps, text, chunked=window)
    assert relative_error(velocity, expected) < 1e-5

    config, teacher = base(), random_transformer(WanConfig(**SIZES, num_layers=2))
    config.hybrid.rates, config.plan.rates, config.plan.budget = ("W1", 2), (1, "W1", 2), "1W1+1R2"
    batch = {"latents": latents, "timestep": timesteps, "text": text}
    losses = losses_and_gradients(teacher, batch, initial_maps(config, teacher), DistillSpec.of(config))[0]
    assert losses.shape == (2, 2) and losses.min() > 0
    assert block_costs(config, teacher.config).teacher > block_costs(config, teacher.config).of(["W1", "W1"])


def test_the_guide_shows_it():
    assert inspect.getsource(SlidingWindow) in GUIDE.read_text()
