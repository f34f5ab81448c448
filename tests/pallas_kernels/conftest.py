import pytest

pytest.register_assert_rewrite("tests.pallas_kernels.kernel_tests")
