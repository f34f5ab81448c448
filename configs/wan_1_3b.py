"""Wan2.1 1.3B at its own resolution, 480x832, 81 frames: 21 x 30 x 52 = 32,760 tokens. The paper's main results.

    jsurgery surgery --config=wan_1_3b@v6e:4x4 --workdir=gs://bucket/run \\
        --config.model.path=/path/to/Wan2.1-T2V-1.3B-Diffusers --config.prompts=prompts.txt --config.data.path=latents/

Beside the 22.7 GB of state (see wan_1_3b_lowres.py), an example's block inputs take 3.0 GB: by this count, 16 TPU v5e
of 16 GB or two GPUs of 80 GB. `TOPOLOGIES` has the meshes whose fine-tuning was compiled ahead of time, with batches
that they divide. The paper fine-tunes at this size on 22,000 clips made by Wan2.1 14B.
"""

from jsurgery.config import base

# Distillation sees as many examples as in 10,000 steps with one example each.
BATCHES = {"trace.batch": 16, "distill.batch": 16, "distill.steps": 625, "evaluate.batch": 16}
TOPOLOGIES = {
    "v6e:4x4": BATCHES | {"mesh.fsdp": 16},
    "v5e:16x16": BATCHES | {"mesh.fsdp": 16, "mesh.context": 16},
}


def get_config():
    c = base()
    c.model.dtype = "bfloat16"
    c.model.remat = "blocks"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 81, 480, 832, 16
    return c
