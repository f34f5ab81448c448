"""sample: makes videos from prompts."""

from jsurgery.commands.dry_run import add_dry_run, dry_run_sampling, dry_run_streaming, tell_cut
from jsurgery.commands.options import (
    SAMPLE_FIELDS,
    Commands,
    Options,
    Overrides,
    add_fields,
    add_lora,
    read_sampling_config,
)


def add(commands: Commands) -> None:
    command = commands.add("sample", run_sample, "Make videos from prompts.", config=None)
    prompts = command.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="What the video shows.")
    prompts.add_argument(
        "--prompts_file", help="A text file with one prompt a line. Running it again makes the videos still missing."
    )
    command.add_argument(
        "--output",
        help="A file: .mp4, .gif or .png (default: out.mp4). With --prompts_file a folder of mp4 (default: samples).",
    )
    text = "The first frame of the videos, for a model that takes one (Wan2.2 TI2V 5B); cropped to their aspect."
    command.add_argument("--image", metavar="FILE", help=text)
    text = "Make videos chunk after chunk, in memory that does not grow with --frames, to an mp4 that can be played "
    text += "meanwhile; for models whose blocks are all causal chunks of one length, such as C3O1."
    command.add_argument("--stream", action="store_true", help=text)
    add_fields(command, SAMPLE_FIELDS)
    add_lora(command)
    add_dry_run(command)


def run_sample(options: Options, overrides: Overrides) -> None:
    config = read_sampling_config(options, ({"sampler.noise": "frame"} if options.stream else {}) | overrides)
    from jsurgery.data.prompts import read_prompts
    from jsurgery.sample import first_frame, sample_videos
    from jsurgery.stream import check_stream, stream_videos

    single = options.prompts_file is None
    prompts = [options.prompt] if single else read_prompts(options.prompts_file)
    output = options.output or ("out.mp4" if single else "samples")
    if options.dry_run:
        if options.image is not None and config.model.path:
            first_frame(config, options.image)
        if options.stream:
            check_stream(config, output if single else None)
            dry_run_streaming(config, options, len(prompts), output)
        else:
            dry_run_sampling("sample", config, options, len(prompts), 1, output)
        tell_cut(config, prompts)
        return
    make = stream_videos if options.stream else sample_videos
    for file in make(config, prompts, output, single, options.image):
        print(file, flush=True)
