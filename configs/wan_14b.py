"""Wan2.1 14B at 480x832, 81 frames: 32,760 tokens, 40 blocks. The paper takes this model as a source of clips only.

    jsurgery surgery --config=wan_14b --workdir=gs://bucket/run --config.mesh.fsdp=32 \\
        --config.model.path=/path/to/Wan2.1-T2V-14B-Diffusers --config.prompts=prompts.txt --config.data.path=latents/

Fine-tuning keeps 229 GB of weights, gradients and AdamW moments, spread over `fsdp`, and 13.4 GB of block inputs per
example: 32 TPU v5p of 95 GB with 16 examples a batch, by that arithmetic. Half of the blocks become hybrids, as in the
1.3B of the paper.
"""

from jsurgery.config import base


def get_config():
    c = base()
    c.model.dtype = "bfloat16"
    c.model.remat = "blocks"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 81, 480, 832, 16
    c.plan.budget = "20R2"
    return c
