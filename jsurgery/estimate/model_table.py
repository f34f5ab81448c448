"""models: the table of published models, what their makers sample them with, and what of them fits on a machine."""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.errors import DoesNotFit, InputError
from jsurgery.estimate.chips import GIB
from jsurgery.estimate.dry_run import Machine, machine_of
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report, markdown_table
from jsurgery.load_config import load_config
from jsurgery.runtime.mesh import abstract_mesh
from jsurgery.surgery.phases import COMPUTING, on_mesh, phases_of
from jsurgery.wan.cost import parameters
from jsurgery.wan.memory import on_sampling_mesh, sampling_phases
from jsurgery.wan.model_config import TextEncoderConfig, VaeConfig
from jsurgery.wan.model_sizes import ModelSizes, find_sizes, network_of
from jsurgery.wan.models import READ, REFUSED, Model
from jsurgery.wan.tell_model import default_settings

# How a model is fine-tuned where there is little memory: one example at a time, and few numbers learn.
LORA = {"lora_rank": 8, "accumulate": 16}


def show_models(topology: str, report: str | None) -> None:
    """Prints the table for the devices of a topology, or of this machine where it is empty; `report` gets it as JSON.

    Raises InputError for an unknown topology.
    """
    check_report(report)
    machine = with_host_memory(machine_of(topology))
    rows = [model_row(model, machine) for model in READ]
    memory = "" if machine.memory is None else f", {machine.memory / GIB:.0f} GiB each"
    print(f"{machine.name}, {machine.count} devices{memory}: arithmetic alone, in the shipped config of each model\n")
    header = ["model", "--kind", "parameters", "blocks x width", "sampled with", "sample", "surgery", "… with a LoRA"]
    print(markdown_table(header, [cells(row) for row in rows]))
    fields = f"finetune.lora_rank={LORA['lora_rank']} and finetune.accumulate={LORA['accumulate']}"
    print(f"\n… with a LoRA: fine-tuning with {fields}.\n\nNot read:\n")
    print(markdown_table(["model", "--kind", "what it is"], [[row.name, row.kind, row.task] for row in REFUSED]))
    if report is not None:
        refused = [{"model": row.name, "kind": row.kind, "task": row.task} for row in REFUSED]
        found = {"machine": machine.name, "devices": machine.count, "memory": machine.memory}
        write_json(epath.Path(report), found | {"models": rows, "refused": refused})


def with_host_memory(machine: Machine) -> Machine:
    """The machine; where its devices do not tell their memory, as CPUs do not, with that of the whole computer."""
    if machine.memory is not None or machine.chip is not None:
        return machine
    total = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // machine.count if hasattr(os, "sysconf") else None
    )
    return dataclasses.replace(machine, memory=total)


def model_row(model: Model, machine: Machine) -> dict[str, Any]:
    """A model's row, for JSON. `sample`, `surgery` and `lora` are the bytes a device, and whether they fit."""
    sizes, config = sizes_and_config(model, machine.name)
    network = sizes.transformer
    return {
        "model": model.name,
        "kind": model.kind,
        "repository": model.repository,
        "parameters": parameters(network),
        "blocks": network.num_layers,
        "width": network.dim,
        "any_size": model.transformer is None,
        "config": model.config,
        "defaults": dict(model.defaults) or {f"sampler.{name}": config.sampler[name] for name in ("steps", "guidance")},
        "sample": bytes_of(lambda: sampling_bytes(config, sizes, machine), machine),
        "surgery": bytes_of(lambda: surgery_bytes(config, sizes, machine), machine),
        "lora": bytes_of(lambda: surgery_bytes(with_lora(config), sizes, machine), machine),
    }


def with_lora(config: ConfigDict) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.finetune.update(LORA | {"batch": LORA["accumulate"]})
    return changed


def sizes_and_config(model: Model, topology: str) -> tuple[ModelSizes, ConfigDict]:
    """The sizes of a model and the config that fits it, with the preset for a topology if there is one.

    A kind that any size may have stands there with those of Wan2.1 1.3B.
    """
    config = model.config
    if model.transformer is None:
        config = "wan_1_3b"
    elif config == "tiny":
        tiny = load_config(config)
        return find_sizes(tiny, config), tiny
    settings = default_settings(model, {})
    if "sampler.steps" in settings:
        settings["trace.keep_steps"] = settings["sampler.steps"]
    sizes = ModelSizes(model.name, network_of(model), TextEncoderConfig(), VaeConfig(**model.vae))
    with contextlib.suppress(InputError):  # there is no preset for these devices
        return sizes, load_config(f"{config}@{topology}", settings)
    return sizes, load_config(config, settings)


def sampling_bytes(config: ConfigDict, sizes: ModelSizes, machine: Machine) -> int:
    placed = on_sampling_mesh("sample", config, sizes, 1, machine.count, machine.memory, tell=lambda line: None)
    phases = sampling_phases(placed, sizes, abstract_mesh(placed.mesh), 1, 1)
    return max(phase.bytes for phase in phases)


def surgery_bytes(config: ConfigDict, sizes: ModelSizes, machine: Machine) -> int:
    """The largest phase of all stages, each on its own mesh."""
    peaks = []
    for stage in COMPUTING:
        placed = on_mesh(stage, config, sizes, machine.count, machine.memory, tell=lambda line: None)
        peaks += [phase.bytes for phase in phases_of(stage, placed, sizes, abstract_mesh(placed.mesh))]
    return max(peaks)


def bytes_of(count: Callable[[], int], machine: Machine) -> dict[str, Any]:
    try:
        return {"fits": None if machine.memory is None else True, "bytes": count()}
    except DoesNotFit as error:
        return {"fits": False, "error": str(error)}


def cells(row: dict[str, Any]) -> list[str]:
    defaults = row["defaults"]
    words = [f"{defaults['sampler.steps']} steps, guidance {defaults['sampler.guidance']:g}"]
    words += [f"shift {defaults['sampler.shift']:g}"] if "sampler.shift" in defaults else []
    size = "any" if row["any_size"] else f"{row['blocks']} x {row['width']}"
    count = "any" if row["any_size"] else f"{row['parameters'] / 1e9:.3g} B"
    fits = lambda found: f"{found['bytes'] / GIB:.1f} GiB" if "bytes" in found else "does not fit"
    memory = [fits(row[command]) for command in ("sample", "surgery", "lora")]
    return [row["model"], row["kind"], count, size, ", ".join(words), *memory]
