"""Evaluation of any model: evaluate vbench, vbench-results, fidelity, study, study-results.

`evaluate` without such a word is a stage of the surgery.
"""

from etils import epath

from jsurgery.commands.dry_run import add_dry_run, dry_run_sampling
from jsurgery.commands.options import (
    SAMPLE_FIELDS,
    Commands,
    Options,
    Overrides,
    add_fields,
    add_json,
    add_processes,
    join_processes,
    positive,
    positives,
    read_sampling_config,
    shard,
    takes_no_config,
)
from jsurgery.errors import InputError, did_you_mean

SUBJECTS = ("vbench", "vbench-results", "fidelity", "study", "study-results")


def join_words(arguments: list[str]) -> list[str]:
    """Joins `evaluate vbench` into one word for argparse, as `evaluate` alone is another command with its own flags.

    Raises InputError for another second word.
    """
    if arguments[:1] != ["evaluate"] or not arguments[1:2] or arguments[1].startswith("-"):
        return arguments
    command = " ".join(arguments[:2])
    if arguments[1] not in SUBJECTS:
        near = did_you_mean(command, (f"evaluate {subject}" for subject in SUBJECTS))
        raise InputError(f"{command}: unknown command of `jsurgery`{near} (see `jsurgery --help`)")
    return [command, *arguments[2:]]


def add(commands: Commands) -> None:
    add_vbench(commands)
    add_fidelity(commands)
    add_study(commands)


def add_vbench(commands: Commands) -> None:
    text = "Sample videos for VBench, and score them if its package is installed. Running it again resumes."
    command = commands.add("evaluate vbench", run_vbench, text, config=None)
    command.add_argument("--prompts", required=True, help="VBench's *full_info.json, or a text file of its prompts.")
    command.add_argument(
        "--info", metavar="FILE", help="VBench's *full_info.json, with the dimensions of a text file's prompts."
    )
    command.add_argument("--augmented", metavar="FILE", help="The longer prompts that the model gets, line by line.")
    command.add_argument("--output", required=True, help="The folder that gets videos/ and results/.")
    command.add_argument(
        "--subset", type=positive, default=1, metavar="N", help="Take every N-th prompt (the paper: every 5th)."
    )
    command.add_argument("--seeds", type=positive, metavar="N", help="Videos per prompt (default: as VBench asks).")
    text = "What selects the noise: a video's prompt and its number (video), or its number alone (index)."
    command.add_argument("--seed_rule", choices=["video", "index"], default="video", help=text)
    command.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="Make only share I, from 0, of N shares."
    )
    add_fields(command, SAMPLE_FIELDS)
    add_processes(command)
    add_dry_run(command)

    text = "Sum results of VBench or VBench-2.0 up as on its leaderboard, with those of the paper, as Markdown."
    command = commands.add("evaluate vbench-results", run_vbench_results, text, config=None)
    command.add_argument("files", nargs="+", metavar="FILE", help="The *_eval_results.json, or a folder of them.")
    command.add_argument("--name", dest="model", default="this model", help="The model's name in the table.")
    add_json(command)


def add_fidelity(commands: Commands) -> None:
    text = "Compare videos and velocities of models with those of their teacher, for equal prompts and noise."
    command = commands.add("evaluate fidelity", run_fidelity, text, config=None)
    command.add_argument("--teacher", required=True, help="A folder, a bundled name or a repository.")
    text = "The folders of the models, such as RUN/model."
    command.add_argument("--model", required=True, nargs="+", help=text, metavar="FOLDER")
    command.add_argument("--prompts_file", required=True, help="A text file with one prompt a line.")
    text = "The folder that gets fidelity.json. Running it again resumes."
    command.add_argument("--workdir", required=True, help=text)
    text = "The numbers of frames (default: the config's)."
    command.add_argument("--durations", type=positives, default=(), metavar="F,F,…", help=text)
    add_fields(command, {flag: field for flag, field in SAMPLE_FIELDS.items() if flag not in ("model", "frames")})
    text = "Also compute LPIPS with the weights of lpips.LPIPS(net='alex') in this safetensors file."
    command.add_argument("--lpips", metavar="FILE", help=text)
    text = "Also compute CLIP scores with the CLIPModel of this folder or repository."
    command.add_argument("--clip", metavar="FOLDER", help=text)
    add_json(command)
    add_processes(command)
    add_dry_run(command, json=False)


def add_study(commands: Commands) -> None:
    text = "Make a page on which people choose between videos of two models, and the secret key to their answers."
    command = commands.add("evaluate study", run_study, text, config=None)
    for side in "ab":
        text = "A folder of mp4 files, which have the same names in both folders."
        command.add_argument(f"--{side}", required=True, metavar="DIR", help=text)
    text = "How many pairs, drawn at random (default: 50)."
    command.add_argument("--prompts", type=positive, default=50, metavar="N", help=text)
    command.add_argument("--info", metavar="FILE", help="VBench's *full_info.json, with the dimensions of prompts.")
    command.add_argument("--output", default="study", help="The folder that gets study.html and study.key.json.")
    text = "The number that selects the prompts. Sides and order are drawn anew each time."
    command.add_argument("--seed", type=int, default=0, help=text)

    text = "Sum up the answers: preferences by dimension, confidence intervals and a sign test, as Markdown."
    command = commands.add("evaluate study-results", run_study_results, text, config=None)
    command.add_argument("files", nargs="+", metavar="FILE", help="The answers that participants saved.")
    command.add_argument("--key", metavar="FILE", help="The study.key.json (default: the one beside the first file).")
    add_json(command)


def run_vbench(options: Options, overrides: Overrides) -> None:
    config = read_sampling_config(options, overrides)
    if options.coordinator and options.shard != (0, 1):
        raise InputError("--shard: expected none with --coordinator, which already gives each process a share")
    from jsurgery.evaluate.vbench import evaluate, plan_videos, read_suite

    suite, prompts = read_suite(options.prompts, options.info, options.augmented, options.subset)
    rule, seeds = options.seed_rule, options.seeds
    if options.dry_run:
        videos = plan_videos(config, suite, prompts, epath.Path(options.output), rule=rule, seeds=seeds)
        own = videos[options.shard[0] :: options.shard[1]]
        dry_run_sampling("vbench", config, options, len(own), 1, options.output)
        return
    join_processes(options)
    evaluate(config, suite, prompts, options.output, rule=rule, seeds=seeds, shard=options.shard)


def run_fidelity(options: Options, overrides: Overrides) -> None:
    models, options.model, options.frames = options.model, options.teacher, None
    config = read_sampling_config(options, overrides)
    from jsurgery.data.prompts import read_prompts

    prompts = read_prompts(options.prompts_file)
    if options.dry_run:
        videos = (len(models) + 2) * len(prompts) * max(1, len(options.durations))  # the teacher's, and the control's
        dry_run_sampling("fidelity", config, options, videos, 1)
        return
    join_processes(options)
    from jsurgery.evaluate.fidelity import evaluate_fidelity

    evaluate_fidelity(
        config,
        models,
        prompts,
        options.workdir,
        options.durations,
        options.json,
        lpips_weights=options.lpips,
        clip_model=options.clip,
    )


def run_vbench_results(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.evaluate.vbench_scores import report_results

    report_results(options.files, options.model, options.json)


def run_study(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.report.study_page import build_study

    a, b = options.a, options.b
    print(build_study(a, b, options.output, prompts=options.prompts, info=options.info, seed=options.seed))


def run_study_results(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.evaluate.study import report_study

    report_study(options.files, options.key, options.json)
