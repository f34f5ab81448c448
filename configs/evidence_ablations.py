"""The ablations on the teacher of `configs/evidence_teacher.py`, for a GPU.

    jsurgery ablate --table=all --config=evidence_ablations --workdir=runs/evidence_ablations

For a teacher of another seed, `--config.model.path=runs/evidence_teacher1/model`. This config has not been run yet.
"""

from jsurgery.config import base


def get_config():
    c = base()
    c.prompts = "sprites"
    c.model.path = "runs/evidence_teacher/model"
    c.model.dtype = "bfloat16"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 33, 256, 240, 16
    c.text_length = 16
    c.sampler.steps = 20
    c.trace.prompts = 104
    c.trace.holdout = 8
    c.trace.keep_steps = 10
    c.trace.batch = 8
    c.distill.steps = 2000
    c.plan.budget = "8R8"
    c.finetune.steps = 400
    c.finetune.batch = 16
    c.finetune.learning_rate = 5e-5
    c.data.path = "sprites"
    c.data.clips = 2048
    c.data.two_sprites = 0.5
    c.evaluate.prompts = 200
    c.evaluate.batch = 8
    c.evaluate.validation_clips = 128
    c.evaluate.videos = 6
    return c
