"""roofline: the least and the expected time of a whole surgery on a TPU topology, in chip-hours.

Everything here is an estimate: FLOPs and memory traffic come from the cost model, traffic between chips from
`jsurgery compile --json`. Nothing is measured.
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
from jsurgery.estimate.programs import step_flops
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report
from jsurgery.surgery.phases import planned_rates
from jsurgery.surgery.trace import traced_prompts
from jsurgery.wan.cost import model_bytes, model_flops, workload
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.models import find_sizes

EVALUATED = 4  # models: the teacher, the hybrid before and after distillation, the fine-tuned hybrid
PAPER_GPU_HOURS = 400  # the paper's upper bound for Wan2.1 1.3B, without data synthesis


@dataclasses.dataclass(frozen=True)
class StageWork:
    """The work of a stage: number of steps; FLOPs and bytes of HBM traffic of one step on all chips together."""

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
    """Prints the least and the expected seconds a step and chip-hours of every stage; `report` names a JSON file.

    The least time of a step is the longest of three, as if they overlapped fully: its FLOPs at the chip's peak rate,
    its least memory traffic at the chip's bandwidth, and the bytes exchanged at the rate of one ring. The expected time
    takes compute and memory at `efficiency` of their peaks. `clips` adds the synthesis of that many training clips by
    the same model. `compiled` are files of `jsurgery compile --json`; a stage without such a file is assumed to
    exchange nothing. Raises InputError for a file of another topology.
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
    synthesis_rows = [estimate(synthesis(config, network, clips), chip, chips, None, efficiency)] if clips else []
    result = {
        "topology": topology,
        "chips": chips,
        "efficiency": efficiency,
        "stages": rows + synthesis_rows,
        "chip_hours": {side: sum(row["chip_hours"][side] for row in rows) for side in ("bound", "expected")},
        "source": "estimate: jsurgery's cost model, published rates of the chip, the TPU compiler's traffic",
    }
    print(as_text(result), flush=True)
    if report is not None:
        write_json(epath.Path(report), result)


def read_exchanged(files: Sequence[str], topology: str) -> dict[str, float]:
    """By stage: the bytes that one chip exchanges in a step, from files of `jsurgery compile --json`."""
    exchanged = {}
    for file in files:
        try:
            compiled = json.loads(epath.Path(file).read_text())
            stage, compiled_for = compiled["stage"], compiled["topology"]
            moved = sum(kind["bytes"] for kind in compiled["collectives"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: expected a file of `jsurgery compile --json`, found {error!r}") from None
        if compiled_for != topology:
            raise InputError(f"{file}: compiled for {compiled_for}, expected {topology}")
        exchanged[stage] = moved
    return exchanged


def work_of_stages(config: ConfigDict, network: WanConfig) -> list[StageWork]:
    """The stages of a surgery whose time is computation on the chips."""
    work = dataclasses.replace(workload(config, network), config=network)
    softmax, planned = (1,) * network.num_layers, planned_rates(config, network.num_layers)
    velocities = config.sampler.steps * velocities_per_step(config.sampler.guidance)
    passes = 3 + (config.model.remat != "none")
    teacher, hybrid = model_bytes(work, softmax), model_bytes(work, planned)
    trace, distill, finetune = config.trace.batch, config.distill.batch, config.finetune.batch
    batches, evaluated = math.ceil(len(traced_prompts(config)) / trace), EVALUATED * config.evaluate.prompts
    forward = model_flops(work, softmax)
    # For every held-out step: the teacher's forward, and one with each block at each rate.
    forwards = config.distill.velocity_steps * (1 + network.num_layers * len(config.hybrid.rates))
    return [
        StageWork("trace", batches * velocities, trace * forward, trace * teacher),
        StageWork("distill", config.distill.steps, step_flops(config, network, "distill"), distill * teacher),
        StageWork("velocity errors of blocks", forwards, forward, teacher),
        StageWork(
            "finetune", config.finetune.steps, step_flops(config, network, "finetune"), finetune * hybrid * passes
        ),
        StageWork("evaluate", evaluated * velocities, forward, teacher),
    ]


def synthesis(config: ConfigDict, network: WanConfig, clips: int) -> StageWork:
    """The work of sampling training clips from the teacher."""
    work = dataclasses.replace(workload(config, network), config=network)
    steps = clips * config.sampler.steps * velocities_per_step(config.sampler.guidance)
    softmax = (1,) * network.num_layers
    return StageWork(f"synthesize {clips} clips", steps, model_flops(work, softmax), model_bytes(work, softmax))


def estimate(work: StageWork, chip: Chip, chips: int, exchanged: float | None, efficiency: float) -> dict[str, Any]:
    """The row of a stage. `exchanged` is the bytes that a chip exchanges in a step, None where they are not known."""
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


def as_text(result: dict[str, Any]) -> str:
    """The table that the command prints, in Markdown."""
    share = f"{result['efficiency']:.0%} of the peak"
    lines = [
        f"{result['topology']}, {result['chips']} chips: an estimate, not measured",
        f"| stage | steps | PFLOP a step | s a step at least | bound by | s a step at {share} | chip-hours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["stages"]:
        by = row["bound_by"] + ("" if row["exchange_known"] else " (exchange not counted)")
        seconds, hours = row["step_seconds"], row["chip_hours"]["expected"]
        flops = row["flops_per_step"] / 1e15
        cells = [f"{flops:.3g}", f"{seconds['bound']:.3g}", by, f"{seconds['expected']:.3g}", f"{hours:.1f}"]
        lines.append(f"| {row['stage']} | {row['steps']} | " + " | ".join(cells) + " |")
    hours = result["chip_hours"]
    lines.append(
        f"surgery: {hours['expected']:.1f} chip-hours at {share}, {hours['bound']:.1f} at the bound; "
        f"the paper's bound for Wan2.1 1.3B: {PAPER_GPU_HOURS} GPU-hours"
    )
    return "\n".join(lines)
