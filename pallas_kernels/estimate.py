"""What the TPU compiler believes a program costs, with no TPU: static estimates, never measurements.

The compiler adds up the cycles of its schedule over every grid step. It reads data-dependent scalars as 0 and barely
models the traffic with HBM, so of a kernel bound by bandwidth the figure is too low. It keeps each grid step in memory:
ask about one head and a few blocks, and scale.
"""

import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax

# One chip of each kind: the accelerator type that libtpu is told, and the smallest slice of the topology.
CHIPS = {
    "v4": ("v4-8", "v4:2x2x1"),
    "v5e": ("v5litepod-4", "v5e:2x2"),
    "v5p": ("v5p-8", "v5p:2x2x1"),
    "v6e": ("v6e-4", "v6e:2x2"),
}


def compile_ahead(chip: str, function: Callable, *shapes: Any) -> Any:
    """`function` compiled for one TPU chip on a machine that has none: what `jax.jit(...).lower().compile()` returns.

    libtpu must be installed, and loads once per process: call this in a process of its own, which JAX_PLATFORMS=cpu
    keeps off other accelerators.

    Args:
        chip: a key of `CHIPS`.
        function: called with arrays of `shapes`.
        shapes: pytrees of `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: an unknown chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip must be one of {', '.join(CHIPS)}, found {chip!r}")
    from jax.experimental import topologies

    accelerator, slice_name = CHIPS[chip]
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE=accelerator,
        TPU_MIN_LOG_LEVEL="3",
    )
    device = topologies.get_topology_desc(platform="tpu", topology_name=slice_name).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.jit(function, in_shardings=sharding, out_shardings=sharding).trace(*shapes).lower().compile()


def estimate_cycles(chip: str, function: Callable, *shapes: Any) -> dict[str, int]:
    """Estimated cycles of every operation of a compiled program, by its name in the HLO; a process of its own does it.

    A kernel's name contains the one that its `pallas_call` was given: "hybrid_attend.1", "jvp_hybrid_attend_.1".

    Args:
        chip: a key of `CHIPS`.
        function: what `pickle` can carry: a module's function, or a `functools.partial` of one. The figures of a
            `while` loop's body count once.
        shapes: pytrees of `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: an unknown chip.
        RuntimeError: the compiler failed; its last words.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip must be one of {', '.join(CHIPS)}, found {chip!r}")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={folder}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        run = subprocess.run(
            [sys.executable, "-m", "pallas_kernels.estimate"],
            input=pickle.dumps((chip, function, shapes)),
            env=environment,
            capture_output=True,
        )
        if run.returncode:
            last_words = run.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"the compiler for {chip} failed with status {run.returncode}: {last_words[0]}")
        return _read_profiles(pathlib.Path(folder))


def _read_profiles(folder: pathlib.Path) -> dict[str, int]:
    cycles = {}
    for profile in folder.glob("*.textproto"):
        text = profile.read_text()
        if (name := re.search(r'hlo_op_name: "([^"]+)"', text)) and (
            found := re.search(r"estimated_cycles: (\d+)", text)
        ):
            cycles[name[1].lstrip("%")] = int(found[1])
    return cycles


if __name__ == "__main__":
    compile_ahead(*(lambda chip, function, shapes: (chip, function, *shapes))(*pickle.load(sys.stdin.buffer)))
