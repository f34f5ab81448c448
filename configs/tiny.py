"""The whole surgery on the bundled tiny Wan teacher: about a quarter of an hour on two CPU cores.

    jsurgery surgery --config=tiny --workdir=runs/demo

At the cost of half of the blocks at rate 8, as the paper's 15R8 of 30; the planner spends it as it likes. What this
shows is about a tiny model on procedural clips, not about Wan2.1 1.3B.
"""

from jsurgery.config import base


def get_config():
    c = base()
    c.prompts = "sprites"
    c.model.path = "tiny_wan"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 17, 192, 160, 8
    c.text_length = 16
    c.sampler.steps = 20
    c.trace.prompts = 20
    c.trace.holdout = 4
    c.trace.keep_steps = 10
    c.trace.batch = 4
    c.distill.steps = 300
    c.plan.rates = (1, 2, 4, 8, "linear")
    c.plan.budget = "3R8"
    c.finetune.steps = 60
    c.finetune.batch = 8
    c.finetune.learning_rate = 1e-4
    c.data.path = "sprites"
    c.data.clips = 64
    c.evaluate.prompts = 8
    c.evaluate.validation_clips = 32
    c.evaluate.videos = 6
    c.checkpoint.every = 100
    return c
