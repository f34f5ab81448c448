"""Wan2.1 1.3B at its own resolution, 480x832, 81 frames: 21 x 30 x 52 = 32,760 tokens. The paper's main results.

    jsurgery surgery --config=wan_1_3b --workdir=gs://bucket/run --config.mesh.fsdp=16 \\
        --config.model.path=/path/to/Wan2.1-T2V-1.3B-Diffusers --config.prompts=prompts.txt --config.data.path=latents/

Beside the 22.7 GB of state that wan_1_3b_lowres.py counts, an example's block inputs take 3.0 GB: 16 TPU v5e of 16 GB
or two GPUs of 80 GB, by that arithmetic. The paper fine-tunes here on 22,000 clips that Wan2.1 14B made.
"""

from jsurgery.config import base


def get_config():
    c = base()
    c.model.dtype = "bfloat16"
    c.model.remat = "blocks"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 81, 480, 832, 16
    return c
