"""The whole surgery on the bundled tiny Wan teacher: minutes on two CPU cores.

    jsurgery surgery --config=tiny --workdir=runs/demo

Half of the six blocks' worth of attention is converted; what it shows is about this tiny model, not about Wan2.1.
"""

from jsurgery.config import base


def get_config():
    c = base()
    c.prompts = "sprites"
    c.model.path = "tiny_wan"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 17, 192, 160, 8
    c.text_length = 32
    c.sampler.steps = 20
    c.hybrid.rates = (2, 4, 8, "linear")
    c.trace.prompts = 24
    c.trace.holdout = 4
    c.trace.keep_steps = 10
    c.trace.batch = 4
    c.distill.steps = 240
    c.distill.batch = 2
    c.plan.rates = (1, 2, 4, 8)
    c.plan.budget = "3R8"
    c.finetune.steps = 60
    c.finetune.batch = 8
    c.finetune.learning_rate = 1e-4
    c.data.path = "sprites"
    c.data.clips = 256
    c.evaluate.prompts = 8
    c.evaluate.validation_clips = 32
    c.evaluate.videos = 4
    c.checkpoint.every = 60
    return c
