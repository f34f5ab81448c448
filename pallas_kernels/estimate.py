"""Static estimates, never measurements, of a program's cost on a TPU, from the compiler's schedules, without a TPU.

The compiler can print a kernel's schedule for one grid step. The estimate is the length of that schedule, or the time
that its matrix units are busy if that is longer, times the number of grid steps. Code under `pl.when` counts only in
the steps that run it. Other waits and the traffic with HBM are not counted, so the estimate is too low for a kernel
that is bound by bandwidth.

The compiler can also simulate its schedule step by step (`--xla_jf_dump_static_llo_profile_to`), which takes gigabytes
and minutes. That is not used here, because the simulation takes spilled scalars for 0 and therefore runs steps that do
not exist: half as many again in kernels with several outputs.
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun, jaxprs_in_params

# The smallest slice of each chip's topology, and its accelerator type as libtpu names it.
CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}
# Cycles that a matrix unit needs for a `vmatmul` of 16 rows in bfloat16: one per row, or half with a 256 x 256 unit.
MATMUL_CYCLES = {"v4": 16, "v5e": 16, "v5p": 16, "v6e": 8}

SHORT = 0.02  # of a schedule, the part that copies results

# In HLO: the instruction of a kernel, with its name in JAX, "jit(f)/transpose(jvp(NAME))/pallas_call"; and an
# instruction of XLA's own, with XLA's estimate.
KERNEL = re.compile(r'%(\S+) = [^\n]*"tpu_custom_call"[^\n]*op_name="[^"]*?([^"/()]+)\)*/pallas_call"')
XLA_OPERATION = re.compile(r'%(\S+) = [^\n]*"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's number of grid steps and, for each of its `pl.when` in order, the share of the steps that run it."""

    steps: int
    shares: tuple[float, ...]


def topology(name: str, **options: Any) -> Sequence[Any]:
    """The devices of a topology like "v5e:4x4", to compile for on a machine without them.

    libtpu must be installed; a process can load it only once. JAX_PLATFORMS=cpu keeps the process off other
    accelerators. `options` are those of `jax.experimental.topologies.get_topology_desc`.
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
    """`function` compiled for one TPU chip on a machine without it, as `jax.jit(...).lower().compile()` returns it.

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


def estimate_cycles(chip: str, function: Callable, *shapes: Any) -> tuple[dict[str, int], dict[str, int]]:
    """(cycles of a compiled program's Pallas kernels, cycles of XLA's own operations), by their names in the HLO.

    A kernel's name is that of its `pallas_call`, with JAX's transformations and a number added. Copies that run beside
    other work are free, and the body of a `while` loop counts once. The compiler runs in a new process.

    Args:
        chip: a key of `CHIPS`.
        function: a module's function, or a `functools.partial` of one, which another process can import.
        shapes: pytrees of `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: an unknown chip.
        RuntimeError: the compiler failed, or did not print the schedule of a kernel.
    """
    _check(chip)
    with tempfile.TemporaryDirectory() as folder:
        # libtpu reads its arguments when it is loaded, hence the new process.
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_dump_schedules, initargs=(folder,)
        ) as process:
            try:
                text = process.submit(_compiled_text, chip, function, shapes).result()
            except (concurrent.futures.BrokenExecutor, jax.errors.JaxRuntimeError) as error:
                raise RuntimeError(f"the compiler for {chip} failed: {str(error).splitlines()[0]}") from None
        called = kernels_of(jax.make_jaxpr(function)(*shapes).jaxpr)
        kernels = {}
        for name, label in sorted(KERNEL.findall(text)):
            if not called.get(label):
                raise RuntimeError(f"{name}: expected a kernel of {', '.join(called)}, found {label}")
            schedule = _schedule(pathlib.Path(folder), name)
            kernels[name] = round(cycles_of(called[label].pop(0), schedule, MATMUL_CYCLES[chip]))
        return kernels, {name: int(cycles) for name, cycles in XLA_OPERATION.findall(text)}


def kernels_of(jaxpr: Any, within: str = "") -> dict[str, list[Kernel]]:
    """The kernels called in a jaxpr, by name. A kernel without a name gets that of the enclosing scope or function."""
    by_name: dict[str, list[Kernel]] = {}
    for equation in jaxpr.eqns:
        scope = str(equation.source_info.name_stack).rpartition("/")[2].rpartition("(")[2].rstrip(")") or within
        if equation.primitive.name == "pallas_call":
            grid = equation.params["grid_mapping"].grid
            kernel = Kernel(math.prod(grid), section_shares(equation.params["jaxpr"], grid))
            by_name.setdefault(equation.params["name"] or scope, []).append(kernel)
            continue
        for inner in jaxprs_in_params(equation.params):
            for name, kernels in kernels_of(inner, equation.params.get("name", scope)).items():
                by_name.setdefault(name, []).extend(kernels)
    return by_name


def section_shares(kernel: Any, grid: Sequence[int]) -> tuple[float, ...]:
    """For each condition in a kernel's jaxpr, the share of the grid's steps at which it holds.

    It is 1 for a condition that depends on more than the step.
    """

    def conditions(index: jax.Array) -> list[Any]:
        known, taken = {}, []
        for equation in kernel.eqns:
            kind = equation.primitive.name
            values = [x.val if isinstance(x, Literal) else known.get(x) for x in equation.invars]
            if kind == "program_id":
                values = [index[equation.params["axis"]]]
            elif kind == "num_programs":
                values = [grid[equation.params["axis"]]]
            elif kind == "cond":
                taken.append(jnp.asarray(-1 if values[0] is None else values[0], jnp.int32))
                continue
            elif not values or any(value is None for value in values):
                continue
            elif kind == "jit":
                values = jaxpr_as_fun(equation.params["jaxpr"])(*values)
            else:
                result = equation.primitive.bind(*values, **equation.params)
                values = result if equation.primitive.multiple_results else [result]
            known.update(zip(equation.outvars, values, strict=True))
        return taken

    steps = jnp.stack(jnp.meshgrid(*map(jnp.arange, grid), indexing="ij"), axis=-1).reshape(-1, len(grid))
    shares = [taken.astype(float).mean() for taken in jax.vmap(conditions)(steps)]
    return tuple(1.0 if share < 0 else float(share) for share in shares)


def cycles_of(kernel: Kernel, schedule: str, matmul_cycles: int) -> float:
    """The cycles of a kernel with this schedule, in which every line is a bundle of instructions: "0x1f LB: > { ... }".

    A bundle takes a cycle. A `vmatmul` keeps its matrix unit busy for `matmul_cycles`, so the busiest unit may take
    longer than the bundles. A section is the code that a branch jumps over, inside the body of the loop over steps.
    Sections are matched with the kernel's `pl.when` in order, either with all of them or only with those that run at
    some steps and not at others, since the compiler may remove the other branches. After them may come short sections
    that copy results to HBM, which count in every step. If the numbers do not fit, every section counts in every step,
    and a warning says how much too high the result may be.
    """
    starts, branches, products, address = {}, [], [], 0
    for line in schedule.splitlines():
        if match := re.match(r" *0x([0-9a-f]+) ", line):
            address = int(match[1], 16)
        starts |= {int(region): address for region in re.findall(r"Start(?:/End empty)? region (\d+)", line)}
        branches += [(address, int(target)) for target in re.findall(r"sbr\.rel [^;}]*target = \$region(\d+)", line)]
        products += [(address, int(unit)) for unit in re.findall(r"vmatmul\.\S+\.mxu(\d)", line)]
    jumps = [(start, starts[target]) for start, target in branches if starts[target] > start]
    begin, end = max(jumps, key=lambda ends: ends[1] - ends[0], default=(0, 0))
    sections = [(start, stop) for start, stop in jumps if begin < start and stop <= end]
    share = np.ones(address + 1)  # the share of the steps that run each bundle
    conditional = tuple(of_section for of_section in kernel.shares if of_section not in (0, 1))
    outer = [(start, stop) for start, stop in sections if not any(a < start and stop <= b for a, b in sections)]
    copies = sum(stop - start for start, stop in outer[len(conditional) :])
    if len(sections) > len(kernel.shares) and copies < SHORT * len(share):
        sections = outer[: len(conditional)]
    shares = kernel.shares if len(sections) == len(kernel.shares) else conditional
    if len(sections) == len(shares):
        for (start, stop), of_section in zip(sections, shares, strict=True):
            share[start:stop] *= of_section
    elif conditional:
        counts = f"{len(sections)} sections in the schedule, {len(kernel.shares)} in the kernel"
        most = sum(stop - start for start, stop in sections) / len(share)
        warnings.warn(f"{counts}: each counts in every step, up to {most:.1%} too much", stacklevel=2)
    busy = np.zeros(8)
    for address, unit in products:
        busy[unit] += matmul_cycles * share[address]
    return kernel.steps * max(share.sum(), busy.max())


def _check(chip: str) -> None:
    if chip not in CHIPS:
        raise ValueError(f"chip must be one of {', '.join(CHIPS)}, found {chip!r}")


def _dump_schedules(folder: str) -> None:
    arguments = {"to": folder, "llo_text": "true", "llo_pass_label_regex": ".*final_bundles.*"}
    options = " ".join(f"--xla_jf_dump_{name}={value}" for name, value in arguments.items())
    os.environ |= {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": options}


def _compiled_text(chip: str, function: Callable, shapes: Sequence[Any]) -> str:
    return compile_ahead(chip, function, *shapes).as_text()


def _schedule(folder: pathlib.Path, kernel: str) -> str:
    for file in folder.glob(f"*-{kernel}-*final_bundles.txt"):
        if "schedule-analysis" not in file.name:
            return file.read_text()
    raise RuntimeError(f"the compiler left no schedule of {kernel}")
