"""Training data: encode reads videos, synthesize samples them from a teacher."""

from jsurgery.commands.dry_run import add_dry_run, dry_run_encoding, dry_run_sampling, tell_cut
from jsurgery.commands.options import Commands, Options, Overrides, add_processes, join_processes, read_config


def add(commands: Commands) -> None:
    text = "Encode videos and captions into the latents and text embeddings that finetune reads."
    command = commands.add("encode", run_encode, text)
    text = "A folder of videos with .txt captions, or an index: .jsonl, .json, .csv, .tsv or .parquet."
    command.add_argument("--videos", required=True, help=text)
    command.add_argument("--root", metavar="FOLDER", help="Where an index's paths start (default: its folder).")
    text = "The folder that gets encoded/. Running it again resumes."
    command.add_argument("--workdir", required=True, help=text)
    add_processes(command)
    add_dry_run(command)

    command = commands.add(
        "synthesize", run_synthesize, "Sample training clips from a teacher, and store them as encode does."
    )
    command.add_argument("--prompts_file", required=True, help="A text file with one prompt a line.")
    text = "The folder that gets synthesized/. Running it again resumes."
    command.add_argument("--workdir", required=True, help=text)
    add_processes(command)
    add_dry_run(command)


def run_encode(options: Options, overrides: Overrides) -> None:
    config = read_config(options, overrides)
    if options.dry_run:
        from jsurgery.data.clip_index import check_usable, find_clips
        from jsurgery.runtime.progress import say

        clips = find_clips(options.videos, options.root)
        check_usable(clips, config.data.max_skipped)
        dry_run_encoding(config, options, len(clips))
        say(f"encode: {len(clips)} clips, of which {sum(bool(clip.problem) for clip in clips)} cannot be used")
        return
    join_processes(options)
    from jsurgery.data.encode import encode_videos

    print(encode_videos(config, options.videos, options.root, options.workdir))


def run_synthesize(options: Options, overrides: Overrides) -> None:
    config = read_config(options, overrides)
    from jsurgery.data.prompts import read_prompts

    prompts = read_prompts(options.prompts_file)
    if options.dry_run:
        dry_run_sampling("synthesize", config, options, len(prompts), config.data.batch)
        tell_cut(config, prompts)
        return
    join_processes(options)
    from jsurgery.data.synthesize import synthesize_clips

    print(synthesize_clips(config, prompts, options.workdir))
