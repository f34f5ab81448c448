"""The error of hybrid attention against a target, and its gradients, by every implementation against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import EPSILON, gpu, hybrid_error, init_polynomial_map, linear_state, tpu, xla_loops
from pallas_kernels.tpu_problem import BlockSizes

BLOCKS = BlockSizes(state=128, backward_state=128)
IMPLEMENTATIONS = {
    "reference": functools.partial(hybrid_error, implementation="reference"),
    "xla": functools.partial(hybrid_error, implementation="xla"),
    "tpu": functools.partial(tpu.hybrid_error, block_sizes=BLOCKS, interpret=True),
}


def problem(queries, width, heads=2, batch=2):
    """(map, S and z, q, softmax branch, target) with numbers of the sizes that attention has."""
    rng = np.random.default_rng([queries, width])
    phi = init_polynomial_map(jax.random.key(0), heads, width)
    phi = jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), phi)
    features = 2 * width
    state = rng.normal(size=(batch, heads, features, width)), rng.uniform(0.1, 1, size=(batch, heads, features))
    q, output, target = rng.normal(size=(3, batch, queries, heads, width))
    mass = rng.uniform(1, 20, size=(batch, queries, heads))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (phi, state, q, (output, mass), target))


def in_float64(phi, state, q, softmax, target, valid):
    """The errors by the formula, and their gradients by differentiation, all in float64."""
    with jax.enable_x64(True):
        phi, state, q, softmax, target = jax.tree.map(
            lambda x: jnp.asarray(np.float64(x)), (phi, state, q, softmax, target)
        )

        def errors(phi, state):
            features = phi(q)
            o, n = jnp.einsum("bnhf,bhfd->bnhd", features, state[0]), jnp.einsum("bnhf,bhf->bnh", features, state[1])
            n_S, o_S = (softmax[1], softmax[0]) if softmax else (0.0, 0.0)
            total = n_S + n if softmax else n + EPSILON
            y = ((n_S[..., None] * o_S if softmax else 0.0) + o) / total[..., None]
            gap = jnp.abs(y - target) * (1 if valid is None else valid[..., None, None])
            return gap.sum(axis=(0, 1, 3)), n

        weighted = lambda phi, state: errors(phi, state)[0] @ jnp.arange(1.0, 1 + q.shape[2])
        return jax.tree.map(np.asarray, (errors(phi, state), jax.grad(weighted, argnums=(0, 1))(phi, state)))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("queries", "width", "masked", "linear"), [(131, 64, True, False), (300, 128, False, False), (77, 12, True, True)]
)
def test_errors_and_gradients_are_those_of_float64(name, queries, width, masked, linear, monkeypatch):
    monkeypatch.setattr(xla_loops, "TILE", 2**12)  # several chunks, the last one padded
    monkeypatch.setattr(xla_loops, "MIN_TOKENS", 32)
    phi, state, q, softmax, target = problem(queries, width)
    softmax = None if linear else softmax
    valid = jnp.asarray(np.random.default_rng(1).random((2, queries)) < 0.8) if masked else None
    (errors, n_L), gradients = in_float64(phi, state, q, softmax, target, valid)

    def weighted(phi, state):
        errors, n_L = IMPLEMENTATIONS[name](q, phi, state, softmax, target, query_valid=valid)
        return errors @ jnp.arange(1.0, 3.0), (errors, n_L)

    found_gradients, (found, found_mass) = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(phi, state)
    alone = IMPLEMENTATIONS[name](q, phi, state, softmax, target, query_valid=valid)
    np.testing.assert_allclose(alone[0], found, rtol=1e-6)
    np.testing.assert_allclose(found, errors, rtol=1e-5)
    np.testing.assert_allclose(found_mass, n_L, rtol=1e-5, atol=1e-5)
    cancelling = 1e-3 if linear else 0.0  # y does not change with log_scale but for EPSILON
    for leaf, expected in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(leaf - expected) <= 2e-5 * np.linalg.norm(expected) + cancelling
    if masked:  # control: the queries that are left out would be noticed
        assert np.abs(in_float64(phi, state, q, softmax, target, None)[0][0] / errors - 1).min() > 0.1


def test_the_state_of_a_suffix_needs_no_copy_and_no_gradients_of_tokens():
    """`start` is a cut; without `token_gradients`, the map's gradient is the same, and those of k and v are zero."""
    phi, _, k, _, v = problem(300, 64)
    valid = jnp.asarray(np.random.default_rng(1).random((2, 300)) < 0.8)
    cut = linear_state(k[:, 45:], v[:, 45:], phi, key_valid=valid[:, 45:])
    weights = jax.tree.map(lambda x: np.random.default_rng(2).normal(size=x.shape), cut)
    total = lambda state: sum(jnp.sum(x * w) for x, w in zip(state, weights, strict=True))
    expected = jax.grad(
        lambda k, v, phi: total(linear_state(k[:, 45:], v[:, 45:], phi, key_valid=valid[:, 45:])), argnums=(0, 1, 2)
    )(k, v, phi)
    on_tpu = functools.partial(tpu.linear_state, block_sizes=BLOCKS, interpret=True)
    on_gpu = functools.partial(gpu.linear_state, interpret=True)
    for state_of in (linear_state, on_tpu, on_gpu):
        for token_gradients in (True, False):
            options = {"start": 45, "key_valid": valid, "token_gradients": token_gradients}
            found = state_of(k, v, phi, **options)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3), found, cut)
            dk, dv, d_map = jax.grad(lambda *a, f=state_of, o=options: total(f(*a, **o)), argnums=(0, 1, 2))(k, v, phi)
            close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * np.abs(y).max())
            jax.tree.map(close, d_map, expected[2])
            if token_gradients:
                jax.tree.map(close, (dk, dv), expected[:2])
                assert not np.asarray(dk[:, :45]).any()
            else:
                assert not np.asarray(dk).any() and not np.asarray(dv).any()
