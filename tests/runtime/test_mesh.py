"""Meshes, the sharding rules of parameters, and the rows of a batch that a process reads."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import DoesNotFit
from jsurgery.runtime.mesh import AXES, PARAMETERS, global_batch, local_rows, make_mesh, parameter_shardings
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer


def test_a_mesh_of_too_many_devices_is_refused():
    with pytest.raises(DoesNotFit, match=r"data 64 x fsdp 1 x context 1 x tensor 1 = 64 devices, found"):
        make_mesh(ConfigDict({"data": 64, "fsdp": 1, "context": 1, "tensor": 1}))


def test_every_rule_shards_a_parameter_and_no_projection_is_replicated():
    config = WanConfig(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=128, num_layers=3, hybrid=HybridConfig(rates=(1, 2, 8)),
    )  # fmt: skip
    state = nnx.state(nnx.eval_shape(lambda: WanTransformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    mesh = AbstractMesh((1, 2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    used, replicated = set(), []
    for path, sharding in jax.tree_util.tree_leaves_with_path(parameter_shardings(mesh, state)):
        name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
        matching = [p for p, _ in PARAMETERS if re.search(p, name.removesuffix("/value"))]
        used.update(matching)
        if not matching:
            assert sharding.is_fully_replicated
            replicated.append(name)
        else:
            assert not sharding.is_fully_replicated, name
    assert used == {pattern for pattern, _ in PARAMETERS}
    assert not [name for name in replicated if "to_" in name and "kernel" in name]


def test_a_process_reads_the_rows_that_its_devices_hold():
    mesh = make_mesh(ConfigDict({"data": 1, "fsdp": 1, "context": 1, "tensor": 1}))
    rows = local_rows(mesh, 6)
    assert rows == list(range(6))
    placed = global_batch(mesh, rows, 6, {"x": np.arange(12.0).reshape(6, 2)})
    np.testing.assert_array_equal(placed["x"], np.arange(12.0).reshape(6, 2))
    with pytest.raises(DoesNotFit, match="data 2 x fsdp 2 divides, found 6 examples"):
        local_rows(AbstractMesh((2, 2, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4), 6)
