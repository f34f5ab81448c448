"""The tiny surgery with enough prompts, clips and steps for a table: hours on two CPU cores for three seeds.

    jsurgery ablate --table=evidence --config=tiny_evidence --workdir=runs/evidence

Differs from tiny.py in numbers of prompts, clips and steps, in the solver and in the learning rate of distillation.
"""

from jsurgery.config import base


def get_config():
    c = base()
    c.prompts = "sprites"
    c.model.path = "tiny_wan"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 17, 192, 160, 8
    c.text_length = 16
    c.sampler.steps = 20
    c.trace.prompts = 40
    c.trace.holdout = 8
    c.trace.keep_steps = 10
    c.trace.batch = 4
    c.distill.steps = 600
    c.plan.rates = (1, 2, 4, 8, "linear")
    c.plan.budget = "3R8"
    c.finetune.steps = 200
    c.finetune.batch = 8
    c.finetune.learning_rate = 1e-4
    c.data.path = "sprites"
    c.data.clips = 512
    c.evaluate.prompts = 32
    c.evaluate.validation_clips = 64
    c.evaluate.videos = 6
    c.checkpoint.every = 100
    return c
