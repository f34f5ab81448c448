"""temporal: a control of the score. A teacher without attention between frames cannot move anything as asked."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jsurgery.ablate.seed_run import Items, Model, SeedRun
from jsurgery.evaluate.statistics import mean_and_std, paired_difference
from jsurgery.wan.transformer import WanTransformer, full_attention

ARMS = ("teacher", "within each latent frame")
COMPARED = ("direction", "motion", "shape", "total")


class FramewiseTransformer(WanTransformer):
    """A transformer without hybrid blocks, whose every token attends to those of its own latent frame alone."""

    def __call__(self, latents: jax.Array, timesteps: jax.Array, text_embeddings: jax.Array) -> jax.Array:
        frames = self.config.token_grid(latents.shape[1:4])[0]

        def within_frames(q, k, v, _):
            apart = (x.reshape(-1, x.shape[1] // frames, *x.shape[2:]) for x in (q, k, v))
            return full_attention(*apart).reshape(q.shape), None

        return self.apply_blocks(latents, timesteps, text_embeddings, within_frames, None, order=None)[0]


def framewise(teacher: WanTransformer) -> FramewiseTransformer:
    """The teacher with its own weights and no attention between frames."""
    build = lambda: FramewiseTransformer(teacher.config, dtype=teacher.dtype, rngs=nnx.Rngs(0))
    model = nnx.eval_shape(build)
    nnx.update(model, nnx.state(teacher))
    return model


def temporal_control(seeds: Sequence[SeedRun]) -> dict[str, Any]:
    """Scores of the teacher's samples with its attention between frames and without it."""
    found = [of_seed(seed) for seed in seeds]
    mean = lambda arm, measure: [float(np.mean(seed[arm][measure])) for seed in found]
    rows = {arm: {measure: mean_and_std(mean(arm, measure)) for measure in found[0][arm]} for arm in ARMS}
    items = lambda arm, measure: [seed[arm][measure] for seed in found]
    whole, apart = ARMS
    compared = [measure for measure in COMPARED if measure in rows[whole]]
    differences = {measure: paired_difference(items(apart, measure), items(whole, measure)) for measure in compared}
    return {
        "text": f"{len(seeds)} seeds, {seeds[0].config.evaluate.prompts} prompts each; nothing is trained. ± is the "
        "standard deviation over seeds; a direction of 0 is what captions dealt at random score.",
        "rows": rows,
        "contrasts": {f"{apart} − {whole}": differences},
        "plotted": compared,
        "per_seed": found,
    }


def of_seed(seed: SeedRun) -> dict[str, Items]:
    scored = seed.samples([Model("teacher_framewise", lambda: framewise(seed.run.teacher))])
    return dict(zip(ARMS, (scored["teacher"], scored["teacher_framewise"]), strict=True))
