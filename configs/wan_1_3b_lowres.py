"""Wan2.1 1.3B at 320x480, 81 frames: 21 x 20 x 30 = 12,600 tokens. The paper's ablations.

    jsurgery surgery --config=wan_1_3b_lowres@v5e-8 --workdir=gs://bucket/run \\
        --config.model.path=/path/to/Wan2.1-T2V-1.3B-Diffusers --config.prompts=prompts.txt

Without `--config.data.path`, fine-tuning reads the clips at which the teacher's trajectories end. Every stage chooses
its mesh from the devices that are there. `TOPOLOGIES` has batches that suit machines by name: TPUs by compiling ahead
of time, GPUs by arithmetic alone. The paper's settings of sampling, distillation, planning and fine-tuning (appendix
A.1, section 4) are the defaults in `jsurgery.config.base()`.
"""

from jsurgery.config import base


def batches(size):
    """Distillation sees as many examples as in 10,000 steps with one example each."""
    batch = {"trace.batch": size, "distill.batch": size, "evaluate.batch": size}
    return batch | {"distill.steps": 10_000 // size, "checkpoint.keep": 1}


ONE = batches(1) | {"sampler.guidance_batched": False}
TOPOLOGIES = {
    "v5e-1": ONE,
    "v5e-8": batches(8),
    "v5e:4x4": batches(16),
    "v6e-8": batches(8),
    "h100": batches(1) | {"finetune.accumulate": 4},
    "8xh100": batches(8),
    "4090": ONE,
}


def get_config():
    c = base()
    c.model.dtype = "bfloat16"
    c.model.remat = "blocks"
    c.distill.error_steps = 100  # of 800
    c.checkpoint.minutes = 15.0
    c.video.frames, c.video.height, c.video.width, c.video.fps = 81, 320, 480, 16
    c.distill.mode = "sampling"
    return c
