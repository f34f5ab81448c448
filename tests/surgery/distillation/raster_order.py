"""For tests of kinds in raster order: a batch of 5 x 6 tokens, and what the teacher's blocks compute from it."""

import jax
import numpy as np

from pallas_kernels.api import hybrid_attention

FRAMES, PER_FRAME = 5, 6


def random_batch():
    rng = np.random.default_rng(1)
    shapes = {"latents": (2, FRAMES, 4, 6, 3), "text": (2, 4, 6)}
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {"timestep": np.float32([900, 300])}


def activations_of(teacher, batch):
    """q, k, v [blocks, B, N, H, D] in the teacher, in raster order."""

    @jax.jit
    def run(batch):
        softmax = lambda q, k, v, _: (hybrid_attention(q, k, v, None, None, num_softmax=k.shape[1]), (q, k, v))
        return teacher.apply_blocks(batch["latents"], batch["timestep"], batch["text"], softmax, None, order=None)[1]

    return jax.device_get(run(batch))
