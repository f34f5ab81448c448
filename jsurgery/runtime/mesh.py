"""The device mesh with its four axes, and the one table that maps array dimensions to axes."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jsurgery.attention.kinds.registry import kind_of
from jsurgery.errors import DoesNotFit
from jsurgery.rates import Rate
from jsurgery.runtime import processes

AXES = ("data", "fsdp", "context", "tensor")

# Logical dimension -> mesh axes.
LOGICAL: dict[str | None, Any] = {
    "batch": ("data", "fsdp"),
    "sequence": "context",
    "heads": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "features": "fsdp",
    None: None,
}

# Parameter path -> the logical names of its trailing dimensions. All other dimensions and parameters are replicated,
# and so is a dimension that its axis does not divide.
PARAMETERS = [
    (r"(to_q|to_k|to_v)/kernel$", ("embed", "heads")),
    (r"to_out/kernel$", ("heads", "embed")),
    (r"ffn_in/kernel$", ("embed", "mlp")),
    (r"ffn_out/kernel$", ("mlp", "embed")),
    # the feature maps of every head, in a model and in distillation
    (r"kernels/\d+$", ("heads", None, "features")),
    (r"biases/\d+$", ("heads", "features")),
    (r"log_scale$", ("heads",)),
]


def is_given(config: ConfigDict) -> bool:
    """Whether `config.mesh` names sizes. Otherwise each stage chooses them (see `mesh_choice`)."""
    return any(config[axis] for axis in AXES)


def mesh_sizes(config: ConfigDict) -> dict[str, int]:
    """The sizes of the axes of `config.mesh`. One that is not given counts as 1."""
    return {axis: config[axis] or 1 for axis in AXES}


def make_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh` over the devices of all processes.

    Raises DoesNotFit if the mesh needs more devices than there are; if it leaves devices of several processes unused,
    since each process must hold a part; or if its axes are not sides of a TPU's torus.
    """
    shape = tuple(mesh_sizes(config).values())
    devices = jax.devices() if devices is None else devices
    size = math.prod(shape)
    hosts = len({device.process_index for device in devices})
    sizes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    if size > len(devices) or (hosts > 1 and size < len(devices)):
        several = f" in {hosts} processes; expected all of them" if hosts > 1 else ""
        actual = f"found {len(devices)} ({devices[0].platform}){several}"
        raise DoesNotFit(f"config.mesh: {sizes} = {size} devices, {actual}")
    try:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:size])
    except NotImplementedError:  # JAX's answer for a torus of TPUs
        raise DoesNotFit(f"config.mesh: {sizes}: expected axes that are whole sides of the topology") from None


def single_device_mesh() -> Mesh:
    """The mesh of this process's first device."""
    return jax.make_mesh(
        (1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.local_devices()[:1]
    )


def sharding(mesh: Mesh | AbstractMesh, *dimensions: str | None) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical names."""
    return NamedSharding(mesh, PartitionSpec(*(LOGICAL[dimension] for dimension in dimensions)))


def leaf_name(path: tuple) -> str:
    """The path of a leaf, like blocks/attn1/to_q/kernel."""
    name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    return name.removesuffix("/value")


def parameter_shardings(mesh: Mesh | AbstractMesh, state: Any) -> Any:
    """A sharding for every array of an NNX state (or a tree with the same paths), by `PARAMETERS`."""

    def leaf_sharding(path: tuple, leaf: Any) -> NamedSharding:
        for pattern, dimensions in PARAMETERS:
            if re.search(pattern, leaf_name(path)):
                sizes = leaf.shape[leaf.ndim - len(dimensions) :]
                divided = [
                    dimension if dimension and size % mesh.shape[LOGICAL[dimension]] == 0 else None
                    for dimension, size in zip(dimensions, sizes, strict=True)
                ]
                return sharding(mesh, *(None,) * (leaf.ndim - len(dimensions)), *divided)
        return sharding(mesh)

    return jax.tree_util.tree_map_with_path(leaf_sharding, state)


def put_state(mesh: Mesh, state: Any) -> Any:
    """A training state (parameters, optimiser moments, counters), sharded as a training step returns it.

    With another sharding, the second step would be compiled again. With several processes, each passes either the full
    arrays or arrays that are already sharded over all processes.
    """

    def put(leaf: jax.Array | np.ndarray, where: NamedSharding) -> jax.Array:
        if where.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, where)
        values = np.asarray(leaf)  # device_put would communicate, to compare the values of all processes
        return jax.make_array_from_callback(leaf.shape, where, lambda index: values[index])

    return jax.tree.map(put, state, parameter_shardings(mesh, state))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The arrays, whole on every device of the mesh. With several processes, each passes the full arrays."""
    whole = sharding(mesh)
    if whole.is_fully_addressable:
        return jax.device_put(tree, whole)
    put = lambda values: jax.make_array_from_callback(values.shape, whole, lambda index: values[index])
    return jax.tree.map(lambda leaf: put(np.asarray(leaf)), tree)


def to_host(tree: Any) -> Any:
    """Full NumPy arrays in every process. All processes must call it."""

    def gather(leaf: Any) -> np.ndarray:
        sharded = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated
        return multihost_utils.process_allgather(leaf, tiled=True) if sharded else np.asarray(leaf)

    return jax.tree.map(gather, tree)


def abstract_mesh(config: ConfigDict) -> AbstractMesh:
    """The mesh of `config.mesh` without devices, for checks on any machine."""
    return AbstractMesh(tuple(mesh_sizes(config).values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of shards that the mesh divides a batch into."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL["batch"])


def check_batch(mesh: Mesh | AbstractMesh, batch: int) -> None:
    """Raises DoesNotFit if the mesh does not divide a batch evenly."""
    if batch % batch_shards(mesh):
        sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in LOGICAL["batch"])
        raise DoesNotFit(f"config.mesh: expected a batch that {sizes} divides, found {batch} examples")


def check_heads(mesh: Mesh | AbstractMesh, heads: int, exchange: str, rates: Iterable[Rate] = ()) -> None:
    """Raises DoesNotFit if the heads do not divide evenly over the mesh: over its tensor axis, and with the exchange
    "all_to_all" or with kinds among `rates` that exchange sequence for heads over its context axis too."""
    tensor, context = mesh.shape[LOGICAL["heads"]], mesh.shape[LOGICAL["sequence"]]
    parts, name = tensor, f"tensor {tensor}"
    reason = "all_to_all" if exchange == "all_to_all" else ", ".join(dict.fromkeys(map(str, by_heads(rates))))
    if reason and context > 1:
        parts, name = tensor * context, f"tensor {tensor} x context {context} ({reason})"
    if heads % parts:
        raise DoesNotFit(f"config.mesh: expected {name} to divide the {heads} heads of the model")


def by_heads(rates: Iterable[Rate]) -> list[Rate]:
    """Those whose blocks exchange sequence for heads over a mesh."""
    return [rate for rate in rates if kind_of(rate).by_heads]


def local_rows(mesh: Mesh, batch: int) -> Sequence[int]:
    """The rows of a batch that this process's devices hold, ascending."""
    check_batch(mesh, batch)
    slices = sharding(mesh, "batch").addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in slices])).tolist()


def global_batch(mesh: Mesh, rows: Sequence[int], batch: int, examples: Any) -> Any:
    """Global arrays [batch, ...] from `examples`, whose leaves [b, ...] are this process's `rows` of the batch."""

    def put(leaf: np.ndarray) -> jax.Array:
        shard = lambda index: leaf[np.searchsorted(rows, np.arange(batch)[index[0]])]
        return jax.make_array_from_callback((batch, *leaf.shape[1:]), sharding(mesh, "batch"), shard)

    return jax.tree.map(put, examples)


def shard_module(mesh: Mesh, module: nnx.Module) -> None:
    """Moves a module's parameters onto the mesh, in place."""
    nnx.update(module, put_state(mesh, nnx.state(module)))


def gather_to_first_process(module: nnx.Module) -> None:
    """Brings parameters that are sharded over several processes to process 0, in place. All processes must call it.

    Stacked parameters are gathered row by row, so that no device ever holds more than one block's parameters.
    """

    def gather(leaf: jax.Array) -> Any:
        if leaf.is_fully_addressable:
            return leaf
        rows = range(len(leaf)) if leaf.ndim > 2 else [slice(None)]
        values = np.empty(leaf.shape, leaf.dtype) if processes.is_first() else None
        for row in rows:
            row_values = to_host(leaf[row])
            if values is not None:
                values[row] = row_values
        return leaf if values is None else values

    nnx.update(module, jax.tree.map(gather, nnx.state(module)))
