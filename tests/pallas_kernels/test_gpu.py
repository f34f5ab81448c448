"""The GPU kernels without a GPU: interpreted on small blocks, and lowered for CUDA at full size."""

import functools
import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu, gpu_forward
from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import init_hedgehog_map, init_polynomial_map
from tests.pallas_kernels.kernel_tests import BlockTests, GridTests, RefusalTests, assert_is_equation_5, grid, problem

BLOCKS = gpu.BlockSizes(query=16, key=16, backward=16)


def changed(**changes):
    """Arguments with two heads of width 16, except for `changes`."""
    names = ("q", "k", "v", "query_map", "key_map")
    arguments = dict(zip(names, problem(9, width=changes.pop("width", 16), heads=2), strict=True))
    return tuple((arguments | changes).values())


def in_small_blocks(*arguments, **options):
    return gpu.hybrid_attention(*arguments, block_sizes=BLOCKS, interpret=True, **options)


class TestGpu(GridTests):
    implementation, module = "gpu", gpu
    cases: ClassVar = {"test_values_and_every_gradient": grid(1)}


class TestRefusals(RefusalTests):
    implementation = "gpu"
    cases: ClassVar = {
        "test_what_the_kernels_do_not_take_is_named": (
            ("arguments", "message"),
            [
                (functools.partial(changed, width=8), "'gpu'.*128 channels, found 8"),
                (lambda: changed(query_map=init_hedgehog_map(2, 128)), "query_map is a HedgehogMap"),
                (lambda: changed(v=changed()[2].astype(np.float16)), "float32, float32, float16"),
            ],
        ),
    }


class TestSmallBlocks(BlockTests):
    """The state needs several chunks, too."""

    in_small_blocks = staticmethod(in_small_blocks)
    sizes: ClassVar = {"width": 16, "heads": 2, "batch": 2}
    cases: ClassVar = {
        "test_several_blocks": (
            ("num_tokens", "num_softmax", "stabilizer", "changes"),
            [
                (37, 0, "max", {"masked": True}),
                (37, 19, "max", {"masked": True}),
                (37, 19, "lse", {"masked": True}),
                (37, 37, "max", {"masked": True}),
                (21, 5, "max", {"batch": 1, "degree": 3, "layers": 1}),
                (21, 5, "max", {"batch": 1, "degree": 2, "layers": 3, "activation": "softplus"}),
            ],
        ),
    }

    @pytest.fixture(autouse=True)
    def several_chunks_of_the_state(self, monkeypatch):
        monkeypatch.setattr(gpu_forward, "STATE_CHUNK", 16)

    def some_valid(self, num_tokens, batch):
        """A mask without any key of the first block, so that a running maximum starts at -inf."""
        valid = np.random.default_rng(1).random((batch, num_tokens)) < 0.7
        valid[0, :16] = False
        valid[:, 17] = True
        return valid


def test_xla_computes_the_state_of_a_large_map(monkeypatch):
    monkeypatch.setattr(gpu_forward, "STATE_WEIGHTS", 1)
    monkeypatch.setattr(gpu_forward, "state_kernel", None)
    arguments, valid = problem(21, width=16, heads=2), np.arange(42).reshape(2, 21) % 5 != 3
    assert_is_equation_5(in_small_blocks, arguments, num_softmax=5, key_valid=valid)


def lowered(num_tokens, heads, width, num_softmax, gradients=True, implementation="gpu", **options):
    q = jax.ShapeDtypeStruct((1, num_tokens, heads, width), jnp.bfloat16)
    maps = jax.eval_shape(lambda: (init_polynomial_map(jax.random.key(0), heads, width),) * 2)

    def attend(arguments):
        return (
            hybrid_attention(*arguments, num_softmax=num_softmax, implementation=implementation, **options)
            .astype(jnp.float32)
            .sum()
        )

    step = jax.jit(jax.grad(attend) if gradients else attend)
    return step.trace((q, q, q, *maps)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("num_tokens", "heads", "width", "num_softmax", "stabilizer", "kernels"),
    [
        (75600, 40, 128, 9450, "max", ["state", "attention", "query_gradient", "key_gradient"]),
        (32760, 12, 128, 4095, "lse", ["state", "attention", "query_gradient", "key_gradient"]),
        (2049, 2, 64, 2049, "lse", ["attention", "query_gradient", "key_gradient"]),
        (63, 2, 64, 0, "max", ["state", "attention"]),
    ],
)
def test_lowers_for_cuda(num_tokens, heads, width, num_softmax, stabilizer, kernels):
    program = lowered(num_tokens, heads, width, num_softmax, stabilizer=stabilizer)
    assert program.count("xla.gpu.triton") == len(kernels)
    assert all(f"{name}_kernel" in program for name in kernels)


def test_program_for_cuda_has_no_arrays_of_scores_or_features():
    """Forward and backward. Kernels keep them on the chip, and XLA's part works in chunks."""
    num_tokens, heads, width, num_softmax = 8192, 2, 128, 1024

    def offenders(program):
        found = re.findall(r"tensor<((?:\d+x)+)(\w+)>", program)
        sizes = {(kind, math.prod(map(int, shape.rstrip("x").split("x")))) for shape, kind in found}
        features = num_tokens * heads * 2 * width
        scores = num_tokens * num_softmax
        return [(kind, size) for kind, size in sizes if size >= scores or (kind == "f32" and size >= features)]

    assert offenders(lowered(num_tokens, heads, width, num_softmax)) == []
    assert offenders(lowered(num_tokens, heads, width, num_softmax, implementation="reference"))
