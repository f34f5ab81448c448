"""roofline: how long a whole surgery takes at least on a TPU topology, and what to expect of it, in chip-hours.

An estimate from the cost model and from what `jsurgery compile --json` says of the traffic between chips. Nothing here
is measured.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.diffusion import velocities_per_step
from jsurgery.errors import InputError
from jsurgery.estimate.chips import Chip, parse_topology
from jsurgery.estimate.compile_ahead import planned_rates, step_flops
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report
from jsurgery.surgery.trace import traced_prompts
from jsurgery.wan.cost import model_bytes, model_flops, workload
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.models import find_sizes

EVALUATED = 4  # the teacher, the hybrid before and after distillation, the fine-tuned one
PAPER_GPU_HOURS = 400  # its own bound on the surgery of Wan2.1 1.3B, data synthesis apart


@dataclasses.dataclass(frozen=True)
class StageWork:
    """What a stage does: `steps` steps of so many FLOPs and bytes of HBM traffic on all chips together."""

    stage: str
    steps: int
    flops: float
    bytes: float


def roofline(
    config: ConfigDict,
    config_name: str,
    topology: str,
    *,
    efficiency: float = 0.4,
    clips: int = 0,
    compiled: Sequence[str] = (),
    report: str | None = None,
) -> None:
    """Prints, or also writes as JSON, the least and the expected seconds a step and chip-hours of every stage.

    The bound is the slowest of three, as if they overlapped fully: FLOPs at the chip's peak, the least memory traffic
    at its bandwidth, and the bytes exchanged at the rate of one ring. Expected is the bound with compute and memory
    at `efficiency` of their peaks. `clips` counts the synthesis of so many training clips by the same model. `compiled`
    are files of `jsurgery compile --json`; a stage without one for this topology is taken to exchange nothing.
    """
    check_report(report)
    chip, chips = parse_topology(topology)
    if not 0 < efficiency <= 1:
        raise InputError(f"--efficiency: expected a share of the peak, in (0, 1], found {efficiency}")
    exchanged = read_exchanged(compiled, topology)
    network = find_sizes(config, config_name).transformer
    rows = [
        estimate(work, chip, chips, exchanged.get(work.stage), efficiency) for work in work_of_stages(config, network)
    ]
    apart = [estimate(synthesis(config, network, clips), chip, chips, None, efficiency)] if clips else []
    found = {
        "topology": topology,
        "chips": chips,
        "efficiency": efficiency,
        "stages": rows + apart,
        "chip_hours": {side: sum(row["chip_hours"][side] for row in rows) for side in ("bound", "expected")},
        "source": "estimate: jsurgery's cost model, published rates of the chip, the TPU compiler's traffic",
    }
    print(as_text(found), flush=True)
    if report is not None:
        write_json(epath.Path(report), found)


def read_exchanged(files: Sequence[str], topology: str) -> dict[str, float]:
    """By stage, the bytes that a chip exchanges in one step."""
    exchanged = {}
    for file in files:
        try:
            found = json.loads(epath.Path(file).read_text())
            stage, where = found["stage"], found["topology"]
            moved = sum(one["bytes"] for one in found["collectives"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: expected a file of `jsurgery compile --json`, found {error!r}") from None
        if where != topology:
            raise InputError(f"{file}: compiled for {where}, expected {topology}")
        exchanged[stage] = moved
    return exchanged


def work_of_stages(config: ConfigDict, network: WanConfig) -> list[StageWork]:
    """The stages of a surgery that compute."""
    work = dataclasses.replace(workload(config, network), config=network)
    softmax, planned = (1,) * network.num_layers, planned_rates(config, network.num_layers)
    velocities = config.sampler.steps * velocities_per_step(config.sampler.guidance)
    passes = 3 + (config.model.remat != "none")
    teacher, hybrid = model_bytes(work, softmax), model_bytes(work, planned)
    trace, distill, finetune = config.trace.batch, config.distill.batch, config.finetune.batch
    batches, evaluated = math.ceil(len(traced_prompts(config)) / trace), EVALUATED * config.evaluate.prompts
    forward = model_flops(work, softmax)
    # Of every step and block the teacher's forward, and one a rate.
    alone = config.distill.velocity_steps * network.num_layers * (1 + len(config.hybrid.rates))
    return [
        StageWork("trace", batches * velocities, trace * forward, trace * teacher),
        StageWork("distill", config.distill.steps, step_flops(config, network, "distill"), distill * teacher),
        StageWork("velocity errors of blocks", alone, forward, teacher),
        StageWork(
            "finetune", config.finetune.steps, step_flops(config, network, "finetune"), finetune * hybrid * passes
        ),
        StageWork("evaluate", evaluated * velocities, forward, teacher),
    ]


def synthesis(config: ConfigDict, network: WanConfig, clips: int) -> StageWork:
    """Training clips by the teacher itself."""
    work = dataclasses.replace(workload(config, network), config=network)
    steps = clips * config.sampler.steps * velocities_per_step(config.sampler.guidance)
    softmax = (1,) * network.num_layers
    return StageWork(f"synthesize {clips} clips", steps, model_flops(work, softmax), model_bytes(work, softmax))


def estimate(work: StageWork, chip: Chip, chips: int, exchanged: float | None, efficiency: float) -> dict[str, Any]:
    times = {
        "compute": work.flops / chips / chip.flops,
        "memory": work.bytes / chips / chip.bandwidth,
        "exchange": (exchanged or 0.0) / chip.link,
    }
    expected = max(times["compute"] / efficiency, times["memory"] / efficiency, times["exchange"])
    bound = max(times.values())
    hours = chips * work.steps / 3600
    return {
        "stage": work.stage,
        "steps": work.steps,
        "flops_per_step": work.flops,
        "seconds": times,
        "exchange_known": exchanged is not None,
        "bound_by": max(times, key=times.__getitem__),
        "step_seconds": {"bound": bound, "expected": expected},
        "chip_hours": {"bound": bound * hours, "expected": expected * hours},
    }


def as_text(found: dict[str, Any]) -> str:
    share = f"{found['efficiency']:.0%} of the peak"
    lines = [
        f"{found['topology']}, {found['chips']} chips: an estimate, not measured",
        f"| stage | steps | PFLOP a step | s a step at least | bound by | s a step at {share} | chip-hours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["stages"]:
        by = row["bound_by"] + ("" if row["exchange_known"] else " (exchange not counted)")
        seconds, hours = row["step_seconds"], row["chip_hours"]["expected"]
        flops = row["flops_per_step"] / 1e15
        cells = [f"{flops:.3g}", f"{seconds['bound']:.3g}", by, f"{seconds['expected']:.3g}", f"{hours:.1f}"]
        lines.append(f"| {row['stage']} | {row['steps']} | " + " | ".join(cells) + " |")
    hours = found["chip_hours"]
    lines.append(
        f"surgery: {hours['expected']:.1f} chip-hours at {share}, {hours['bound']:.1f} at the bound; "
        f"the paper's bound for Wan2.1 1.3B: {PAPER_GPU_HOURS} GPU-hours"
    )
    return "\n".join(lines)
