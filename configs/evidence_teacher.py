"""A sprites teacher of Wan's head width: 12 blocks of 4 heads of 128, 9 x 16 x 15 = 2,160 tokens, two sprites in half
of the clips, which may cross. For one GPU of 80 GB.

    jsurgery train --config=evidence_teacher --workdir=runs/evidence_teacher
    jsurgery train --config=evidence_teacher --workdir=runs/evidence_teacher1 --config.seed=1   # and so on

`configs/evidence_ablations.py` then runs the tables. Computed, not measured: 53 M parameters, 32 TFLOP per step, so an
hour and a half at 100 TFLOP/s for 16,000 steps; some 40 GB of activations. This config has not been run yet.
"""

from jsurgery.config import base


def get_config():
    c = base()
    c.prompts = "sprites"
    c.model.path = "tiny_wan"
    c.model.dtype = "bfloat16"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 33, 256, 240, 16
    c.text_length = 16
    c.sampler.steps = 20
    c.trace.keep_steps = 20
    c.data.path = "sprites"
    c.data.two_sprites = 0.5
    c.train.vae_base_dim = 16
    c.train.z_dim = 8
    c.train.vae_res_blocks = 1
    c.train.vae_steps = 3000
    c.train.vae_batch = 8
    c.train.vae_crop = (9, 64, 64)
    c.train.vae_kl_weight = 3e-4
    c.train.text_dim = 128
    c.train.clips = 8192
    c.train.layers = 12
    c.train.heads = 4
    c.train.head_dim = 128
    c.train.ffn_dim = 2048
    c.train.batch = 32
    c.train.steps = 16_000
    c.train.warmup = 500
    c.train.decay = 6000
    c.checkpoint.every = 500
    return c
