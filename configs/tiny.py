"""The whole surgery on the bundled tiny Wan teacher: at most five minutes on two CPU cores.

    jsurgery surgery --config=tiny --workdir=runs/demo

The budget is the cost of two of the six blocks with linear attention; the planner may choose other rates for it. At
three blocks, half of them, the tiny model loses what can be seen (`tiny_evidence` measures that). Results are about a
tiny model on procedural clips, not about Wan2.1 1.3B. Prompts, clips and steps are few, for a demonstration;
`tiny_evidence` has enough for a table.
"""

from jsurgery.config import base


def get_config():
    c = base()
    c.prompts = "sprites"
    c.model.path = "tiny_wan"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 17, 192, 160, 8
    c.text_length = 16
    c.sampler.solver = "unipc"
    c.sampler.steps = 8
    c.trace.prompts = 12
    c.trace.holdout = 2
    c.trace.keep_steps = 8
    c.trace.batch = 2
    c.distill.steps = 200
    c.distill.learning_rate = 2.5e-3
    c.distill.velocity_steps = 4
    c.plan.rates = (1, 2, 4, 8, "linear")
    c.plan.budget = "2Rlinear"
    c.finetune.steps = 30
    c.finetune.batch = 4
    c.finetune.learning_rate = 1e-4
    c.finetune.teacher_weight = 1.0  # 32 clips are few to learn from
    c.data.path = "sprites"
    c.data.clips = 32
    c.evaluate.prompts = 8
    c.evaluate.validation_clips = 16
    c.evaluate.videos = 6
    c.checkpoint.every = 100
    c.log_every = 5
    return c
