"""The GPU's kernels where there is no GPU: interpreted on small blocks, and lowered for CUDA at full size."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import init_elu_map, init_polynomial_map
from tests import equation_5

BLOCKS = gpu.BlockSizes(query=16, key=16, backward=16)


def problem(num_tokens, width=16, batch=2, heads=2, **phi):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, batch, num_tokens, heads, width)).astype(np.float32)
    kind = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), heads, width, **phi))
    draw = lambda x: np.float32(rng.normal(size=x.shape) * (0.1 if x.ndim < 3 else 1 / np.sqrt(x.shape[1])))
    return q, k, v, *(jax.tree.map(draw, kind) for _ in range(2))


def assert_is_equation_5(arguments, **options):
    attend = functools.partial(gpu.hybrid_attention, block_sizes=BLOCKS, interpret=True, **options)

    @jax.jit
    def value_and_gradients(arguments):
        y, pullback = jax.vjp(lambda arguments: attend(*arguments), arguments)
        return y, pullback(jnp.cos(arguments[0]))[0]

    actual, expected = (
        value_and_gradients(arguments),
        equation_5.values_and_gradients(arguments, np.cos(arguments[0]), **options),
    )
    for (path, e), a in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-3, atol=2e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("num_softmax", "stabilizer"), [(0, "max"), (19, "max"), (19, "lse"), (37, "max")])
def test_padding_keys_are_ignored(num_softmax, stabilizer, monkeypatch):
    """Among them all of the first block, so that a maximum begins with nothing; and several chunks of the state."""
    monkeypatch.setattr(gpu, "STATE_CHUNK", 16)
    valid = np.random.default_rng(1).random((2, 37)) < 0.7
    valid[0, :16] = False
    valid[:, 17] = True
    assert_is_equation_5(problem(37), num_softmax=num_softmax, stabilizer=stabilizer, key_valid=valid)


@pytest.mark.parametrize("phi", [{"degree": 3, "layers": 1}, {"degree": 2, "layers": 3, "activation": "softplus"}])
def test_other_polynomials(phi):
    assert_is_equation_5(problem(21, batch=1, **phi), num_softmax=5)


def test_a_large_map_leaves_its_state_to_xla(monkeypatch):
    monkeypatch.setattr(gpu, "STATE_WEIGHTS", 1)
    monkeypatch.setattr(gpu, "_state_kernel", None)
    assert_is_equation_5(problem(21), num_softmax=5, key_valid=np.arange(42).reshape(2, 21) % 5 != 3)


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


def test_neither_scores_nor_features_are_arrays():
    """Of the program for CUDA, forward and backward: the kernels hide what they hold, and the rest is chunked."""
    num_tokens, heads, width, num_softmax = 8192, 2, 128, 1024

    def offenders(program):
        found = re.findall(r"tensor<((?:\d+x)+)(\w+)>", program)
        sizes = {(kind, math.prod(map(int, shape.rstrip("x").split("x")))) for shape, kind in found}
        features = num_tokens * heads * 2 * width
        scores = num_tokens * num_softmax
        return [(kind, size) for kind, size in sizes if size >= scores or (kind == "f32" and size >= features)]

    assert offenders(lowered(num_tokens, heads, width, num_softmax)) == []
    assert offenders(lowered(num_tokens, heads, width, num_softmax, implementation="reference"))


def test_what_the_kernels_do_not_take_is_named():
    q, k, v, *maps = problem(9)
    narrow = problem(9, width=8)
    for arguments, message in [
        (narrow, "'gpu'.*128 channels, found 8"),
        ((q, k, v, init_elu_map(2), maps[1]), "query_map is a EluMap"),
        ((q, k, v.astype(np.float16), *maps), "float32, float32, float16"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            hybrid_attention(*arguments, num_softmax=3, implementation="gpu")
