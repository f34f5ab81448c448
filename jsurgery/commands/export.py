"""export: converts a model folder into the formats that phones run."""

import importlib

from jsurgery.commands.options import (
    VIDEO_FIELDS,
    Commands,
    Options,
    Overrides,
    add_fields,
    given_fields,
    positive,
    positives,
    read_config,
    some_of,
)

FORMATS, PRECISIONS, CHIPS = "tflite,savedmodel,onnx,qnn", "float32,fp16,int8,int4,w8a16", "SM8750,SM8650"
AI_HUB_RUNTIMES = ("qnn_context_binary", "qnn_dlc", "precompiled_qnn_onnx", "onnx", "tflite")


def add(commands: Commands) -> None:
    text = "Convert a model to TFLite, ONNX and Qualcomm's NPU. parity.json compares each with the original."
    command = commands.add("export", run_export, text)
    text = "The folder that gets export/. Running it again makes what is missing."
    command.add_argument("--workdir", required=True, help=text)
    command.add_argument("--model", help="A model folder or a bundled name (default: the workdir's model/).")
    command.add_argument("--formats", type=some_of(FORMATS), default=FORMATS, help=f"The formats (default: {FORMATS}).")
    text = f"For the format tflite, some of {PRECISIONS} (default: float32,fp16)."
    command.add_argument("--precision", type=some_of(PRECISIONS), default="float32,fp16", help=text)
    command.add_argument(
        "--chips", type=some_of(CHIPS), default="SM8750", help=f"For the format qnn, some of {CHIPS} (default: SM8750)."
    )
    command.add_argument("--blocks_per_file", type=positive, default=1, help="Blocks in a file (default: 1).")
    text = "Make these parts alone, such as block_00,head (default: all). A part is loaded by itself."
    command.add_argument("--parts", type=lambda names: names.split(","), default=(), metavar="NAMES", help=text)
    command.add_argument("--one_file", action="store_true", help="Write the whole transformer to one file.")
    text = "Also sample N sprites videos with the exported files and score them."
    command.add_argument("--score", type=positive, metavar="N", help=text)
    add_fields(command, VIDEO_FIELDS)

    text = "Also compile, profile and run on this phone at Qualcomm AI Hub."
    command.add_argument("--ai_hub", metavar="DEVICE", help=text)
    command.add_argument("--ai_hub_runtime", choices=AI_HUB_RUNTIMES, default=AI_HUB_RUNTIMES[0], help="What it runs.")
    command.add_argument("--ai_hub_compile_options", default="", help="For compile jobs, such as --truncate_64bit_io.")
    command.add_argument("--ai_hub_options", default="", help="Options of profile and inference jobs.")
    command.add_argument(
        "--ai_hub_link", action="store_true", help="Also link all parts into one binary, which needs qnn_dlc."
    )

    command.add_argument(
        "--ddr_table", action="store_true", help="Only print the memory traffic of a block, as compiled."
    )
    text = "The numbers of frames in the table (default: 81,101,121,141)."
    command.add_argument("--ddr_frames", type=positives, default=(), help=text)
    text = "How many queries or keys a tile has in the table (default: 512)."
    command.add_argument("--ddr_tile", type=positive, help=text)


def run_export(options: Options, overrides: Overrides) -> None:
    config = read_config(options, overrides | given_fields(options, VIDEO_FIELDS))
    exporting = importlib.import_module("jsurgery.export.run_export")

    if options.ddr_table:
        tile = options.ddr_tile or 0
        exporting.ddr_table(config, options.workdir, options.chips, frames=options.ddr_frames, tile=tile)
        return
    hub = None
    if options.ai_hub:
        names = ("ai_hub", "ai_hub_runtime", "ai_hub_compile_options", "ai_hub_options")
        hub = [getattr(options, name) for name in names] + ["link" if options.ai_hub_link else ""]
    print(
        exporting.export(
            config,
            options.workdir,
            model=options.model,
            formats=options.formats,
            precisions=options.precision,
            chips=options.chips,
            blocks_per_file=0 if options.one_file else options.blocks_per_file,
            only=options.parts,
            score=options.score or 0,
            ai_hub=hub,
        )
    )
