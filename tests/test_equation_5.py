"""Tests of `tests/equation_5.py`, with which other tests compare: full softmax, and two keys counted by hand."""

import math

import torch
from torch.nn import functional as F

from tests.equation_5 import equation_5, feature_map

TRUE, FALSE = torch.tensor([[True]]), torch.tensor([[False]])


def test_all_softmax_keys_give_softmax_attention():
    q, k, v = torch.randn(3, 2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attention = equation_5(q, k, v, None, None, TRUE.expand(1, 7), FALSE.expand(1, 7), stabilizer="lse")
    torch.testing.assert_close(attention.y, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(attention.softmax_share, torch.ones(2, 7, dtype=torch.float64))


def test_one_softmax_key_and_one_linear_key():
    """Width 1, phi(x) = 3 (2x, (2x)^2). The weights are e^0 = 1 for softmax and 9 (2 * 4 + 4 * 16) for linear."""
    double = lambda *numbers: torch.tensor(numbers, dtype=torch.float64)
    kernel, bias, scale = double(2, 2).reshape(1, 1, 2), double(0, 0)[None], double(math.log(3))
    phi = lambda x: feature_map(x, [kernel], [bias], scale, degree=2, activation="relu")
    q, k, v = (double(*numbers).reshape(1, -1, 1) for numbers in ([1], [7, 2], [10, 20]))
    in_S = torch.tensor([[True, False]])
    attention = equation_5(q, k, v, phi, phi, in_S, ~in_S)
    linear = 9 * (2 * 4 + 4 * 16)
    torch.testing.assert_close(attention.y.ravel(), double((10 + 20 * linear) / (1 + linear)))
    torch.testing.assert_close(attention.softmax_share.ravel(), double(1 / (1 + linear)))
    assert attention.c.item() == 7

    only_linear = equation_5(q, k, v, phi, phi, FALSE.expand(1, 2), TRUE.expand(1, 2))
    first = 9 * (2 * 14 + 4 * 14**2)
    expected = double((10 * first + 20 * linear) / (first + linear + 1e-6))
    torch.testing.assert_close(only_linear.y.ravel(), expected, rtol=1e-12, atol=0)
    masked = equation_5(q, k, v, phi, phi, in_S, ~in_S, key_valid=in_S[0])
    assert masked.y.item() == 10
