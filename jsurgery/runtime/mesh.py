"""One mesh, four axes, and the one table that says which array dimension lies along which axis."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jsurgery.errors import DoesNotFit
from jsurgery.runtime import processes

AXES = ("data", "fsdp", "context", "tensor")

# Logical dimension -> mesh axes.
LOGICAL: dict[str | None, Any] = {
    "batch": ("data", "fsdp"),
    "sequence": "context",
    "heads": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    None: None,
}

# Parameter path -> logical dimensions, the trailing ones; anything else is replicated.
PARAMETERS = [
    (r"(to_q|to_k|to_v)/kernel$", ("embed", "heads")),
    (r"to_out/kernel$", ("heads", "embed")),
    (r"ffn_in/kernel$", ("embed", "mlp")),
    (r"ffn_out/kernel$", ("mlp", "embed")),
    # phi of every head, in a model and in distillation
    (r"kernels/\d+$", ("heads", None, None)),
    (r"biases/\d+$", ("heads", None)),
    (r"log_scale$", ("heads",)),
]


def make_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh`, of all processes' devices. Raises DoesNotFit when it asks for more than there are, of
    several processes for fewer (each must hold a part), or for axes that are not sides of a TPU's torus."""
    shape = tuple(config[axis] for axis in AXES)
    devices = jax.devices() if devices is None else devices
    wanted = math.prod(shape)
    hosts = len({device.process_index for device in devices})
    sizes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    if wanted > len(devices) or (hosts > 1 and wanted < len(devices)):
        held = f" in {hosts} processes; expected all of them" if hosts > 1 else ""
        found = f"found {len(devices)} ({devices[0].platform}){held}"
        raise DoesNotFit(f"config.mesh: {sizes} = {wanted} devices, {found}")
    try:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:wanted])
    except NotImplementedError:  # of a torus of TPUs
        raise DoesNotFit(f"config.mesh: {sizes}: expected axes that are whole sides of the topology") from None


def sharding(mesh: Mesh, *dimensions: str | None) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical names."""
    return NamedSharding(mesh, PartitionSpec(*(LOGICAL[dimension] for dimension in dimensions)))


def leaf_name(path: tuple) -> str:
    """The path of a leaf, like blocks/attn1/to_q/kernel."""
    name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    return name.removesuffix("/value")


def parameter_shardings(mesh: Mesh, state: Any) -> Any:
    """A sharding for every array of an NNX state (or anything shaped like one), by `PARAMETERS`."""

    def of(path: tuple, leaf: Any) -> NamedSharding:
        for pattern, dimensions in PARAMETERS:
            if re.search(pattern, leaf_name(path)):
                return sharding(mesh, *(None,) * (leaf.ndim - len(dimensions)), *dimensions)
        return sharding(mesh)

    return jax.tree_util.tree_map_with_path(of, state)


def put_state(mesh: Mesh, state: Any) -> Any:
    """A training state (parameters, optimiser moments, counters) placed as a step returns it: no second compile.

    Of several processes each brings all values, or its part of those that are spread already.
    """

    def put(leaf: jax.Array | np.ndarray, where: NamedSharding) -> jax.Array:
        if where.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, where)
        values = np.asarray(leaf)  # device_put would send them round, to see that all processes have the same
        return jax.make_array_from_callback(leaf.shape, where, lambda index: values[index])

    return jax.tree.map(put, state, parameter_shardings(mesh, state))


def to_host(tree: Any) -> Any:
    """Whole NumPy arrays in every process; all must ask."""

    def whole(leaf: Any) -> np.ndarray:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated
        return multihost_utils.process_allgather(leaf, tiled=True) if spread else np.asarray(leaf)

    return jax.tree.map(whole, tree)


def abstract_mesh(config: ConfigDict) -> AbstractMesh:
    """The mesh of `config.mesh` without devices: what can be checked anywhere."""
    return AbstractMesh(tuple(config[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """In how many pieces a batch lies on the mesh."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL["batch"])


def check_batch(mesh: Mesh | AbstractMesh, batch: int) -> None:
    """Raises DoesNotFit when the mesh does not divide a batch."""
    if batch % batch_shards(mesh):
        sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in LOGICAL["batch"])
        raise DoesNotFit(f"config.mesh: expected a batch that {sizes} divides, found {batch} examples")


def check_heads(mesh: Mesh | AbstractMesh, heads: int, exchange: str) -> None:
    """Raises DoesNotFit when the mesh, with this exchange between pieces of the sequence, does not divide the heads."""
    tensor, context = mesh.shape[LOGICAL["heads"]], mesh.shape[LOGICAL["sequence"]]
    parts, name = tensor, f"tensor {tensor}"
    if exchange == "all_to_all":
        parts, name = tensor * context, f"tensor {tensor} x context {context} (all_to_all)"
    if heads % parts:
        raise DoesNotFit(f"config.mesh: expected {name} to divide the {heads} heads of the model")


def local_rows(mesh: Mesh, batch: int) -> Sequence[int]:
    """Which of a batch's examples this process's devices hold, ascending."""
    check_batch(mesh, batch)
    slices = sharding(mesh, "batch").addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in slices])).tolist()


def global_batch(mesh: Mesh, rows: Sequence[int], batch: int, examples: Any) -> Any:
    """Global arrays [batch, ...] of which this process has the `rows` alone, in leaves [b, ...]."""

    def put(leaf: np.ndarray) -> jax.Array:
        held = lambda index: leaf[np.searchsorted(rows, np.arange(batch)[index[0]])]
        return jax.make_array_from_callback((batch, *leaf.shape[1:]), sharding(mesh, "batch"), held)

    return jax.tree.map(put, examples)


def shard_module(mesh: Mesh, module: nnx.Module) -> None:
    """Moves a module's parameters onto the mesh, in place."""
    state = nnx.state(module)
    nnx.update(module, put_state(mesh, state))


def gather_to_first_process(module: nnx.Module) -> None:
    """Brings parameters that are spread over several processes to process 0, in place; all must ask.

    Stacked parameters come row by row: no device ever holds more than a block's.
    """

    def whole(leaf: jax.Array) -> Any:
        if leaf.is_fully_addressable:
            return leaf
        rows = range(len(leaf)) if leaf.ndim > 2 else [slice(None)]
        values = np.empty(leaf.shape, leaf.dtype) if processes.is_first() else None
        for row in rows:
            found = to_host(leaf[row])
            if values is not None:
                values[row] = found
        return leaf if values is None else values

    nnx.update(module, jax.tree.map(whole, nnx.state(module)))
