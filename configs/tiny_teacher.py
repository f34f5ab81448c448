"""A tiny Wan2.1 trained from scratch on sprites: the teacher that the tiny surgery operates on.

jsurgery train --config=tiny_teacher --workdir=runs/teacher
"""

from jsurgery.config import base


def get_config():
    c = base()
    c.prompts = "sprites"
    c.model.path = "tiny_wan"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 17, 192, 160, 8
    c.text_length = 16
    c.sampler.steps = 20
    c.trace.keep_steps = 20
    c.data.path = "sprites"
    c.train.vae_base_dim = 8
    c.train.z_dim = 8
    c.train.vae_res_blocks = 1
    c.train.vae_steps = 3000
    c.train.vae_batch = 6
    c.train.vae_crop = (9, 32, 32)
    c.train.vae_kl_weight = 3e-4
    c.train.clips = 2048
    c.train.learning_rate = 3e-3
    c.train.steps = 6500
    c.train.decay = 3900
    return c
