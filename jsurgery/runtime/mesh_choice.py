"""The mesh of a stage whose config names none: all devices, on axes chosen by the batch and by the memory it takes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from jsurgery.errors import DoesNotFit
from jsurgery.rates import Rate
from jsurgery.runtime.mesh import AXES, abstract_mesh, by_heads, is_given, make_mesh, mesh_sizes
from jsurgery.runtime.progress import say

GIB = 2**30
USABLE = 0.95  # of a device's memory; the rest is the runtime's, and is lost between arrays


def choose_mesh(
    stage: str,
    config: ConfigDict,
    batch: int,
    heads: int,
    memory: Callable[[AbstractMesh], int],
    devices: Sequence[Any] | int,
    capacity: int | None,
    tell: Callable[[str], None] = say,
    rates: Iterable[Rate] = (),
) -> ConfigDict:
    """The config with sizes for all axes of its mesh: those that it names, or the first of `mesh_choices` that fits.

    Args:
        stage: the name of the stage, for messages.
        batch: the examples that the stage computes at once.
        heads: the attention heads of the model.
        memory: the bytes that a device of a mesh needs.
        devices: the devices of the mesh, or their number where only arithmetic is wanted.
        capacity: the memory of a device in bytes; None if it is not known. Everything fits then.
        tell: gets a line with the choice if there are several devices.
        rates: the kinds that the stage computes; some exchange sequence for heads, which a choice must then divide.

    Raises DoesNotFit, with the numbers, if the mesh that is named or each of the choices needs more than `capacity`.
    """
    bytes_on = lambda chosen: 0 if capacity is None else memory(abstract_mesh(chosen.mesh))
    chosen = with_mesh(config, mesh_sizes(config.mesh))
    if is_given(config.mesh):
        check_memory(stage, bytes_on(chosen), capacity, f"config.mesh: {describe_mesh(mesh_sizes(config.mesh))}")
        return chosen
    count = devices if isinstance(devices, int) else len(devices)
    needs = []
    exchanging = by_heads(rates)
    for sizes in mesh_choices(count, batch, heads):
        if exchanging and heads % (sizes["context"] * sizes["tensor"]):
            continue
        chosen = with_mesh(config, sizes)
        needed = bytes_on(chosen)
        needs.append((needed, describe_mesh(sizes)))
        if capacity is not None and needed > USABLE * capacity:
            continue
        if not isinstance(devices, int) and not can_be_made(chosen.mesh, devices):
            continue
        if count > 1:
            tell(f"{stage}: {describe_mesh(sizes)} of {count} devices{amount(needed, capacity)}")
        return chosen
    if not needs:
        name = ", ".join(dict.fromkeys(map(str, exchanging)))
        expected = f"a batch and the {heads} heads of {name} to share {count} devices evenly"
        raise DoesNotFit(f"{stage}: expected {expected}, found a batch of {batch}; name a mesh by config.mesh")
    needed, sizes = min(needs)
    check_memory(stage, needed, capacity, f"at best, on {count} devices: {sizes}")
    raise DoesNotFit(f"{stage}: {count} devices make up no mesh for a batch of {batch}; name one by config.mesh")


def mesh_choices(devices: int, batch: int, heads: int) -> Iterator[dict[str, int]]:
    """Meshes of all `devices`, those with least traffic first.

    Examples are spread over as many devices as divide the batch, and the tokens of each over the rest. First every
    device has all weights (`data`); then those that hold different examples share them (`fsdp`); then devices also
    share heads (`tensor`).
    """
    examples = math.gcd(devices, batch)
    rest = devices // examples
    for tensor in (size for size in range(1, rest + 1) if rest % size == 0 and heads % size == 0):
        for axis in ("data", "fsdp") if examples > 1 else ("data",):
            yield dict.fromkeys(AXES, 1) | {axis: examples, "context": rest // tensor, "tensor": tensor}


def sampling_batch(clips: int, devices: int, batch: int = 1) -> int:
    """The clips that a command samples at once: at least `batch`, and one on each device if there are enough clips."""
    return -(-batch // devices) * devices if clips >= devices else batch


def with_mesh(config: ConfigDict, sizes: dict[str, int]) -> ConfigDict:
    """A copy of the config with these sizes of the mesh's axes."""
    with config.unlocked():
        copy = config.copy_and_resolve_references()
    copy.mesh.update(sizes)
    return copy.lock()


def can_be_made(mesh: ConfigDict, devices: Sequence[Any]) -> bool:
    """Whether the axes are sides of the devices' topology."""
    try:
        make_mesh(mesh, devices)
    except DoesNotFit:
        return False
    return True


def check_memory(stage: str, needed: int, capacity: int | None, found: str) -> None:
    """Raises DoesNotFit if a stage needs more memory than a device has."""
    if capacity is not None and needed > USABLE * capacity:
        limit = f"{USABLE:.0%} of {capacity / GIB:.0f} GiB"
        raise DoesNotFit(f"{stage}: expected at most {limit} a device, found {needed / GIB:.1f} GiB ({found})")


def device_memory(device: Any) -> int | None:
    """The bytes of memory of a device; None where it does not tell, as CPUs do not."""
    statistics = getattr(device, "memory_stats", lambda: None)() if isinstance(device, jax.Device) else None
    return None if not statistics else statistics.get("bytes_limit")


def describe_mesh(sizes: dict[str, int]) -> str:
    """ "data 4 x context 2", or "1 device"."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1 device"


def amount(needed: int, capacity: int | None) -> str:
    return "" if capacity is None else f", {needed / GIB:.1f} of {capacity / GIB:.0f} GiB each"
