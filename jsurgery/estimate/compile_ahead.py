"""compile: compiles one step of a stage for a TPU topology, without TPUs. Reports its memory and its collectives.

All numbers are the compiler's estimates, not measurements.
"""

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from jsurgery.errors import DoesNotFit, InputError
from jsurgery.estimate.chips import GIB, GPUS, MACHINES, Chip, parse_topology
from jsurgery.estimate.hlo import collectives, largest_buffers
from jsurgery.estimate.programs import lowered, step_flops, trained_sizes
from jsurgery.estimate.traffic import bound_by, program_work
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report, peak_bytes
from jsurgery.runtime.mesh import is_given, make_mesh, mesh_sizes
from jsurgery.runtime.progress import say
from jsurgery.surgery.phases import on_mesh, planned_rates
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_sizes import ModelSizes, find_sizes
from pallas_kernels import estimate

SHOWN_BUFFERS = 8


def compile_stage(
    config: ConfigDict, config_name: str, stage: str, topology: str, *, slices: int = 1, report: str | None = None
) -> None:
    """Compiles one step of a stage for a topology like "v5e:4x4"; prints memory, FLOPs, collectives and compile time.

    `report` names a JSON file for the same numbers. Raises DoesNotFit where the mesh has another number of devices than
    the topology, or where the program needs more than a chip's memory; then the largest buffers are printed first.
    Raises InputError for an unknown topology and for a budget that does not name a plan.
    """
    check_report(report)
    sizes = trained_sizes(config) if stage == "train" else find_sizes(config, config_name)
    chip, devices = chip_and_devices(topology, slices)
    config = mesh_of(stage, config, sizes, chip, devices, topology)
    mesh = make_mesh(config.mesh, devices)
    say(f"compile: {stage} on {topology}")
    start = time.perf_counter()
    try:
        compiled = compile_program(lowered(stage, config, sizes, mesh))
    except OutOfMemory as error:
        print(error.buffers, flush=True)
        raise DoesNotFit(f"{stage} on {topology}: {error}") from None
    seconds = time.perf_counter() - start
    memory = memory_parts(compiled)
    flops, text = step_flops(config, sizes.transformer, stage) / len(devices), compiled.as_text()
    shares = branch_shares(config, sizes.transformer) if stage in ("sample", "finetune") else ()
    work = program_work(text, shares)
    times = work.seconds(chip)
    result = {
        "stage": stage,
        "topology": topology,
        "slices": slices,
        "mesh": mesh_sizes(config.mesh),
        "memory_bytes": memory | {"peak": memory["argument"] + memory["output"] + memory["temp"] - memory["alias"]},
        "capacity_bytes": chip.memory,
        "flops_per_device": flops,
        "least_seconds": flops / chip.flops,
        "collectives": collectives(text, shares),
        **dataclasses.asdict(work),
        "seconds": times,
        "bound_by": bound_by(times),
        "compile_seconds": seconds,
        "compile_peak_bytes": peak_bytes(),
        "source": "static estimate of the TPU compiler; FLOPs by jsurgery's cost model",
    }
    print(as_text(result), flush=True)
    if report is not None:
        write_json(epath.Path(report), result)
    if (peak := result["memory_bytes"]["peak"]) > chip.memory:
        raise DoesNotFit(f"{stage} on {topology}: {peak / GIB:.1f} GiB; expected at most {chip.memory / GIB:.0f}")


class OutOfMemory(Exception):
    """The compiler found no room for a program. The message is its own; `buffers` lists the largest buffers."""

    def __init__(self, message: str, buffers: str):
        super().__init__(message)
        self.buffers = buffers


def compile_program(low: Any) -> Any:
    """The compiled program (`jax.stages.Compiled`) of a lowered one (`jax.stages.Lowered`). Raises OutOfMemory."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return low.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            status, _, complaint = str(error).partition(": ")
            if status != "RESOURCE_EXHAUSTED":
                raise
            raise OutOfMemory(complaint, buffers_as_text(folder)) from None


def memory_parts(compiled: Any) -> dict[str, int]:
    """The compiler's bytes of a program on a device: arguments, output, temporary, and reused (alias)."""
    memory = compiled.memory_analysis()
    return {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}


def mesh_of(
    stage: str, config: ConfigDict, sizes: ModelSizes, chip: Chip, devices: Sequence[Any], topology: str
) -> ConfigDict:
    """The config with the mesh that a stage takes on these chips. Raises DoesNotFit if `config.mesh` suits others."""
    if stage == "train" or is_given(config.mesh):  # the compiler, not an estimate, tells whether it fits
        named = math.prod(mesh_sizes(config.mesh).values())
        if named != len(devices):
            axes = " x ".join(f"{axis} {size}" for axis, size in mesh_sizes(config.mesh).items())
            raise DoesNotFit(f"config.mesh: {axes} = {named} devices, {topology} has {len(devices)}")
        return config
    return on_mesh(stage, config, sizes, devices, chip.memory)


def chip_and_devices(topology: str, slices: int) -> tuple[Chip, Sequence[Any]]:
    """The chip and the devices of a topology. Raises InputError where libtpu does not know the topology."""
    chip, _ = parse_topology(topology)
    topology = MACHINES.get(topology, topology)
    if topology.partition(":")[0] in GPUS:
        raise InputError(f"--topology={topology}: expected TPUs, for the compiler of GPUs needs one; see --dry_run")
    single = {"chips_per_host_bounds": [1, 1, 1]} if re.fullmatch(r"\w+:1(x1)*", topology) else {}
    try:
        options = single | ({"num_slices": slices} if slices > 1 else {})
        return chip, estimate.topology(topology, **options)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        message = str(error).strip().splitlines()[0]
        raise InputError(f"--topology={topology}: libtpu (the `tpu` extra) does not know it: {message}") from None


def branch_shares(config: ConfigDict, network: WanConfig) -> tuple[float, ...]:
    """The share of the blocks at each rate of the plan: of the scan's turns that take each branch of its attention."""
    rates = planned_rates(config, network.num_layers)
    return tuple(rates.count(rate) / len(rates) for rate in sorted(set(rates), key=str))


def buffers_as_text(folder: str) -> str:
    """The largest buffers of a device, from the report that the compiler leaves of a program that does not fit."""
    reports = [path.read_text() for path in epath.Path(folder).glob("*memory-usage-report.txt")]
    buffers = largest_buffers(max(reports, key=len, default=""), SHOWN_BUFFERS)
    rows = [f"  {size / GIB:8.2f} GiB  {shapes}" for size, shapes in buffers]
    return "\n".join(["the largest buffers of a device, and the values that share each:", *rows])


def as_text(result: dict[str, Any]) -> str:
    """The lines that the command prints."""
    memory, moved = result["memory_bytes"], result["collectives"]
    lines = [
        f"{result['stage']} on {result['topology']}: static estimate of the TPU compiler, FLOPs by the cost model",
        f"memory a device: {memory['peak'] / GIB:.2f} of {result['capacity_bytes'] / GIB:.0f} GiB (arguments "
        f"{memory['argument'] / GIB:.2f}, temporary {memory['temp'] / GIB:.2f}, reused {memory['alias'] / GIB:.2f})",
        f"FLOPs a device: {result['flops_per_device'] / 1e12:.3g} T by the cost model, "
        f"{result['flops'] / 1e12:.3g} T in the program",
        f"bytes a device: {result['hbm_bytes'] / 1e9:.4g} GB to and from HBM, "
        f"{result['exchanged_bytes'] / 1e9:.4g} GB exchanged",
        "seconds at the chip's rates: "
        + ", ".join(f"{name} {seconds:.3g}" for name, seconds in result["seconds"].items())
        + f"; bound by {result['bound_by']}",
        *(f"{kind}: {each['count']} a step, {each['bytes'] / GIB:.4g} GiB" for kind, each in moved.items()),
        f"compiled in {result['compile_seconds']:.0f} s and {result['compile_peak_bytes'] / GIB:.1f} GiB",
    ]
    return "\n".join(lines)
