"""Wan2.1 1.3B at its own resolution, 480x832, 81 frames: 21 x 30 x 52 = 32,760 tokens. The paper's main results.

    jsurgery surgery --config=wan_1_3b@v6e-8 --workdir=gs://bucket/run \\
        --config.model.path=/path/to/Wan2.1-T2V-1.3B-Diffusers --config.prompts=prompts.txt --config.data.path=latents/

As wan_1_3b_lowres.py, at 2.6 times the tokens. The paper fine-tunes at this size on 22,000 clips made by Wan2.1 14B.
"""

from jsurgery.config import base


def batches(size):
    """Distillation sees as many examples as in 10,000 steps with one example each."""
    batch = {"trace.batch": size, "distill.batch": size, "evaluate.batch": size}
    return batch | {"distill.steps": 10_000 // size, "checkpoint.keep": 1}


ONE = batches(1) | {"sampler.guidance_batched": False}
TOPOLOGIES = {
    "v5e-1": ONE,
    "v5e-8": batches(8) | {"sampler.guidance_batched": False, "finetune.accumulate": 2},
    "v5e:4x4": batches(16) | {"sampler.guidance_batched": False},
    "v5e:16x16": batches(16),
    "v6e-8": batches(8),
    "v6e:4x4": batches(16),
    "h100": batches(1) | {"finetune.accumulate": 8},
    "8xh100": batches(8),
    "4090": ONE,
}


def get_config():
    c = base()
    c.model.dtype = "bfloat16"
    c.model.remat = "blocks"
    c.distill.error_steps = 100  # of 800
    c.checkpoint.minutes = 15.0
    c.video.frames, c.video.height, c.video.width, c.video.fps = 81, 480, 832, 16
    c.distill.mode = "sampling"
    return c
