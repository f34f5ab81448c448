"""Wan2.2 TI2V 5B at its own resolution, 704x1280, 121 frames: 31 x 22 x 40 = 27,280 tokens, 30 blocks.

    jsurgery surgery --config=wan2_2_5b@v6e-8 --workdir=gs://bucket/run \\
        --config.model.path=/path/to/Wan2.2-TI2V-5B-Diffusers --config.prompts=prompts.txt --config.data.path=latents/

The paper does not operate on this model: half of the blocks become hybrid, as in its 1.3B. A frame has 22 x 40 tokens,
so that rates 2, 4 and 8 of the strided lattice would keep the same whole columns in every frame; in this lattice they
move by one column from each row of tokens to the next.
"""

from jsurgery.config import base


def batches(size):
    """Distillation sees as many examples as in 10,000 steps with one example each."""
    batch = {"trace.batch": size, "distill.batch": size, "evaluate.batch": size}
    return batch | {"distill.steps": 10_000 // size, "checkpoint.keep": 1}


# A v5e's 16 GiB hold the decoder of a smaller video: 480x832, 12,090 tokens.
SMALL = {"video.height": 480, "video.width": 832}
TOPOLOGIES = {
    "v5e-8": batches(1) | SMALL | {"sampler.guidance_batched": False, "finetune.accumulate": 2},
    "v6e-8": batches(8) | {"sampler.guidance_batched": False, "finetune.accumulate": 2},
    "h100": batches(1) | {"sampler.guidance_batched": False, "finetune.accumulate": 16},
    "8xh100": batches(8) | {"finetune.accumulate": 2},
}


def get_config():
    c = base()
    c.model.dtype = "bfloat16"
    c.model.remat = "blocks"
    c.distill.error_steps = 100  # of 800
    c.checkpoint.minutes = 15.0
    c.video.frames, c.video.height, c.video.width, c.video.fps = 121, 704, 1280, 24
    c.sampler.shift = 5.0
    c.hybrid.lattice = "staggered_rows"
    c.distill.mode = "sampling"
    return c
