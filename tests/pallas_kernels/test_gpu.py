"""The GPU kernels without a GPU: interpreted on small blocks, and lowered for CUDA at full size."""

import dataclasses
import functools
import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels import api, gpu, gpu_backward, gpu_forward, gpu_zones, log, sharded_self_attention
from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import init_hedgehog_map, init_polynomial_map
from tests import equation_5
from tests.conftest import FULL_GRID
from tests.pallas_kernels.kernel_tests import (
    BlockTests,
    GridTests,
    RefusalTests,
    assert_is_equation_5,
    assert_within,
    cosine,
    grid,
    problem,
    relative_error,
    values,
    values_and_gradients,
)

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


class SmallBlockTests(BlockTests):
    """The state needs several chunks, too."""

    sizes: ClassVar = {"width": 16, "heads": 2, "batch": 2}

    @pytest.fixture(autouse=True)
    def several_chunks_of_the_state(self, monkeypatch):
        monkeypatch.setattr(gpu_forward, "STATE_CHUNK", 16)

    def some_valid(self, num_tokens, batch):
        """A mask without any key of the first block, so that a running maximum starts at -inf."""
        valid = np.random.default_rng(1).random((batch, num_tokens)) < 0.7
        valid[0, :16] = False
        valid[:, 17] = True
        return valid


class TestSmallBlocks(SmallBlockTests):
    in_small_blocks = staticmethod(in_small_blocks)
    cases: ClassVar = {
        "test_several_blocks": (
            ("num_tokens", "num_softmax", "stabilizer", "changes"),
            [
                (37, 19, "lse", {"masked": True}),
                (37, 37, "max", {"masked": True}),
                (21, 5, "max", {"batch": 1, "degree": 3, "layers": 1}),
                (21, 5, "max", {"batch": 1, "degree": 2, "layers": 3, "activation": "softplus"}),
            ],
        ),
    }


def in_parts(q, k, v, query_map, key_map, *, num_softmax, key_valid=None, stabilizer="max", **common):
    """The linear keys in two parts, whose states are added, and the softmax keys by themselves."""
    middle = max(num_softmax, k.shape[1] - 7)
    cuts = slice(num_softmax), slice(num_softmax, middle), slice(middle, None)
    (k_S, v_S, valid_S), *linear = (jax.tree.map(lambda x, cut=cut: x[:, cut], (k, v, key_valid)) for cut in cuts)
    states = [gpu.linear_state(k, v, key_map, key_valid=valid, **common) for k, v, valid in linear]
    state = jax.tree.map(jnp.add, *states)
    options = {"key_valid": valid_S, "stabilizer": stabilizer, **common}
    return gpu.attend_with_state(q, k_S, v_S, query_map, state, **options)


class TestStates(SmallBlockTests):
    """`linear_state` and `attend_with_state`."""

    in_small_blocks = staticmethod(functools.partial(in_parts, block_sizes=BLOCKS, interpret=True))
    cases: ClassVar = {
        "test_several_blocks": (
            ("num_tokens", "num_softmax", "stabilizer", "changes"),
            [
                (37, 0, "max", {"masked": True}),
                (53, 19, "max", {"masked": True}),
            ],
        ),
    }

    def test_scores_of_40(self):
        """Where e^s squared is near float32's largest number; by a program of `test_several_blocks`."""
        q, k, *rest = problem(53, **self.sizes)
        q *= 40 / (np.abs(np.einsum("bnhd,bmhd->bhnm", q, k[:, :19])).max() / 4)
        options = {"num_softmax": 19, "key_valid": self.some_valid(53, batch=2), "stabilizer": "max"}
        actual = values_and_gradients(self.in_small_blocks, (q, k, *rest), cosine(q), **options)
        expected = equation_5.values_and_gradients((q, k, *rest), cosine(q), **options)
        assert_within(actual, expected, value=1e-5, gradient=2e-5)

    def test_thousands_of_keys(self, monkeypatch):
        """In the default blocks, and two chunks of the state."""
        monkeypatch.undo()
        assert gpu_forward.STATE_CHUNK == 2048
        q, k, v, *maps = problem(5003, width=64, heads=1, batch=1, dtype=jnp.bfloat16, activation="softplus")
        maps = [dataclasses.replace(phi, log_scale=phi.log_scale - 6.0) for phi in maps]  # for a share of both branches
        arguments, options = (q[:, :33], k, v, *maps), {"num_softmax": 1251, "stabilizer": "lse"}
        expected = equation_5.values(arguments, **options).y
        error = relative_error(values(functools.partial(in_parts, interpret=True), arguments, **options), expected)
        assert 1e-5 < error < 6e-3
        other = equation_5.values(arguments, **options | {"num_softmax": 1240}).y
        assert relative_error(other, expected) > 1.2e-2, "control: keys in the wrong branch would be noticed"

    def test_of_no_keys_is_zero(self):
        _, k, v, _, key_map = problem(9, width=16, heads=2)
        state, z = gpu.linear_state(k[:, :0], v[:, :0], key_map, interpret=True)
        assert state.shape == (2, 2, 32, 16) and z.shape == (2, 2, 32) and not state.any() and not z.any()

    def test_xla_computes_the_state_of_a_large_map(self, monkeypatch, caplog):
        monkeypatch.setattr(gpu_forward, "STATE_WEIGHTS", 1)
        monkeypatch.setattr(gpu_forward, "state_kernel", None)
        log.once.cache_clear()
        arguments, valid = problem(21, width=16, heads=2), np.arange(42).reshape(2, 21) % 5 != 3
        assert_is_equation_5(in_small_blocks, arguments, num_softmax=5, key_valid=valid)
        assert [record.message for record in caplog.records] == [
            "'xla' in place of a kernel: implementation 'gpu': that of the linear state holds 0 KiB of a feature map's "
            "weights, found 4 KiB per head and power"
        ]

    def test_what_the_kernels_do_not_take_is_named(self):
        q, k, v, query_map, key_map = changed()
        state, half = (jnp.zeros((2, 2, 32, 16)), jnp.zeros((2, 2, 32))), v.astype(np.float16)
        for refused, message in [
            (lambda: gpu.linear_state(k, v, init_hedgehog_map(2, 16)), "key_map is a HedgehogMap"),
            (lambda: gpu.linear_state(k, half, key_map), "k, v must be .* found float32, float16"),
            (lambda: gpu.linear_state(k[..., :8], v[..., :8], key_map), "128 channels, found 8"),
            (lambda: gpu.attend_with_state(q, k, v, init_hedgehog_map(2, 16), state), "query_map is a HedgehogMap"),
            (lambda: gpu.attend_with_state(q, k, half, query_map, state), "q, k, v must be .* float32, float16"),
            (lambda: gpu.softmax_zones(*(x.astype(np.float16) for x in (q, k, v)), (3, 9)), "found float16, float16"),
        ]:
            with pytest.raises(NotImplementedError, match=f"'gpu': .*{message}"):
                refused()

    def test_of_another_degree_is_refused(self):
        q, k, v, query_map, _ = problem(9, width=16, heads=2)
        state = jnp.zeros((2, 2, 48, 16)), jnp.zeros((2, 2, 48))
        message = r"query_map's 32 features.*found \[\(2, 2, 48, 16\), \(2, 2, 48\)\]"
        with pytest.raises(ValueError, match=message):
            gpu.attend_with_state(q, k, v, query_map, state, interpret=True)
        key_map = init_polynomial_map(jax.random.key(0), 2, 16, degree=3)
        with pytest.raises(ValueError, match="query_map's 32 features"):
            gpu.hybrid_attention(q, k, v, query_map, key_map, num_softmax=3, interpret=True)


if FULL_GRID:

    class TestStatesOfTheGrid(TestGpu):
        attend = staticmethod(functools.partial(in_parts, interpret=True))


by_gpu, by_reference = (functools.partial(hybrid_attention, implementation=name) for name in ("gpu", "reference"))


def lowered(num_tokens, heads, width, attend=by_gpu, **options):
    """The program of the gradients of `attend`, for CUDA."""
    q = jax.ShapeDtypeStruct((1, num_tokens, heads, width), jnp.bfloat16)
    maps = jax.eval_shape(lambda: (init_polynomial_map(jax.random.key(0), heads, width),) * 2)
    step = jax.jit(jax.grad(lambda arguments: attend(*arguments, **options).astype(jnp.float32).sum()))
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
    program = lowered(num_tokens, heads, width, num_softmax=num_softmax, stabilizer=stabilizer)
    assert program.count("xla.gpu.triton") == len(kernels)
    assert all(f"{name}_kernel" in program for name in kernels)


def test_tokens_over_a_context_axis_stay_in_the_kernels(monkeypatch):
    """Forward and backward of a device's part, with softmax keys gathered and states summed over the devices."""
    monkeypatch.setattr(api, "_place", lambda: ("gpu", True))
    mesh = AbstractMesh((1, 4, 1), ("data", "context", "tensor"), (AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, PartitionSpec("data", "context", "tensor"))
    program = lowered(32760, 12, 128, sharded_self_attention, sharding=sharding, num_softmax=1024)
    assert program.count("xla.gpu.triton") == 4 and "all_gather" in program and "all_reduce" in program
    assert all(f"{name}_kernel" in program for name in ("state", "attention", "query_gradient", "key_gradient"))


def every_kernel(q, k, v, valid, query_map, key_map, per_row):
    """The kernels in all forms: with one branch or both, and with and without what a backward needs."""
    options = gpu_forward.Options(300, True, gpu_forward.BLOCK_SIZES[q.dtype], interpret=False)
    state, (top,) = gpu_forward.summarize(options, k, v, valid, key_map), per_row[2:]
    for form in (options, options._replace(row_max=False), options._replace(num_softmax=0)):
        yield gpu_forward.attend(form, q, k, v, valid, query_map, state, residuals=True)
    yield gpu_forward.attend(options, q, k, v, valid, query_map, state, residuals=False)
    yield gpu_forward.attend(options, q, k, v, valid, None, None, residuals=True)
    for tops in (None, (top, per_row[0])):
        yield gpu_backward.softmax_backward(options, q, k, v, valid, q, *per_row[:2], tops)
    yield gpu_zones.softmax_zones(options._replace(num_softmax=501), (63, 126, 251, 501), q, k, v, valid)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_kernel_lowers_for_cuda(dtype, width, masked):
    """At odd sizes. The state kernel holds a map of 128 channels in float32 only if the map has one layer."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    q, k = shape((2, 777, 3, width)), shape((2, 501, 3, width))
    layers = 1 if (dtype, width) == ("float32", 128) else 2
    maps = jax.eval_shape(lambda: (init_polynomial_map(jax.random.key(0), 3, width, layers=layers),) * 2)
    valid = jax.ShapeDtypeStruct(k.shape[:2], bool) if masked else None
    per_row = [jax.ShapeDtypeStruct((2, 3, 777), kind) for kind in (jnp.float32, jnp.float32, jnp.int32)]
    step = jax.jit(lambda *arguments: list(every_kernel(*arguments)))
    program = step.trace(q, k, k, valid, *maps, per_row).lower(lowering_platforms=("cuda",)).as_text()
    counts = {"state": 1, "attention": 5, "query_gradient": 2, "key_gradient": 2, "zones": 1}
    calls = re.findall(r'name = "(\w+)_kernel"', program)
    assert {name: calls.count(name) for name in counts} == counts


def test_program_for_cuda_has_no_arrays_of_scores_or_features():
    """Forward and backward. Kernels keep them on the chip, and XLA's part works in chunks."""
    num_tokens, heads, width, num_softmax = 8192, 2, 128, 1024

    def offenders(program):
        found = re.findall(r"tensor<((?:\d+x)+)(\w+)>", program)
        sizes = {(kind, math.prod(map(int, shape.rstrip("x").split("x")))) for shape, kind in found}
        features = num_tokens * heads * 2 * width
        scores = num_tokens * num_softmax
        return [(kind, size) for kind, size in sizes if size >= scores or (kind == "f32" and size >= features)]

    assert offenders(lowered(num_tokens, heads, width, num_softmax=num_softmax)) == []
    assert offenders(lowered(num_tokens, heads, width, by_reference, num_softmax=num_softmax))
