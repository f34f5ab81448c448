"""The bundled tiny Wan, trained on to clips of 49 frames: the teacher on which families of attention are compared.

    jsurgery train --config=tiny_families_teacher --workdir=runs/families_teacher

The bundled model's clips have 5 latent frames, of which chunks of 3 with an overlap of 1 save nothing. These have 13
latent frames of 7 x 6 tokens, 546 in all. Tokenizer and VAE are the bundled ones. Two hours on one CPU core.
"""

from jsurgery.config import base


def get_config():
    c = base()
    c.prompts = "sprites"
    c.model.path = "tiny_wan"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 49, 112, 96, 8
    c.text_length = 16
    c.sampler.steps = 20
    c.trace.keep_steps = 20
    c.data.path = "sprites"
    c.train.init = "tiny_wan"
    c.train.z_dim = 8
    c.train.clips = 1536
    c.train.holdout_clips = 128
    c.train.learning_rate = 1.5e-3
    c.train.warmup = 50
    c.train.steps = 1800
    c.train.decay = 1200
    c.train.ema = 0.99
    c.checkpoint.every = 200
    return c
