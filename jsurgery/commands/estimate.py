"""Estimates of what a model or a stage needs, without running it: models, cost, compile, roofline."""

import pathlib

from jsurgery.commands.options import (
    VIDEO_FIELDS,
    Commands,
    Options,
    Overrides,
    add_fields,
    add_json,
    given_fields,
    positive,
    takes_no_config,
)
from jsurgery.errors import InputError
from jsurgery.load_config import load_config, split_topology

FEATURE_MAPS = ("polynomial", "hedgehog")


def add(commands: Commands) -> None:
    text = "List the published models: which are read, what their makers sample them with, and what fits on a machine."
    command = commands.add_without_config("models", run_models, text)
    command.add_argument("--topology", default="", help="TPUs or GPUs, such as v5e-8 or h100 (default: this machine).")
    add_json(command)

    text = "Count parameters, FLOPs and bytes of a block and of the network. This needs no weights."
    command = commands.add("cost", run_cost, text)
    add_fields(command, VIDEO_FIELDS)
    command.add_argument("--plan", help="A name such as 15R2, or a plan.json (default: a hybrid model's own).")
    command.add_argument("--feature_map", choices=FEATURE_MAPS, default="polynomial", help="Default: polynomial.")
    add_json(command)
    command.add_argument("--figure", metavar="DIR", help="Also write cost.html to this folder.")

    text = "Compile a stage's step for TPUs without having any, and tell whether it fits and what the chips exchange."
    command = commands.add("compile", run_compile, text)
    choices = ["all", "distill", "finetune", "sample", "train"]
    text = "The stage whose step is compiled; `all` compiles every program of a command, with all that lies beside it."
    command.add_argument("--stage", required=True, choices=choices, help=text)
    text = "The command that --stage=all compiles (default: surgery)."
    command.add_argument("--of", choices=["surgery", "sample"], default="surgery", help=text)
    command.add_argument("--topology", help="The TPUs, such as v5e:4x4 (default: that of --config=NAME@TOPOLOGY).")
    command.add_argument("--num_slices", type=positive, default=1, help="How many such slices (default: 1).")
    add_json(command)

    text = "Estimate the step times and chip-hours of a whole surgery on a TPU topology."
    command = commands.add("roofline", run_roofline, text)
    command.add_argument("--topology", help="The TPUs, such as v6e:4x4 (default: that of --config=NAME@TOPOLOGY).")
    text = "The share of the chip's peak rates that is reached (default: 0.4)."
    command.add_argument("--efficiency", type=float, default=0.4, help=text)
    text = "Also estimate the synthesis of this many training clips, as a row of its own."
    command.add_argument("--clips", type=positive, default=0, help=text)
    text = "Files written by `compile --json`, whose FLOPs and bytes replace those of the cost model."
    command.add_argument("--compiled", nargs="+", default=[], metavar="FILE", help=text)
    add_json(command)


def run_models(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.estimate.model_table import show_models

    show_models(options.topology, options.json)


def run_cost(options: Options, overrides: Overrides) -> None:
    config = load_config(options.config, overrides | given_fields(options, VIDEO_FIELDS))
    from etils import epath

    from jsurgery.estimate.cost_table import as_text, count_cost
    from jsurgery.io.files import check_writable, read_object, write_json
    from jsurgery.io.results import check_report
    from jsurgery.report.cost_page import PAGE, write_cost_page

    check_report(options.json)
    if options.figure is not None:
        check_writable(epath.Path(options.figure) / PAGE, "--figure")
    costs = count_cost(config, options.config, options.plan, options.feature_map)
    print(as_text(costs), flush=True)
    if options.json is not None:
        write_json(epath.Path(options.json), costs)
    if options.figure is not None:
        front = pathlib.Path(options.plan or "").parent / "front.json"  # beside a plan.json, after `plan --front`
        found = read_object(front) if pathlib.Path(options.plan or "").is_file() and front.exists() else None
        print(write_cost_page(epath.Path(options.figure), costs, found))


def run_compile(options: Options, overrides: Overrides) -> None:
    config = load_config(options.config, overrides)
    topology = topology_of(options)
    from jsurgery.estimate.compile_ahead import compile_stage
    from jsurgery.estimate.compile_command import compile_command
    from jsurgery.estimate.quiet_libtpu import quiet_libtpu

    name, slices, report = options.config, options.num_slices, options.json
    with quiet_libtpu():
        if options.stage == "all":
            compile_command(config, name, options.of, topology, report=report)
        else:
            compile_stage(config, name, options.stage, topology, slices=slices, report=report)


def run_roofline(options: Options, overrides: Overrides) -> None:
    config = load_config(options.config, overrides)
    topology = topology_of(options)
    from jsurgery.estimate.roofline import roofline

    roofline(
        config,
        options.config,
        topology,
        efficiency=options.efficiency,
        clips=options.clips,
        compiled=options.compiled,
        report=options.json,
    )


def topology_of(options: Options) -> str:
    topology = options.topology or split_topology(options.config)[1]
    if not topology:
        raise InputError("--topology: expected one like v5e:4x4, or --config=NAME@TOPOLOGY")
    return topology
