"""Values and gradients against eq. 5 in float64, and against its finite differences.

Every implementation also passes one test of all its gradients, in two dtypes, against eq. 5 in float64 torch: on a
sample of the grid of shapes, or with FULL_GRID=1 in the environment on all of it.
"""

import functools
import itertools
import math
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import api, gpu, stock, tpu, xla
from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import init_elu_map, init_hedgehog_map, init_polynomial_map
from pallas_kernels.reference import softmax_share
from tests import equation_5
from tests.conftest import FULL_GRID

IMPLEMENTATIONS = ("xla", "reference")
LENGTHS, RATES = (63, 500, 1000, 1024, 2049), (1, 2, 4, 8, "linear")
KINDS = tuple(itertools.product((64, 128), ("max", "lse"), ("float32", "bfloat16")))
# Of those kinds the fewest that have every pair; and a case whose compiled program serves a test of large scores too.
PAIRS = ((64, "max", "float32"), (64, "lse", "bfloat16"), (128, "max", "bfloat16"), (128, "lse", "float32"))
LARGE = (200, 4, (64, "max", "float32"))


def problem(num_tokens, batch=2, heads=3, width=5, spread=1.0):
    """q, k, v, query_map, key_map in float32."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, batch, num_tokens, heads, width)).astype(np.float32)
    shape = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), heads, width))
    # Neither biases nor scales are zero: that would hide an implementation that drops them.
    maps = [jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), shape) for _ in range(2)]
    return np.float32(spread) * q, np.float32(spread) * k, v, *maps


def some_valid(num_tokens, batch=2):
    valid = np.random.default_rng(1).random((batch, num_tokens)) < 0.6
    valid[:, 0] = True
    return valid


@functools.partial(jax.jit, static_argnames=("num_softmax", "stabilizer", "implementation"))
def attend(arguments, **options):
    return hybrid_attention(*arguments, **options)


@functools.partial(jax.jit, static_argnames=("num_softmax", "stabilizer", "implementation"))
def value_and_gradients(arguments, **options):
    """Those of y . cos(q)."""
    y, pullback = jax.vjp(lambda arguments: hybrid_attention(*arguments, **options), arguments)
    return y, pullback(jnp.cos(arguments[0]))[0]


def gradients(arguments, cotangent, **options):
    return jax.jit(jax.grad(lambda args: (hybrid_attention(*args, **options) * cotangent).sum()))(arguments)


def relative_error(actual, expected):
    actual, expected = np.float64(actual), np.float64(expected)
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


def assert_trees_close(actual, expected):
    for (path, e), a in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-3, atol=2e-4, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(params=["loop", "batched"])
def small_tiles(request, monkeypatch):
    """Several chunks of queries, the last one partial; in the CPU's loop, and in the batched form of accelerators."""
    monkeypatch.setattr(xla, "TILE", 1)
    monkeypatch.setattr(xla, "MIN_TOKENS", 8)
    if request.param == "batched":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_softmax", "stabilizer"), [(0, "max"), (1, "max"), (7, "max"), (7, "lse"), (21, "max")])
def test_values_are_those_of_equation_5(implementation, masked, num_softmax, stabilizer):
    arguments = problem(21, spread=2.0)
    options = {"num_softmax": num_softmax, "key_valid": some_valid(21) if masked else None, "stabilizer": stabilizer}
    expected = equation_5.values(arguments, **options).y
    assert relative_error(attend(arguments, **options, implementation=implementation), expected) < 1e-5


@pytest.mark.parametrize(("num_softmax", "stabilizer"), [(0, "max"), (7, "max"), (7, "lse"), (21, "lse")])
def test_softmax_share(num_softmax, stabilizer):
    arguments = q, k, _, query_map, key_map = problem(21)
    options = {"num_softmax": num_softmax, "key_valid": some_valid(21), "stabilizer": stabilizer}
    share = jax.jit(lambda *arrays: softmax_share(*arrays, **options))(q, k, query_map, key_map)
    np.testing.assert_allclose(share, equation_5.values(arguments, **options).softmax_share, atol=1e-5)


@settings(derandomize=True, max_examples=4, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 9)),
    fraction=st.floats(0, 1),
    stabilizer=st.sampled_from(["max", "lse"]),
)
def test_values_at_any_shape(shape, fraction, stabilizer):
    batch, num_tokens, heads, width = shape
    arguments = problem(num_tokens, batch, heads, width)
    options = {"num_softmax": round(fraction * num_tokens), "stabilizer": stabilizer}
    expected = equation_5.values(arguments, **options).y
    for implementation in IMPLEMENTATIONS:
        actual = attend(arguments, **options, implementation=implementation)
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fewer_queries_than_keys(implementation):
    q, *rest = problem(21)
    expected = equation_5.values((q, *rest), 7).y
    actual = attend((q[:, 3:8], *rest), num_softmax=7, implementation=implementation)
    assert relative_error(actual, expected[:, 3:8]) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("stabilizer", ["max", "lse"])
def test_gradients_pass_through_the_stabilizer(implementation, stabilizer):
    """Finite differences of eq. 5 agree; those with c held fixed, a stop_gradient, do not."""
    arguments = problem(13)
    q, *rest = jax.tree.map(np.float64, arguments)
    direction, cotangent = np.random.default_rng(3).normal(size=(2, *q.shape))
    fixed_c = equation_5.values(arguments, 5, stabilizer=stabilizer).c

    def slope(c):
        ahead, behind = (
            equation_5.values((q + step * direction, *rest), 5, stabilizer=stabilizer, c=c).y for step in (1e-6, -1e-6)
        )
        return ((ahead - behind) * cotangent).sum() / 2e-6

    options = {"num_softmax": 5, "stabilizer": stabilizer, "implementation": implementation}
    dq, *_ = gradients(arguments, np.float32(cotangent), **options)
    actual = (np.float64(dq) * direction).sum()
    assert actual == pytest.approx(slope(None), rel=1e-4)
    assert abs(actual - slope(fixed_c)) > 1e-2 * abs(actual)


@pytest.mark.parametrize(("num_softmax", "stabilizer"), [(0, "max"), (7, "max"), (7, "lse"), (21, "max")])
def test_chunks_and_masks_leave_values_and_gradients_alone(small_tiles, num_softmax, stabilizer):
    arguments = problem(21)
    options = {"num_softmax": num_softmax, "stabilizer": stabilizer, "key_valid": some_valid(21)}

    # Compiled anew: tiles are no argument.
    y, grads = jax.jit(functools.partial(value_and_gradients.__wrapped__, implementation="xla", **options))(arguments)
    expected, expected_grads = equation_5.values_and_gradients(arguments, np.cos(arguments[0]), **options)
    assert relative_error(y, expected) < 1e-5
    assert_trees_close(grads, expected_grads)


def test_gradient_of_a_tied_maximum_is_shared_out():
    q, k, v, *maps = problem(9)
    k[:, 1] = k[:, 0]
    arguments = (np.sign(k[:, :1]) * np.abs(q), k, v, *maps)
    actual, expected = (
        gradients(arguments, np.ones_like(q), num_softmax=2, implementation=name) for name in IMPLEMENTATIONS
    )
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("make", [init_hedgehog_map, lambda heads, width: init_elu_map(heads)])
def test_other_feature_maps(make):
    q, k, v, _, _ = problem(21)
    actual, expected = (
        gradients((q, k, v, make(3, 5), make(3, 5)), np.cos(q), num_softmax=7, implementation=name)
        for name in IMPLEMENTATIONS
    )
    assert_trees_close(actual, expected)


def test_full_softmax_is_stock_attention():
    q, k, v, _, _ = problem(33, width=16)

    @functools.partial(jax.jit, static_argnums=0)
    def of_both(attention, q, k, v):
        y, pullback = jax.vjp(attention, q, k, v)
        return y, pullback(jnp.cos(y))

    actual = of_both(lambda q, k, v: hybrid_attention(q, k, v, None, None, num_softmax=33), q, k, v)
    expected = of_both(jax.nn.dot_product_attention, q, k, v)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=3e-6), actual, expected)


def test_bfloat16(small_tiles):
    q, k, v, *maps = problem(21)
    expected = equation_5.values((q, k, v, *maps), 7).y

    def loss(arrays, maps):
        y = hybrid_attention(*arrays, *maps, num_softmax=7)
        return y.astype(jnp.float32).sum(), y

    arrays = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))
    grads, actual = jax.jit(jax.grad(loss, has_aux=True))(arrays, maps)
    assert [x.dtype for x in (actual, *grads)] == [jnp.bfloat16] * 4
    assert relative_error(actual, expected) < 0.03


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_stay_finite(implementation):
    """Scores of several thousands, where float32's exp overflows at 88."""
    arguments = problem(21, spread=60.0)
    expected = equation_5.values(arguments, 7).y
    y, grads = value_and_gradients(arguments, num_softmax=7, implementation=implementation)
    assert relative_error(y, expected) < 1e-3
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_maps_stacked_over_rates_vmap():
    *arrays, query_map, key_map = problem(21)
    loss = jax.value_and_grad(lambda maps: jnp.cos(hybrid_attention(*arrays, *maps, num_softmax=7)).sum())
    pair = [(query_map, key_map), jax.tree.map(lambda x: x + np.float32(0.2), (query_map, key_map))]
    stacked = jax.jit(jax.vmap(loss))(jax.tree.map(lambda *x: np.stack(x), *pair))
    one = jax.jit(loss)
    assert_trees_close(stacked, jax.tree.map(lambda *x: np.stack(x), *map(one, pair)))


def cases():
    """(implementation, N, R, D, stabilizer, dtype): all, or a sample.

    Of each implementation it has every R, and every pair of D, stabilizer and dtype; over all four, every R with each.
    """
    for number, name in enumerate(("xla", "gpu", "tpu", "stock")):
        if FULL_GRID:
            grid = itertools.product(LENGTHS, RATES, KINDS)
        else:
            lengths = (63, 500, 2049 if name == "xla" else 1024, 1000)
            others = [(lengths[(i + number) % 4], rate) for i, rate in enumerate((1, 2, 8, "linear"))]
            grid = [LARGE, *((*other, PAIRS[(i - number) % 4]) for i, other in enumerate(others))]
        for length, rate, (width, stabilizer, dtype) in grid:
            yield name, length, rate, width, "lse" if name == "stock" else stabilizer, dtype


def grid_problem(length, rate, width, dtype):
    """q, k, v, query_map, key_map and num_softmax. A smooth activation: bfloat16 would cross the kinks of relu.

    No query has two largest scores that a kernel, which computes them twice, could take for equal: the gradient of
    "max" depends on which is larger.
    """
    num_softmax = 0 if rate == "linear" else -(-length // rate)
    for seed in itertools.count(length):
        rng = np.random.default_rng(seed)
        q, k, v = (jnp.asarray(x, dtype) for x in rng.normal(size=(3, 1, length, 2, width)))
        scores = np.einsum("bnhd,bmhd->bhnm", *(np.float64(x) for x in (q, k[:, :num_softmax]))) / math.sqrt(width)
        if num_softmax == 0 or np.diff(np.partition(scores, -2)[..., -2:]).min() > 1e-4:
            break
    kind = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), 2, width, activation="softplus"))
    # Scales at which neither branch drowns the other.
    scale = -0.5 * math.log(2 * width * length)
    typical = lambda x: 0.1 if x.ndim < 3 else 1 / math.sqrt(x.shape[1])
    draw = lambda x: np.float32(typical(x) * rng.normal(size=x.shape) + scale * (x.ndim == 1))
    return (q, k, v, *(jax.tree.map(draw, kind) for _ in range(2))), num_softmax


@pytest.fixture
def interpreted(monkeypatch):
    for module in (gpu, tpu):
        monkeypatch.setattr(module, "hybrid_attention", functools.partial(module.hybrid_attention, interpret=True))


def errors(actual, expected):
    """Relative RMS of y and of the gradients of q, k, v, phi_q and phi_k; None where the truth is zero."""
    vectors = lambda tree: [np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(part)]) for part in tree]
    pairs = zip(vectors([actual[0], *actual[1]]), vectors([expected[0], *expected[1]]), strict=True)
    return [relative_error(a, e) if e.any() else None for a, e in pairs]


@pytest.mark.parametrize(("implementation", "length", "rate", "width", "stabilizer", "dtype"), [*cases()])
def test_values_and_every_gradient(interpreted, implementation, length, rate, width, stabilizer, dtype):
    arguments, num_softmax = grid_problem(length, rate, width, dtype)
    options = {"num_softmax": num_softmax, "stabilizer": stabilizer}
    expected = equation_5.values_and_gradients(arguments, jnp.cos(arguments[0]), **options)
    actual = value_and_gradients(arguments, **options, implementation=implementation)
    assert actual[0].dtype == dtype and [x.dtype for x in actual[1][:3]] == [dtype] * 3
    value, *gradients = errors(actual, expected)
    assert sum(error is None for error in gradients) == (2 if rate == 1 else 0)
    assert value < (1e-5 if dtype == "float32" else 6e-3)
    assert max(error for error in gradients if error is not None) < (1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("implementation", ["xla", "gpu", "tpu", "stock"])
def test_scores_of_80_overflow_nothing(interpreted, implementation):
    """exp(80) squared is beyond float32; an error of one in the last place of such a score is one of 8e-6 in exp."""
    length, rate, (width, stabilizer, dtype) = LARGE
    (q, k, v, *maps), num_softmax = grid_problem(length, rate, width, dtype)
    q *= 80 * math.sqrt(width) / np.abs(np.einsum("bnhd,bmhd->bhnm", q, k)).max()
    arguments = (q, k, v, *maps)
    options = {"num_softmax": num_softmax, "stabilizer": "lse" if implementation == "stock" else stabilizer}
    expected = equation_5.values_and_gradients(arguments, jnp.cos(q), **options)
    found = errors(value_and_gradients(arguments, **options, implementation=implementation), expected)
    assert max(found) < 1e-4


def arrays_in(program):
    """(type, number of elements) of every array in the text of an HLO module."""
    return {
        (kind, math.prod(map(int, shape.split(",")))) for kind, shape in re.findall(r"\b(\w+)\[([\d,]+)\]", program)
    }


@pytest.mark.parametrize("form", ["loop", "batched"])
def test_neither_scores_nor_features_are_in_memory(form, monkeypatch):
    """Of value and gradients, compiled: nothing of N x N/R elements, nor float32 of [N, H, P*D]; memory linear in N."""
    if form == "batched":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))

    def compiled(num_tokens, implementation):
        q = jax.ShapeDtypeStruct((1, num_tokens, 2, 128), jnp.float32)
        maps = jax.eval_shape(lambda: (init_polynomial_map(jax.random.key(0), 2, 128),) * 2)
        options = {"num_softmax": num_tokens // 8, "implementation": implementation}
        step = jax.value_and_grad(lambda arguments: hybrid_attention(*arguments, **options).sum())
        return jax.jit(step).trace((q, q, q, *maps)).lower().compile()

    def offenders(program, num_tokens):
        scores, features = num_tokens * num_tokens // 8, num_tokens * 2 * 2 * 128
        found = arrays_in(program.as_text())
        return [(kind, size) for kind, size in found if size >= scores or (kind == "f32" and size >= features)]

    short, long = (compiled(num_tokens, "xla") for num_tokens in (8192, 16384))
    assert offenders(long, 16384) == []
    assert long.memory_analysis().temp_size_in_bytes < 2.2 * short.memory_analysis().temp_size_in_bytes
    if form == "loop":
        found = offenders(compiled(8192, "reference"), 8192)
        assert {("f32", 8192 * 1024 * 2), ("f32", 8192 * 2 * 2 * 128)} <= set(found)


def test_lowers_for_accelerators():
    """Nothing but plain XLA: neither the CPU's loop over heads nor a call back to the host."""
    step = jax.jit(jax.grad(lambda args: hybrid_attention(*args, num_softmax=6).sum())).trace(problem(24))
    for platform in ("tpu", "cuda"):
        module = step.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.dot_general" in module
        assert "stablehlo.while" not in module
        assert "custom_call" not in module


def test_sharded_over_batch_and_heads(on_fake_devices):
    program = """
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from pallas_kernels import api, hybrid_attention, init_polynomial_map

        q = jax.random.normal(jax.random.key(0), (4, 18, 2, 4))
        maps = init_polynomial_map(jax.random.key(1), 2, 4), init_polynomial_map(jax.random.key(2), 2, 4)
        step = jax.jit(jax.value_and_grad(lambda q, maps: (hybrid_attention(q, q, q, *maps, num_softmax=5) ** 2).sum()))
        expected = step(q, maps)
        axis_types = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types, devices=jax.devices()[:4])
        q = jax.device_put(q, NamedSharding(mesh, PartitionSpec("data", None, "tensor")))
        maps = jax.device_put(maps, NamedSharding(mesh, PartitionSpec("tensor")))
        actual = step(q, maps)
        assert len(actual[1].sharding.device_set) == 4
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-4), actual, expected)

        # XLA cannot partition a kernel, but inside a shard_map there is nothing to partition.
        places = [api._place()]
        see = lambda x: places.append(api._place()) or x
        jax.jit(jax.shard_map(see, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")))(q)
        assert places == [("cpu", False), ("cpu", True)], places
    """
    on_fake_devices(textwrap.dedent(program))


@pytest.mark.parametrize(
    ("platform", "whole", "dtype", "stabilizer", "expected"),
    [
        ("cpu", True, "bfloat16", "lse", "xla"),
        ("tpu", True, "bfloat16", "max", "tpu"),
        ("tpu", True, "float32", "lse", "tpu"),
        ("tpu", False, "bfloat16", "lse", "xla"),
        ("gpu", True, "bfloat16", "lse", "stock"),
        ("gpu", True, "bfloat16", "max", "gpu"),
        ("gpu", True, "float16", "max", "xla"),
        ("gpu", True, "float32", "lse", "xla"),
        ("gpu", False, "bfloat16", "lse", "xla"),
    ],
)
def test_platforms_choose(monkeypatch, platform, whole, dtype, stabilizer, expected):
    """The first that takes the arguments: stock kernels know no "max", ours no float16."""
    arrays = jax.eval_shape(lambda: tuple(jnp.zeros((1, 9, 2, 64), dtype) for _ in range(3)))
    maps = jax.eval_shape(lambda: (init_polynomial_map(jax.random.key(0), 2, 64),) * 2)
    monkeypatch.setattr(api, "_place", lambda: (platform, whole))
    monkeypatch.setattr(stock, "_softmax", lambda *arrays: chosen.append("stock") or arrays[0])
    monkeypatch.setattr(gpu, "_attend", lambda *arguments: chosen.append("gpu"))
    for module, name in ((tpu, "tpu"), (xla, "xla")):
        monkeypatch.setattr(module, "hybrid_attention", lambda *_, name=name, **options: chosen.append(name))
    chosen = []
    jax.eval_shape(lambda *arrays: hybrid_attention(*arrays, num_softmax=3, stabilizer=stabilizer), *arrays, *maps)
    assert chosen == [expected]


def test_bad_arguments_are_refused_with_their_numbers():
    q, k, v, query_map, key_map = problem(9)
    four_heads = init_elu_map(4)
    for arguments, options, message in [
        ((q, k, v, query_map, key_map), {"num_softmax": 10}, r"0\.\.9.*found 10"),
        ((q, k, v, None, None), {"num_softmax": 3}, "6 of 9 keys"),
        ((q[0], k, v, None, None), {"num_softmax": 9}, r"\(9, 3, 5\)"),
        ((q, k[:, :, :2], v, None, None), {"num_softmax": 9}, r"\(2, 9, 2, 5\)"),
        ((q, k, v[:, :8], None, None), {"num_softmax": 9}, r"\(2, 8, 3, 5\)"),
        ((q, k, v, query_map, four_heads), {"num_softmax": 3}, r"key_map.*3 heads.*\(4,\)"),
        ((q, k, v, None, None), {"num_softmax": 9, "key_valid": np.ones((2, 8), bool)}, r"\(2, 8\)"),
        ((q, k, v, None, None), {"num_softmax": 9, "stabilizer": "mean"}, "mean"),
        ((q, k, v, None, None), {"num_softmax": 9, "implementation": "npu"}, "stock, found 'npu'"),
    ]:
        with pytest.raises(ValueError, match=message):
            hybrid_attention(*arguments, **options)
