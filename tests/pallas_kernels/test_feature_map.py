import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.feature_map import ACTIVATIONS, init_hedgehog_map, init_polynomial_map
from tests import equation_5


def heads(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(
    ("degree", "layers", "millions"), [(2, 2, "1.186"), (3, 2, "2.369"), (4, 2, "3.944"), (6, 3, "15.363")]
)
def test_parameter_counts_are_those_of_table_7(degree, layers, millions):
    make = lambda key: init_polynomial_map(key, 12, 128, degree, layers)
    feature_map = jax.eval_shape(make, jax.random.key(0))
    count = sum(leaf.size for leaf in feature_map.kernels + feature_map.biases)
    assert f"{count / 1e6:.3f}" == millions


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("degree", "layers"), [(1, 1), (3, 2)])
def test_polynomial_map_is_equation_8(activation, degree, layers):
    num_heads, width = 3, 5
    x = 0.5 * heads((2, 7, num_heads, width))
    feature_map = init_polynomial_map(jax.random.key(1), num_heads, width, degree, layers, activation)
    feature_map = jax.tree.map(lambda leaf: leaf + 0.1 * heads(leaf.shape, 2).astype(np.float32), feature_map)

    expected = equation_5.features(feature_map, x)
    actual = jax.jit(feature_map)(jnp.float32(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    assert (np.asarray(actual) >= 0).all()


def test_initial_hedgehog_map_is_the_softmax_of_x_and_minus_x():
    x = heads((2, 5, 3, 7))
    features = np.asarray(init_hedgehog_map(3, 7)(jnp.float32(x)))
    exponentials = np.exp(np.concatenate([x, -x], axis=-1))
    np.testing.assert_allclose(features, exponentials / exponentials.sum(-1, keepdims=True), rtol=1e-5)


def test_elu1_is_one_plus_elu():
    x = heads((2, 5, 3, 7))
    features = np.asarray(ACTIVATIONS["elu1"](jnp.float32(x)))
    np.testing.assert_allclose(features, np.where(x > 0, x + 1, np.exp(x)), rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [lambda: init_polynomial_map(jax.random.key(0), 3, 4), lambda: init_hedgehog_map(3, 4)],
)
def test_stacked_maps_under_vmap(make):
    x = jnp.float32(heads((2, 5, 3, 4)))
    one = make()
    two = jax.tree.map(lambda leaf: leaf + 0.5, one)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, two)
    apply = lambda feature_map: feature_map(x)
    features = jax.jit(jax.vmap(apply))(stacked)
    expected = np.stack([jax.jit(apply)(one), jax.jit(apply)(two)])
    np.testing.assert_allclose(features, expected, rtol=1e-5)
    assert not np.allclose(features[0], features[1])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(one))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"degree": 0}, "degree.*0"), ({"layers": 0}, "layers.*0"), ({"activation": "gelu"}, "gelu")],
)
def test_bad_arguments_of_a_map_raise_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        init_polynomial_map(jax.random.key(0), 2, 4, **arguments)
