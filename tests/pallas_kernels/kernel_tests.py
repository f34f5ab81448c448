"""Tests shared by the implementations of hybrid attention. They compare with eq. 5 in float64.

The test file of an implementation inherits the classes that apply to it and gives the cases. `GridTests` test a sample
of the grid of shapes, or all of it with FULL_GRID=1 in the environment.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import init_polynomial_map
from tests import equation_5
from tests.conftest import FULL_GRID

LENGTHS, RATES = (63, 500, 1000, 1024, 2049), (1, 2, 4, 8, "linear")
KINDS = tuple(itertools.product((64, 128), ("max", "lse"), ("float32", "bfloat16")))
# The fewest kinds in which every pair of width, stabilizer and dtype occurs.
PAIRS = ((64, "max", "float32"), (64, "lse", "bfloat16"), (128, "max", "bfloat16"), (128, "lse", "float32"))
LARGE = (200, 4, (64, "max", "float32"))  # the test of large scores shares the compiled program of this case
GRID_FIELDS = ("length", "rate", "width", "stabilizer", "dtype")


def grid(number: int, lengths=(63, 500, 1024, 1000), only: str | None = None) -> tuple[tuple[str, ...], list]:
    """Cases (N, R, D, stabilizer, dtype) for an implementation, of which `only` is the only stabilizer.

    A sample has every R and every pair of D, stabilizer and dtype. It depends on `number`, so that the samples of four
    implementations combine every R with each of these pairs.
    """
    if FULL_GRID:
        cases = itertools.product(LENGTHS, RATES, KINDS)
    else:
        others = [(lengths[(i + number) % 4], rate) for i, rate in enumerate((1, 2, 8, "linear"))]
        cases = [LARGE, *((*other, PAIRS[(i - number) % 4]) for i, other in enumerate(others))]
    cases = ((length, rate, width, only or name, dtype) for length, rate, (width, name, dtype) in cases)
    return GRID_FIELDS, list(dict.fromkeys(cases))


def problem(num_tokens, width=5, heads=3, batch=2, spread=1.0, dtype=jnp.float32, **phi):
    """q, k, v, query_map, key_map, with biases and scales that are not zero."""
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(3, batch, num_tokens, heads, width)).astype(np.float32)
    arrays[:2] *= spread
    kind = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), heads, width, **phi))
    # Rounded to bfloat16, since the dtype must not change which units of phi are active.
    draw = lambda x: np.float32(
        (rng.normal(size=x.shape) / np.sqrt(x.shape[-2] if x.ndim == 3 else 25)).astype(jnp.dtype(dtype))
    )
    return *arrays.astype(jnp.dtype(dtype)), *(jax.tree.map(draw, kind) for _ in range(2))


def grid_problem(length, rate, width, dtype):
    """(q, k, v, query_map, key_map), num_softmax. The activation is smooth, as bfloat16 would cross the kinks of relu.

    No query has two largest scores that are nearly equal: the gradient of "max" depends on which is larger, and kernels
    compute the scores twice, with different rounding errors.
    """
    num_softmax = 0 if rate == "linear" else -(-length // rate)
    for seed in itertools.count(length):
        rng = np.random.default_rng(seed)
        q, k, v = (jnp.asarray(x, dtype) for x in rng.normal(size=(3, 1, length, 2, width)))
        scores = np.einsum("bnhd,bmhd->bhnm", *(np.float64(x) for x in (q, k[:, :num_softmax]))) / math.sqrt(width)
        if num_softmax == 0 or np.diff(np.partition(scores, -2)[..., -2:]).min() > 1e-4:
            break
    kind = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), 2, width, activation="softplus"))
    # Scales at which both branches have a share of the attention.
    scale = -0.5 * math.log(2 * width * length)
    typical = lambda x: 0.1 if x.ndim < 3 else 1 / math.sqrt(x.shape[1])
    draw = lambda x: np.float32(typical(x) * rng.normal(size=x.shape) + scale * (x.ndim == 1))
    return (q, k, v, *(jax.tree.map(draw, kind) for _ in range(2))), num_softmax


def some_valid(num_tokens, batch):
    valid = np.random.default_rng(1).random((batch, num_tokens)) < 0.6
    valid[:, 0] = True
    return valid


@functools.partial(jax.jit, static_argnames=("attend", "num_softmax", "stabilizer"))
def values(attend, arguments, **options):
    return attend(*arguments, **options)


@functools.partial(jax.jit, static_argnames=("attend", "num_softmax", "stabilizer"))
def values_and_gradients(attend, arguments, cotangent, **options):
    y, pullback = jax.vjp(lambda arguments: attend(*arguments, **options), arguments)
    return y, pullback(cotangent.astype(y.dtype))[0]


def cosine(q):
    """The cosine of q in its dtype, as a cotangent. Needs no compiled program."""
    return np.cos(np.float32(q)).astype(q.dtype)


def relative_error(actual, expected):
    """Relative RMS error."""
    actual, expected = np.float64(actual), np.float64(expected)
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


def errors_of_arguments(actual, expected):
    """Relative RMS errors of y and of the gradients of q, k, v, phi_q, phi_k; None if the expected array is zero."""
    vectors = lambda tree: [np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(part)]) for part in tree]
    pairs = zip(vectors([actual[0], *actual[1]]), vectors([expected[0], *expected[1]]), strict=True)
    return [relative_error(a, e) if e.any() else None for a, e in pairs]


def errors_of_arrays(actual, expected):
    """Relative RMS error of y, and {name: error} of all gradients; absolute errors if the expected array is zero.

    The gradient of a map's log_scale is a sum whose terms cancel, entirely in pure linear attention. Its error is
    therefore relative to the gradient of the last bias, which sums the same terms.
    """
    (y, gradients), (true_y, true_gradients) = jax.tree.map(np.float64, (actual, expected))
    rms = lambda x: np.sqrt(np.mean(x**2))
    by_name, bias_size = {}, 0.0
    for (path, e), a in zip(jax.tree.leaves_with_path(true_gradients), jax.tree.leaves(gradients), strict=True):
        name = jax.tree_util.keystr(path)
        bias_size = np.linalg.norm(e) if "bias" in name else bias_size
        by_name[name] = rms(a - e) / (max(rms(e), bias_size if "log_scale" in name else 0.0) or 1.0)
    return rms(y - true_y) / rms(true_y), by_name


def assert_within(actual, expected, value, gradient):
    value_error, by_name = errors_of_arrays(actual, expected)
    assert value_error < value
    assert max(by_name.values()) < gradient, by_name


def assert_is_equation_5(attend, arguments, *, bfloat16_gradient=3e-2, **options):
    """Asserts that `attend` keeps the dtype, and that its values and gradients are those of eq. 5."""
    dtype, cotangent = arguments[0].dtype, cosine(arguments[0])
    actual = values_and_gradients(attend, arguments, cotangent, **options)
    assert [x.dtype for x in (actual[0], *actual[1][:3])] == [dtype] * 4
    expected = equation_5.values_and_gradients(arguments, cotangent, **options)
    if dtype == np.float32:
        assert_within(actual, expected, value=1e-5, gradient=1e-5)
    else:
        assert_within(actual, expected, value=6e-3, gradient=bfloat16_gradient)
        assert errors_of_arrays(actual, expected)[0] > 1e-5


class KernelTests:
    """Tests of one implementation. `cases` are the parameters of inherited tests: {test: (names, values)}."""

    implementation: ClassVar[str]
    cases: ClassVar[dict[str, tuple[Any, list]]] = {}

    def __init_subclass__(cls) -> None:
        if "implementation" in vars(cls):
            cls.attend = staticmethod(functools.partial(hybrid_attention, implementation=cls.implementation))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if metafunc.function.__name__ in self.cases:
            metafunc.parametrize(*self.cases[metafunc.function.__name__])


class GridTests(KernelTests):
    """All kinds of shapes, with the default block sizes."""

    module: ClassVar[Any] = None  # the module of Pallas kernels, which are interpreted

    @pytest.fixture(autouse=True)
    def interpret(self, monkeypatch):
        if self.module:
            interpreted = functools.partial(self.module.hybrid_attention, interpret=True)
            monkeypatch.setattr(self.module, "hybrid_attention", interpreted)

    def test_values_and_every_gradient(self, length, rate, width, stabilizer, dtype):
        arguments, num_softmax = grid_problem(length, rate, width, dtype)
        options = {"num_softmax": num_softmax, "stabilizer": stabilizer}
        cotangent = cosine(arguments[0])
        actual = values_and_gradients(self.attend, arguments, cotangent, **options)
        assert actual[0].dtype == dtype and [x.dtype for x in actual[1][:3]] == [dtype] * 3
        expected = equation_5.values_and_gradients(arguments, cotangent, **options)
        value, *gradients = errors_of_arguments(actual, expected)
        assert sum(error is None for error in gradients) == (2 if rate == 1 else 0)
        assert value < (1e-5 if dtype == "float32" else 6e-3)
        assert max(error for error in gradients if error is not None) < (1e-5 if dtype == "float32" else 2e-2)

    def test_scores_of_80_do_not_overflow(self):
        """exp(80) squared overflows float32; exp(80) has a relative error of 8e-6, the spacing of numbers near 80."""
        length, rate, (width, stabilizer, dtype) = LARGE
        (q, k, v, *maps), num_softmax = grid_problem(length, rate, width, dtype)
        q *= 80 * math.sqrt(width) / np.abs(np.einsum("bnhd,bmhd->bhnm", q, k)).max()
        arguments, cotangent = (q, k, v, *maps), cosine(q)
        options = {"num_softmax": num_softmax, "stabilizer": "lse" if self.implementation == "stock" else stabilizer}
        expected = equation_5.values_and_gradients(arguments, cotangent, **options)
        actual = values_and_gradients(self.attend, arguments, cotangent, **options)
        assert max(errors_of_arguments(actual, expected)) < 1e-4


class BlockTests(KernelTests):
    """Blocks so small that a few tokens need several blocks of each kind, the last of them partial."""

    in_small_blocks: ClassVar[Callable[..., jax.Array]]
    sizes: ClassVar[dict[str, int]]  # width, heads and batch, which a case may change
    bfloat16_gradient: ClassVar[float] = 3e-2  # bound on the relative error of gradients

    def some_valid(self, num_tokens, batch):
        return some_valid(num_tokens, batch)

    def test_several_blocks(self, num_tokens, num_softmax, stabilizer, changes):
        sizes = self.sizes | changes
        masked, maps = sizes.pop("masked", False), sizes.pop("maps", True)
        arguments = problem(num_tokens, **sizes)
        arguments = arguments if maps else (*arguments[:3], None, None)
        valid = self.some_valid(num_tokens, sizes["batch"]) if masked else None
        options = {"num_softmax": num_softmax, "stabilizer": stabilizer, "key_valid": valid}
        assert_is_equation_5(self.in_small_blocks, arguments, bfloat16_gradient=self.bfloat16_gradient, **options)


class TiedMaximumTests(BlockTests):
    tied: ClassVar[tuple[int, int]]  # the numbers of tokens and of softmax keys

    def test_tied_maxima_share_the_gradient(self):
        num_tokens, num_softmax = self.tied
        q, k, v, *maps = problem(num_tokens, **self.sizes | {"heads": 1})
        q, k = (np.round(8 * x) / 8 for x in (q, k))  # so that scores are exact in any order of summation
        k[:, 5] = k[:, 1]
        q = np.sign(k[:, 1:2]) * np.abs(q)
        assert_is_equation_5(self.in_small_blocks, (q, k, v, *maps), num_softmax=num_softmax)


class AnyShapeTests(KernelTests):
    """Tests of implementations that support heads of any width."""

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize(
        ("num_softmax", "stabilizer"), [(0, "max"), (1, "max"), (7, "max"), (7, "lse"), (21, "max")]
    )
    def test_values_are_those_of_equation_5(self, masked, num_softmax, stabilizer):
        arguments = problem(21, spread=2.0)
        key_valid = some_valid(21, batch=2) if masked else None
        options = {"num_softmax": num_softmax, "key_valid": key_valid, "stabilizer": stabilizer}
        expected = equation_5.values(arguments, **options).y
        assert relative_error(values(self.attend, arguments, **options), expected) < 1e-5

    @settings(derandomize=True, max_examples=4, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 9)),
        fraction=st.floats(0, 1),
        stabilizer=st.sampled_from(["max", "lse"]),
    )
    def test_values_at_any_shape(self, shape, fraction, stabilizer):
        batch, num_tokens, heads, width = shape
        arguments = problem(num_tokens, width, heads, batch)
        options = {"num_softmax": round(fraction * num_tokens), "stabilizer": stabilizer}
        expected = equation_5.values(arguments, **options).y
        np.testing.assert_allclose(values(self.attend, arguments, **options), expected, rtol=1e-3, atol=1e-4)

    def test_fewer_queries_than_keys(self):
        q, *rest = problem(21)
        expected = equation_5.values((q, *rest), 7).y
        assert relative_error(values(self.attend, (q[:, 3:8], *rest), num_softmax=7), expected[:, 3:8]) < 1e-5

    @pytest.mark.parametrize("stabilizer", ["max", "lse"])
    def test_gradients_pass_through_the_stabilizer(self, stabilizer):
        """Gradients equal finite differences of eq. 5, and differ from those with c held fixed, as by stop_gradient."""
        arguments = problem(13)
        q, *rest = jax.tree.map(np.float64, arguments)
        direction, cotangent = np.random.default_rng(3).normal(size=(2, *q.shape))
        fixed_c = equation_5.values(arguments, 5, stabilizer=stabilizer).c

        def slope(c):
            ahead, behind = (
                equation_5.values((q + step * direction, *rest), 5, stabilizer=stabilizer, c=c).y
                for step in (1e-6, -1e-6)
            )
            return ((ahead - behind) * cotangent).sum() / 2e-6

        options = {"num_softmax": 5, "stabilizer": stabilizer}
        _, (dq, *_) = values_and_gradients(self.attend, arguments, np.float32(cotangent), **options)
        actual = (np.float64(dq) * direction).sum()
        assert actual == pytest.approx(slope(None), rel=1e-4)
        assert abs(actual - slope(fixed_c)) > 1e-2 * abs(actual)

    def test_large_scores_stay_finite(self):
        """Scores of several thousands, where float32's exp overflows at 88."""
        arguments = problem(21, spread=60.0)
        y, gradients = values_and_gradients(self.attend, arguments, cosine(arguments[0]), num_softmax=7)
        assert relative_error(y, equation_5.values(arguments, 7).y) < 1e-3
        assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))


class RefusalTests(KernelTests):
    """Unsupported arguments raise an error that contains their shapes, types or sizes."""

    def test_what_the_kernels_do_not_take_is_named(self, arguments, message):
        with pytest.raises(NotImplementedError, match=message):
            self.attend(*arguments(), num_softmax=3)
