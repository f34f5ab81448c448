"""The tiny surgery with the prompts, clips and steps of the ablations: hours on two CPU cores for all of them.

    jsurgery ablate --table=all --config=tiny_ablations --workdir=runs/ablations

Differs from tiny.py in the numbers of prompts, clips and steps, in the learning rate of distillation, and in the rates
of a plan, which are the paper's.
"""

from jsurgery.config import base


def get_config():
    c = base()
    c.prompts = "sprites"
    c.model.path = "tiny_wan"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 17, 192, 160, 8
    c.text_length = 16
    c.sampler.solver = "unipc"
    c.sampler.steps = 10
    c.trace.prompts = 28
    c.trace.holdout = 8
    c.trace.keep_steps = 10
    c.trace.batch = 4
    c.distill.steps = 300
    c.plan.rates = (1, 2, 4, 8)
    c.plan.budget = "4R8"
    c.finetune.steps = 40
    c.finetune.batch = 8
    c.finetune.learning_rate = 1e-4
    c.data.path = "sprites"
    c.data.clips = 256
    c.evaluate.prompts = 72
    c.evaluate.validation_clips = 64
    c.evaluate.videos = 0
    c.checkpoint.every = 100
    return c
