"""The reference implementation, which holds all scores in memory."""

import jax
import numpy as np
import pytest

from pallas_kernels.reference import softmax_share
from tests import equation_5
from tests.pallas_kernels.kernel_tests import AnyShapeTests, problem, some_valid


class TestReference(AnyShapeTests):
    implementation = "reference"


@pytest.mark.parametrize(("num_softmax", "stabilizer"), [(0, "max"), (7, "max"), (7, "lse"), (21, "lse")])
def test_softmax_share_is_that_of_equation_5(num_softmax, stabilizer):
    arguments = q, k, _, query_map, key_map = problem(21)
    options = {"num_softmax": num_softmax, "key_valid": some_valid(21, batch=2), "stabilizer": stabilizer}
    share = jax.jit(lambda *arrays: softmax_share(*arrays, **options))(q, k, query_map, key_map)
    np.testing.assert_allclose(share, equation_5.values(arguments, **options).softmax_share, atol=1e-5)
