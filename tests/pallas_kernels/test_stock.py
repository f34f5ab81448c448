"""Hybrid attention with JAX's own softmax attention, which supports only the stabilizer "lse"."""

from typing import ClassVar

from tests.pallas_kernels.kernel_tests import GridTests, grid


class TestStock(GridTests):
    implementation = "stock"
    cases: ClassVar = {"test_values_and_every_gradient": grid(3, only="lse")}
