"""temporal: a control for the scores. Without attention between frames, no motion can follow the prompt."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jsurgery.ablate.measures import Items, samples
from jsurgery.ablate.seed_run import Model, SeedRun
from jsurgery.evaluate.statistics import mean_and_std, paired_difference
from jsurgery.wan.transformer import WanTransformer, full_attention

ARMS = ("teacher", "within each latent frame")
COMPARED = ("direction", "motion", "shape", "total")


class FramewiseTransformer(WanTransformer):
    """A transformer without hybrid blocks in which a token attends only to the tokens of its own latent frame."""

    def __call__(self, latents: jax.Array, timesteps: jax.Array, text_embeddings: jax.Array) -> jax.Array:
        frames = self.config.token_grid(latents.shape[1:4])[0]

        def within_frames(q, k, v, _):
            by_frame = (x.reshape(-1, x.shape[1] // frames, *x.shape[2:]) for x in (q, k, v))
            return full_attention(*by_frame).reshape(q.shape), None

        return self.apply_blocks(latents, timesteps, text_embeddings, within_frames, None, order=None)[0]


def framewise(teacher: WanTransformer) -> FramewiseTransformer:
    """The teacher's weights in a transformer without attention between frames."""
    build = lambda: FramewiseTransformer(teacher.config, dtype=teacher.dtype, rngs=nnx.Rngs(0))
    model = nnx.eval_shape(build)
    nnx.update(model, nnx.state(teacher))
    return model


def temporal_control(seeds: Sequence[SeedRun]) -> dict[str, Any]:
    """Scores of the teacher's samples, with its attention between frames and without."""
    per_seed = [of_seed(seed) for seed in seeds]
    means = lambda arm, measure: [float(np.mean(scores[arm][measure])) for scores in per_seed]
    rows = {arm: {measure: mean_and_std(means(arm, measure)) for measure in per_seed[0][arm]} for arm in ARMS}
    items = lambda arm, measure: [scores[arm][measure] for scores in per_seed]
    teacher, framewise_teacher = ARMS
    compared = [measure for measure in COMPARED if measure in rows[teacher]]
    differences = {m: paired_difference(items(framewise_teacher, m), items(teacher, m)) for m in compared}
    return {
        "text": f"{len(seeds)} seeds, {seeds[0].config.evaluate.prompts} prompts each; nothing is trained. ± is the "
        "standard deviation over seeds; a direction of 0 is what captions dealt at random score.",
        "rows": rows,
        "contrasts": {f"{framewise_teacher} − {teacher}": differences},
        "plotted": compared,
        "per_seed": per_seed,
    }


def of_seed(seed: SeedRun) -> dict[str, Items]:
    scores = samples(seed, [Model("teacher_framewise", lambda: framewise(seed.run.teacher))])
    return dict(zip(ARMS, (scores["teacher"], scores["teacher_framewise"]), strict=True))
