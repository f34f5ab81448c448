"""What the TPU compiler believes a program costs, with no TPU: static estimates, never measurements.

The compiler adds up the cycles of its schedule over every grid step. It reads data-dependent scalars as 0 and barely
models the traffic with HBM, so of a kernel bound by bandwidth the figure is too low. It keeps each grid step in memory:
ask about one head and a few blocks, and scale.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax

# The smallest slice of each chip's topology, and the accelerator type that libtpu is told.
CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}


def topology(name: str, **options: Any) -> Sequence[Any]:
    """Devices to compile for, of a topology like "v5e:4x4", on a machine that has none of them.

    libtpu must be installed, and loads once per process; JAX_PLATFORMS=cpu keeps a process off other accelerators.
    `options` are those of `jax.experimental.topologies.get_topology_desc`.
    """
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE=ACCELERATORS[name.partition(":")[0]],
        TPU_MIN_LOG_LEVEL="3",
    )
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def compile_ahead(chip: str, function: Callable, *shapes: Any) -> Any:
    """`function` compiled for one TPU chip on a machine that has none: what `jax.jit(...).lower().compile()` returns.

    Args:
        chip: a key of `CHIPS`.
        function: called with arrays of `shapes`.
        shapes: pytrees of `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: an unknown chip.
    """
    _check(chip)
    sharding = jax.sharding.SingleDeviceSharding(topology(CHIPS[chip])[0])
    return jax.jit(function, in_shardings=sharding, out_shardings=sharding).trace(*shapes).lower().compile()


def estimate_cycles(chip: str, function: Callable, *shapes: Any, pullback: bool = False) -> dict[str, int]:
    """Estimated cycles of every operation of a compiled program, by its name in the HLO; a process of its own does it.

    A kernel's name is the one its `pallas_call` was given, with a suffix where the program has several.

    Args:
        chip: a key of `CHIPS`.
        function: a module's function, or a `functools.partial` of one, which another process can import. The figures of
            a `while` loop's body count once.
        shapes: pytrees of `jax.ShapeDtypeStruct`.
        pullback: whether to compile the second half of the function's gradient instead, from what `jax.vjp` keeps on.

    Raises:
        ValueError: an unknown chip.
        RuntimeError: the compiler failed.
    """
    _check(chip)
    with tempfile.TemporaryDirectory() as folder:
        # libtpu reads its arguments when it loads, so the process is a new one.
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_dump_profiles, initargs=(folder,)
        ) as process:
            try:
                process.submit(_compile, chip, function, shapes, pullback).result()
            except (concurrent.futures.BrokenExecutor, jax.errors.JaxRuntimeError) as error:
                raise RuntimeError(f"the compiler for {chip} failed: {str(error).splitlines()[0]}") from None
        return _read_profiles(pathlib.Path(folder))


def _check(chip: str) -> None:
    if chip not in CHIPS:
        raise ValueError(f"chip must be one of {', '.join(CHIPS)}, found {chip!r}")


def _dump_profiles(folder: str) -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={folder}"}


def _compile(chip: str, function: Callable, shapes: Sequence[Any], pullback: bool) -> None:
    if pullback:
        function, shapes = pullback_of(function, *shapes)
    compile_ahead(chip, function, *shapes)


def pullback_of(function: Callable, *shapes: Any) -> tuple[Callable, tuple[Any, Any]]:
    """(gradients of what `jax.vjp` keeps and of a cotangent, the shapes of these two)."""
    y, pullback = jax.eval_shape(functools.partial(jax.vjp, function), *shapes)
    kept, structure = jax.tree.flatten(pullback)
    return lambda kept, dy: jax.tree.unflatten(structure, kept)(dy), (kept, y)


def _read_profiles(folder: pathlib.Path) -> dict[str, int]:
    cycles = {}
    for profile in folder.glob("*.textproto"):
        text = profile.read_text()
        if (name := re.search(r'hlo_op_name: "([^"]+)"', text)) and (
            found := re.search(r"estimated_cycles: (\d+)", text)
        ):
            cycles[name[1].lstrip("%")] = int(found[1])
    return cycles
