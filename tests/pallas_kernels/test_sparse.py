"""Sparse-linear attention against its formula in float64, in torch, over all pairs of tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels import xla_loops
from pallas_kernels.sparse import routing, sparse_linear_attention
from tests.pallas_kernels.kernel_tests import cosine, relative_error
from tests.pallas_kernels.test_xla import use_batched_form


def problem(queries, keys, width=6, heads=2, batch=2, dtype=np.float32):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(batch, queries, heads, width))
    k, v = rng.normal(size=(2, batch, keys, heads, width))
    k += rng.normal(size=width)  # a mean key, which routing takes away
    projection = rng.normal(size=(width, width)) / math.sqrt(width), rng.normal(size=width)
    return *(x.astype(dtype) for x in (q, k, v)), tuple(np.float32(x) for x in projection)


def true_routing(q, k, share, block_q, block_k):
    """The sets of key blocks, as bool [B, H, query blocks, key blocks], and each row's margin."""
    q, k = np.float64(q), np.float64(k)
    k = k - k.mean(axis=1, keepdims=True)
    blocks = [
        np.stack([x[:, i : i + size].mean(axis=1) for i in range(0, x.shape[1], size)], axis=1)
        for x, size in ((q, block_q), (k, block_k))
    ]
    scores = np.einsum("bihd,bjhd->bhij", *blocks)
    count = max(1, int(share * scores.shape[-1]))
    ordered = -np.sort(-scores, axis=-1)
    margins = (
        ordered[..., count - 1] - ordered[..., count]
        if count < ordered.shape[-1]
        else np.full_like(ordered[..., 0], np.inf)
    )
    return scores >= ordered[..., count - 1 : count], margins


def formula(q, k, v, projection, routed, block_q, block_k):
    """y for torch tensors [B, N, H, D]; `routed` as `true_routing` gives it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    of_query, of_key = torch.arange(q.shape[2]) // block_q, torch.arange(k.shape[2]) // block_k
    seen = torch.tensor(routed)[:, :, of_query][..., of_key]
    sparse = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf).softmax(-1) @ v
    phi_q, phi_k = q.softmax(-1), k.softmax(-1)
    linear = phi_q @ (phi_k.mT @ v) / (1e-5 + phi_q @ phi_k.sum(-2)[..., None])
    return (sparse + linear @ projection[0] + projection[1]).transpose(1, 2)


def true_values_and_gradients(arguments, routed, block_q, block_k):
    leaves, tree = jax.tree.flatten(arguments)
    leaves = [torch.tensor(np.float64(x), requires_grad=True) for x in leaves]
    y = formula(*jax.tree.unflatten(tree, leaves), routed, block_q, block_k)
    gradients = torch.autograd.grad(y, leaves, torch.tensor(np.float64(cosine(arguments[0]))))
    return y.detach().numpy(), jax.tree.unflatten(tree, [x.numpy() for x in gradients])


def values_and_gradients(arguments, **options):
    @jax.jit
    def run(arguments, cotangent):
        y, pullback = jax.vjp(lambda arguments: sparse_linear_attention(*arguments, **options), arguments)
        return y, pullback(cotangent)[0]

    return run(arguments, cosine(arguments[0]))


def errors(actual, expected):
    """Relative RMS errors of y and of every gradient."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return [relative_error(a, e) for a, e in pairs]


# (queries, keys, share, block_q, block_k): blocks that do not divide, one key block of many, all of them, a block that
# is longer than the tokens.
SHAPES = [(37, 37, 0.4, 8, 4), (29, 41, 0.05, 4, 8), (16, 24, 1.0, 8, 8), (13, 13, 0.5, 16, 5), (9, 30, 0.3, 4, 64)]


@pytest.fixture
def several_chunks(monkeypatch):
    monkeypatch.setattr(xla_loops, "TILE", 256)
    monkeypatch.setattr(xla_loops, "CACHE", 0)


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_formula(shape, implementation):
    queries, keys, share, *blocks = shape
    arguments = problem(queries, keys)
    routed, margins = true_routing(*arguments[:2], share, *blocks)
    assert margins.min() > 1e-5
    options = {"share": share, "block_q": blocks[0], "block_k": blocks[1], "implementation": implementation}
    actual = values_and_gradients(arguments, **options)
    assert max(errors(actual, true_values_and_gradients(arguments, routed, *blocks))) < 1e-5
    if share < 1:
        wrong, _ = true_routing(*arguments[:2], min(share + 0.35, 1.0), *blocks)
        if not np.array_equal(wrong, routed):
            found = errors(actual, true_values_and_gradients(arguments, wrong, *blocks))
            assert min(found[:4]) > 1e-2, "control: another top-k would be noticed"


@pytest.mark.usefixtures("several_chunks")
def test_the_batched_form_for_accelerators(monkeypatch):
    use_batched_form(monkeypatch)
    arguments, (_, _, share, *blocks) = problem(37, 37), SHAPES[0]
    routed, _ = true_routing(*arguments[:2], share, *blocks)
    actual = values_and_gradients(arguments, share=share, block_q=8, block_k=4, implementation="xla")
    assert max(errors(actual, true_values_and_gradients(arguments, routed, *blocks))) < 1e-5


@pytest.mark.parametrize(("tokens", "share"), [(700, 0.1), (613, 0.3), (64, 0.0)])
def test_routing(tokens, share):
    q, k, *_ = problem(tokens, tokens)
    lists = np.asarray(routing(q, k, share, 8, 4))
    routed, margins = true_routing(q, k, share, 8, 4)
    clear = margins > 1e-5
    assert clear.mean() > 0.99
    assert lists.dtype == np.int32 and (np.diff(lists) > 0).all()
    found = np.zeros(routed.shape, bool)
    np.put_along_axis(found, lists, True, axis=-1)
    assert np.array_equal(found[clear], routed[clear])
    assert lists.shape[-1] == max(1, int(share * -(-tokens // 4)))
    if share:
        without_mean = np.mean(true_routing(q, k + 10 * k, share, 8, 4)[0] == routed)
        assert without_mean == 1.0, "a mean key, like a larger scale, changes no row's order"


def test_an_untrained_projection_adds_nothing():
    q, k, v, (kernel, bias) = problem(24, 24)
    options = {"share": 0.5, "block_q": 8, "block_k": 8, "implementation": "xla"}
    y, gradients = values_and_gradients((q, k, v, (0 * kernel, 0 * bias)), **options)
    routed, _ = true_routing(q, k, 0.5, 8, 8)
    seen = np.repeat(np.repeat(routed, 8, axis=2), 8, axis=3)
    scores = np.einsum("bnhd,bmhd->bhnm", np.float64(q), k) / math.sqrt(q.shape[-1])
    weights = np.where(seen, np.exp(scores), 0)
    expected = np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(axis=-1, keepdims=True), v)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(gradients[3][0]).max() > 0.1, "but it learns"


def test_all_scores_are_never_in_memory():
    """Of 8192 tokens in blocks of 64, forward and backward: a tenth of a head's scores would be seen."""
    x = jax.ShapeDtypeStruct((1, 8192, 2, 16), jnp.float32)
    projection = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.float32)

    def largest(implementation):
        attend = functools.partial(
            sparse_linear_attention, share=0.1, block_q=64, block_k=64, implementation=implementation
        )
        gradients = jax.make_jaxpr(lambda *arguments: jax.vjp(attend, *arguments)[1](arguments[0]))
        sizes = [var.aval.size for var in every_variable(gradients(x, x, x, projection).jaxpr)]
        return max(sizes)

    assert largest("xla") < 8192 * 8192 // 10 < largest("reference")


def every_variable(jaxpr):
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from every_variable(inner)


def test_bad_arguments_are_named():
    q, k, v, projection = problem(9, 11)
    attend = functools.partial(sparse_linear_attention, share=0.5, block_q=4, block_k=4)
    for wrong, message in [
        (lambda: attend(q, k[..., :5], v, projection), r"k must be \[2, M, 2, 6\] .* found shape \(2, 11, 2, 5\)"),
        (lambda: attend(q, k, v[:, :9], projection), r"v must have k's shape .* found \(2, 9, 2, 6\)"),
        (lambda: attend(q, k, v, projection[::-1]), r"\[6, 6\] and \[6\], found \(6,\) and \(6, 6\)"),
        (lambda: attend(q, k, v, projection, share=1.5), r"share must lie in 0\.\.1, found 1\.5"),
        (lambda: attend(q, k, v, projection, block_k=0), "at least 1 token, found 4 and 0"),
        (lambda: attend(q, k, v, projection, implementation="stock"), "xla, reference, tpu, gpu, found 'stock'"),
        (lambda: routing(q[0], k, 0.5, 4, 4), r"q must be \[B, N, H, D\], found shape \(9, 2, 6\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()
