"""The public function: its choice of an implementation, its errors, and sharded arguments."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, gpu, stock, tpu, xla
from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import init_polynomial_map
from tests.pallas_kernels.kernel_tests import problem


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
def test_platform_and_arguments_select_the_implementation(monkeypatch, platform, whole, dtype, stabilizer, expected):
    """The first that supports the arguments: stock kernels do not support "max", and ours do not support float16."""
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


def test_bad_arguments_raise_errors_with_their_sizes():
    q, k, v, query_map, key_map = problem(9)
    four_heads = init_polynomial_map(jax.random.key(0), 4, 5)
    for arguments, options, message in [
        ((q, k, v, query_map, key_map), {"num_softmax": 10}, r"0\.\.9.*found 10"),
        ((q, k, v, None, None), {"num_softmax": 3}, "6 of 9 keys"),
        ((q[0], k, v, None, None), {"num_softmax": 9}, r"\(9, 3, 5\)"),
        ((q, k[:, :, :2], v, None, None), {"num_softmax": 9}, r"\(2, 9, 2, 5\)"),
        ((q, k, v[:, :8], None, None), {"num_softmax": 9}, r"\(2, 8, 3, 5\)"),
        ((q, k, v, query_map, four_heads), {"num_softmax": 3}, r"key_map.*3 heads.*\(4, 5, 10\)"),
        ((q, k, v, None, None), {"num_softmax": 9, "key_valid": np.ones((2, 8), bool)}, r"\(2, 8\)"),
        ((q, k, v, None, None), {"num_softmax": 9, "stabilizer": "mean"}, "mean"),
        ((q, k, v, None, None), {"num_softmax": 9, "implementation": "npu"}, "stock, found 'npu'"),
    ]:
        with pytest.raises(ValueError, match=message):
            hybrid_attention(*arguments, **options)


def test_sharded_over_batch_and_heads_as_on_one_device(on_fake_devices):
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
        record = lambda x: places.append(api._place()) or x
        jax.jit(jax.shard_map(record, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")))(q)
        assert places == [("cpu", False), ("cpu", True)], places
    """
    on_fake_devices(textwrap.dedent(program))
