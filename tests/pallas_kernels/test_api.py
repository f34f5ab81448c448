"""The public function: its choice of an implementation, its errors, and sharded arguments."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, attend_with_state, gpu, linear_state, log, softmax_zones, stock, tpu, xla
from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import init_hedgehog_map, init_polynomial_map
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


STATE = jax.ShapeDtypeStruct((1, 2, 128, 64), jnp.float32), jax.ShapeDtypeStruct((1, 2, 128), jnp.float32)


def shapes(dtype, width=64):
    """Of heads, and of a map for them."""
    phi = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), 2, width))
    return jax.ShapeDtypeStruct((1, 9, 2, width), dtype), phi


@pytest.mark.parametrize(
    ("platform", "whole", "dtype", "expected"),
    [
        ("cpu", True, "bfloat16", "xla"),
        ("tpu", True, "bfloat16", "tpu"),
        ("tpu", True, "float32", "tpu"),
        ("tpu", False, "bfloat16", "xla"),
        ("gpu", True, "bfloat16", "gpu"),
        ("gpu", True, "float16", "xla"),
        ("gpu", True, "float32", "xla"),
        ("gpu", False, "bfloat16", "xla"),
    ],
)
def test_implementation_of_states_and_zones(monkeypatch, platform, whole, dtype, expected):
    monkeypatch.setattr(api, "_place", lambda: (platform, whole))
    for module, kernels in ((gpu, ("_state", "_attend", "_zones")), (tpu, ("_state", "_read", "_zones"))):
        for kernel in kernels:
            monkeypatch.setattr(module, kernel, lambda *_, name=module.__name__: chosen.append(name))
    monkeypatch.setattr(tpu.Problem, "unpack", lambda self, y: y)
    for name in ("linear_state", "attend_with_state", "softmax_zones"):
        monkeypatch.setattr(xla, name, lambda *_, **options: chosen.append("pallas_kernels.xla"))
    chosen = []
    jax.eval_shape(lambda q, phi: linear_state(q, q, phi), *shapes(dtype))
    jax.eval_shape(lambda q, phi, *state: attend_with_state(q, q, q, phi, state), *shapes(dtype), *STATE)
    jax.eval_shape(lambda q, _: softmax_zones(q, q, q, (3, 9)), *shapes(dtype))
    assert chosen == [f"pallas_kernels.{expected}"] * 3


def test_the_log_says_once_why_no_kernel_takes_the_arguments(monkeypatch, caplog):
    place = lambda platform: monkeypatch.setattr(api, "_place", lambda: (platform, True))
    said = lambda: [record.message for record in caplog.records]
    log.once.cache_clear()
    (q, polynomial), (narrow, narrow_map) = shapes("bfloat16"), shapes("bfloat16", width=8)
    hedgehog = jax.eval_shape(lambda: init_hedgehog_map(2, 64))
    run = lambda function, *arguments, **options: jax.eval_shape(
        lambda *arguments: function(*arguments, **options), *arguments
    )

    place("cpu")
    run(linear_state, q, q, hedgehog)
    place("gpu")
    run(linear_state, q, q, polynomial)
    run(attend_with_state, q, q, q, polynomial, STATE)
    run(hybrid_attention, q, q, q, polynomial, polynomial, num_softmax=3)  # which "stock" refuses
    assert said() == []

    for _ in range(2):
        run(linear_state, q, q, hedgehog)
        run(attend_with_state, q, q, q, hedgehog, STATE)
        run(linear_state, narrow, narrow, narrow_map)
        run(hybrid_attention, q, q, q, hedgehog, hedgehog, num_softmax=3)
    place("tpu")
    run(linear_state, q, q, hedgehog)
    jax.eval_shape(jax.grad(lambda q: softmax_zones(q, q, q, (3, 9))[0].sum()), q)
    no_hedgehog = "is a HedgehogMap; the kernels compute PolynomialMap alone"
    assert said() == [
        f"'xla' in place of a kernel: {reason}"
        for reason in (
            f"implementation 'gpu': key_map {no_hedgehog}",
            f"implementation 'gpu': query_map {no_hedgehog}",
            "implementation 'gpu': the kernels take heads of 16, 32, 64, 128 channels, found 8",
            "implementation 'stock': stock attention returns no row maximum, which stabilizer 'max' of a hybrid needs; "
            f"take stabilizer 'lse' or another implementation; implementation 'gpu': query_map {no_hedgehog}",
            f"implementation 'tpu': key_map {no_hedgehog}",
            "implementation 'tpu': softmax_zones has no gradients; 'xla' has",
        )
    ]


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
