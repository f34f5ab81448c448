"""The families of attention beside each other: about four hours on one CPU core for three seeds.

    jsurgery train --config=tiny_families_teacher --workdir=runs/families_teacher
    jsurgery ablate --table=families --config=tiny_families --workdir=runs/families --results=docs/results.md

Clips have 13 latent frames of 7 x 6 tokens, on which chunks of frames save something. Single options are compared along
the candidates: Tc and To of causal chunks, causal or not, the rates, and the share of the key blocks of 16 tokens.
"""

from jsurgery.config import base


def get_config():
    c = base()
    c.prompts = "sprites"
    c.model.path = "runs/families_teacher/model"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 49, 112, 96, 8
    c.text_length = 16
    c.sampler.solver = "unipc"
    c.sampler.steps = 10
    c.hybrid.rates = (
        2, 4, 8, "linear", "C1O1", "C2O1", "C3O0", "C3O1", "C3O2", "C5O1", "B1O1", "B3O1",
        "S5B16", "S10B16", "S25B16", "S50B16",
    )  # fmt: skip
    c.trace.prompts = 64
    c.trace.holdout = 16
    c.trace.keep_steps = 5
    c.trace.batch = 4
    c.distill.steps = 400
    c.distill.error_steps = 8
    c.distill.velocity_steps = 1  # the bake-off measures its own, on more steps
    c.plan.rates = (1, *c.hybrid.rates)
    c.plan.budget = 0.7
    c.finetune.steps = 40
    c.finetune.batch = 8
    c.finetune.learning_rate = 1e-4
    c.data.path = "sprites"
    c.data.clips = 240
    c.evaluate.prompts = 40
    c.evaluate.validation_clips = 32
    c.evaluate.videos = 0
    c.checkpoint.every = 100
    return c
