"""Wan2.1 1.3B at 320x480, 81 frames: 21 x 20 x 30 = 12,600 tokens. The paper's ablations.

    jsurgery surgery --config=wan_1_3b_lowres@v5e:4x4 --workdir=gs://bucket/run \\
        --config.model.path=/path/to/Wan2.1-T2V-1.3B-Diffusers --config.prompts=prompts.txt --config.data.path=latents/

Fine-tuning keeps 16 bytes per parameter (weights, gradients, two AdamW moments), 22.7 GB spread over `fsdp`, and 1.2 GB
of block inputs per example: by this count, 8 TPU v5e of 16 GB or one GPU of 80 GB. `TOPOLOGIES` has the meshes that
were compiled ahead of time, with batches that they divide. The paper's settings of sampling, distillation, planning and
fine-tuning (appendix A.1, section 4) are the defaults in `jsurgery.config.base()`.
"""

from jsurgery.config import base

# Distillation sees as many examples as in 10,000 steps with one example each.
BATCHES = {"trace.batch": 4, "distill.batch": 4, "distill.steps": 2500, "evaluate.batch": 4}
TOPOLOGIES = {"v5e:4x4": BATCHES | {"mesh.data": 4, "mesh.context": 4}}


def get_config():
    c = base()
    c.model.dtype = "bfloat16"
    c.model.remat = "blocks"
    c.video.frames, c.video.height, c.video.width, c.video.fps = 81, 320, 480, 16
    return c
