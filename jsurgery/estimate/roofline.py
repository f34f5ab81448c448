"""roofline: the least and the expected time of a whole surgery on a TPU topology, in chip-hours.

Everything here is an estimate: FLOPs, memory traffic and traffic between chips come from `jsurgery compile --json`, or,
for a stage that was not compiled, FLOPs and memory traffic from the cost model. Nothing is measured.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.diffusion import velocities_per_step
from jsurgery.errors import InputError
from jsurgery.estimate.chips import Chip, parse_topology
from jsurgery.estimate.programs import step_flops
from jsurgery.estimate.traffic import ProgramWork, bound_by
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report
from jsurgery.surgery.disk import EVALUATED
from jsurgery.surgery.phases import planned_forward
from jsurgery.surgery.trace import traced_prompts
from jsurgery.wan.cost import (
    distillation_bytes,
    distillation_flops,
    model_bytes,
    model_flops,
    text_encoder_cost,
    workload,
)
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_sizes import ModelSizes, find_sizes
from jsurgery.wan.vae_cost import vae_cost

PAPER_GPU_HOURS = 400  # the paper's upper bound for Wan2.1 1.3B, without data synthesis


COMPILER = "compiled program"
LEAST = "cost model: least traffic"


@dataclasses.dataclass(frozen=True)
class StageWork:
    """The work of a stage by the cost model.

    Attributes:
        steps: the number of steps.
        flops, bytes: FLOPs and HBM traffic of one step on all chips together.
        program: the program of `jsurgery compile` that does the work; "" if none does.
        runs: runs of that program for one step.
        per_shard: whether each run does as many steps as the mesh divides the batch into.
        counted: what `bytes` counts.
        alone: whether one chip does the work, while the others wait.
        exchanges: whether chips may exchange anything; a clip or a layer of text on one chip has nothing to exchange.
    """

    stage: str
    steps: int
    flops: float
    bytes: float
    program: str = ""
    runs: float = 1.0
    per_shard: bool = False
    counted: str = LEAST
    alone: bool = False
    exchanges: bool = True


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """The work of one chip in a run of a compiled program, and how many parts its mesh divides a batch into."""

    work: ProgramWork
    batch_shards: int


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
    its memory traffic at the chip's bandwidth, and the bytes exchanged at the rate of one ring. The expected time takes
    compute and memory at `efficiency` of their peaks. `clips` adds the synthesis of that many training clips by the
    same model. `compiled` are files of `jsurgery compile --json`, of one stage or of all, whose counts replace the cost
    model's; "sample" stands for `evaluate`. A stage without a compiled program is assumed to exchange nothing. Raises
    InputError for a file of another topology.
    """
    check_report(report)
    chip, chips = parse_topology(topology)
    if not 0 < efficiency <= 1:
        raise InputError(f"--efficiency: expected a share of the peak, in (0, 1], found {efficiency}")
    programs = read_programs(compiled, topology)
    sizes = find_sizes(config, config_name)
    row = lambda work: estimate(work, chip, chips, programs.get(work.program), efficiency)
    rows = [row(work) for work in work_of_stages(config, sizes)]
    synthesis_rows = [row(synthesis(config, sizes.transformer, clips))] if clips else []
    result = {
        "topology": topology,
        "chips": chips,
        "efficiency": efficiency,
        "stages": rows + synthesis_rows,
        "chip_hours": {side: sum(row["chip_hours"][side] for row in rows) for side in ("bound", "expected")},
        "source": "estimate: published rates of the chip; counts in compiled programs, or by jsurgery's cost model",
    }
    print(as_text(result), flush=True)
    if report is not None:
        write_json(epath.Path(report), result)


def read_programs(files: Sequence[str], topology: str) -> dict[str, CompiledProgram]:
    """The compiled programs by name, from files of `jsurgery compile --json`."""
    programs = {}
    for file in files:
        try:
            compiled = json.loads(epath.Path(file).read_text())
            compiled_for = compiled["topology"]
            if "phases" in compiled:  # of --stage=all; a phase that does not fit has no program
                found = {row["program"]: row for row in compiled["phases"] if "hbm_bytes" in row}
            else:
                found = {compiled["stage"]: compiled}
            programs |= {name: compiled_program(row) for name, row in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: expected a file of `jsurgery compile --json`, found {error!r}") from None
        if compiled_for != topology:
            raise InputError(f"{file}: compiled for {compiled_for}, expected {topology}")
    return programs


def compiled_program(row: Mapping[str, Any]) -> CompiledProgram:
    counts = (float(row[field.name]) for field in dataclasses.fields(ProgramWork))
    return CompiledProgram(ProgramWork(*counts), row["mesh"]["data"] * row["mesh"]["fsdp"])


def work_of_stages(config: ConfigDict, sizes: ModelSizes) -> list[StageWork]:
    """The stages of a surgery whose time is computation on the chips."""
    network, video = sizes.transformer, config.video
    work = dataclasses.replace(workload(config, network), config=network)
    softmax = (1,) * network.num_layers
    per_step = velocities_per_step(config.sampler.guidance)
    velocities = config.sampler.steps * per_step
    passes = 3 + (config.model.remat != "none")
    teacher, hybrid = model_bytes(work, softmax), planned_forward(config, work)[1]
    trace, distill, finetune = config.trace.batch, config.distill.batch, config.finetune.batch
    batches, evaluated = math.ceil(len(traced_prompts(config)) / trace), EVALUATED * config.evaluate.prompts
    forward = model_flops(work, softmax)
    # For every held-out step: the teacher's forward, and one with each block at each rate.
    forwards = config.distill.velocity_steps * (1 + network.num_layers * len(config.hybrid.rates))
    examples = distill * (per_step if config.distill.mode == "sampling" else 1)
    one_example_bytes = distillation_bytes(work, config.hybrid.rates)
    distilling, tuning = (step_flops(config, network, stage) for stage in ("distill", "finetune"))
    held_out = config.trace.holdout * config.trace.keep_steps
    measured = min(held_out, config.distill.error_steps or held_out)
    of_prompt = text_encoder_cost(sizes.text_encoder, config.text_length, 2)
    decoded = vae_cost(sizes.vae, video.frames, video.height, video.width)[1]
    shown = EVALUATED * min(config.evaluate.videos, config.evaluate.prompts)
    one_example = distillation_flops(work, config.hybrid.rates)
    return [
        StageWork(
            "text encoder", config.trace.prompts + 1, of_prompt.flops, of_prompt.bytes / 8, alone=True, exchanges=False
        ),
        StageWork("trace", batches * velocities, trace * forward, trace * teacher, "trace", 1 / per_step),
        StageWork("distill", config.distill.steps, distilling, examples * one_example_bytes, "distill"),
        StageWork(
            "attention errors of blocks", measured, one_example, one_example_bytes, "attention_errors", per_shard=True
        ),
        StageWork("velocity errors of blocks", forwards, forward, teacher, "velocity_errors", per_shard=True),
        StageWork("finetune", config.finetune.steps, tuning, finetune * hybrid * passes, "finetune"),
        StageWork(
            "evaluate", evaluated * velocities, forward, teacher, "sample", 1 / (config.evaluate.batch * per_step)
        ),
        StageWork("decode", shown, decoded.flops, decoded.bytes, exchanges=False),
    ]


def synthesis(config: ConfigDict, network: WanConfig, clips: int) -> StageWork:
    """The work of sampling training clips from the teacher."""
    work = dataclasses.replace(workload(config, network), config=network)
    steps = clips * config.sampler.steps * velocities_per_step(config.sampler.guidance)
    softmax = (1,) * network.num_layers
    return StageWork(f"synthesize {clips} clips", steps, model_flops(work, softmax), model_bytes(work, softmax))


def estimate(
    work: StageWork, chip: Chip, chips: int, program: CompiledProgram | None, efficiency: float
) -> dict[str, Any]:
    """The row of a stage. `program` does its work, None if it was not compiled."""
    sharing = 1 if work.alone else chips
    each = ProgramWork(work.flops / sharing, work.bytes / sharing, 0.0)
    if program is not None:
        runs = work.runs / (program.batch_shards if work.per_shard else 1)
        each = ProgramWork(*(runs * n for n in dataclasses.astuple(program.work)))
    times = each.seconds(chip)
    expected = max(times["compute"] / efficiency, times["memory"] / efficiency, times["exchange"])
    hours = chips * work.steps / 3600
    return {
        "stage": work.stage,
        "steps": work.steps,
        "flops_per_step": each.flops * sharing,
        "seconds": times,
        "counted_by": work.counted if program is None else COMPILER,
        "exchange_known": program is not None or not work.exchanges,
        "bound_by": bound_by(times),
        "step_seconds": {"bound": max(times.values()), "expected": expected},
        "chip_hours": {"bound": max(times.values()) * hours, "expected": expected * hours},
    }


def as_text(result: dict[str, Any]) -> str:
    """The table that the command prints, in Markdown."""
    share = f"{result['efficiency']:.0%} of the peak"
    lines = [
        f"{result['topology']}, {result['chips']} chips: estimates, not measured. Seconds a step at the chip's rates:",
        "| stage | steps | PFLOP a step | compute | memory | exchange | bound by | "
        f"s a step at {share} | chip-hours | counted by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["stages"]:
        seconds = row["seconds"]
        exchange = f"{seconds['exchange']:.3g}" if row["exchange_known"] else "?"
        cells = [row["stage"], str(row["steps"]), f"{row['flops_per_step'] / 1e15:.3g}"]
        cells += [f"{seconds['compute']:.3g}", f"{seconds['memory']:.3g}", exchange, row["bound_by"]]
        cells += [f"{row['step_seconds']['expected']:.3g}", f"{row['chip_hours']['expected']:.1f}", row["counted_by"]]
        lines.append("| " + " | ".join(cells) + " |")
    if not all(row["exchange_known"] for row in result["stages"]):
        lines.append("?: exchange is not known without a file of `jsurgery compile --json`")
    hours = result["chip_hours"]
    lines.append(
        f"surgery: {hours['expected']:.1f} chip-hours at {share}, {hours['bound']:.1f} at the bound; "
        f"the paper's bound for Wan2.1 1.3B: {PAPER_GPU_HOURS} GPU-hours"
    )
    return "\n".join(lines)
