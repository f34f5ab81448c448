"""Wan2.1 14B at 480x832, 81 frames: 32,760 tokens, 40 blocks. The paper only makes clips with this model.

    jsurgery surgery --config=wan_14b@v5p:8x8x8 --workdir=gs://bucket/run \\
        --config.model.path=/path/to/Wan2.1-T2V-14B-Diffusers --config.prompts=prompts.txt --config.data.path=latents/

Fine-tuning keeps 229 GB of weights, gradients and AdamW moments, spread over `fsdp`, and 13.4 GB of block inputs per
example: by this count, 32 TPU v5p of 95 GB with 16 examples per batch. Half of the blocks become hybrid, as in the
paper's 1.3B. Of `TOPOLOGIES`, the eight v6e are for sampling and synthesis; the v5p also fine-tune, up to 720p.
"""

from jsurgery.config import base

# Distillation sees as many examples as in 10,000 steps with one example each.
BATCHES = {"trace.batch": 16, "distill.batch": 16, "distill.steps": 625, "evaluate.batch": 16, "checkpoint.keep": 1}
TOPOLOGIES = {
    "v6e-8": {"evaluate.batch": 1},
    "v5p:8x8x8": BATCHES | {"mesh.fsdp": 8, "mesh.context": 8, "mesh.tensor": 8},
}


def get_config():
    c = base()
    c.model.dtype = "bfloat16"
    c.model.remat = "blocks"
    c.distill.error_steps = 100  # of 800
    c.checkpoint.minutes = 15.0
    c.video.frames, c.video.height, c.video.width, c.video.fps = 81, 480, 832, 16
    c.plan.budget = "20R2"
    c.distill.mode = "sampling"
    return c
