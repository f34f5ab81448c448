"""Any model's quality: evaluate vbench, vbench-results, fidelity, study, study-results. `evaluate` alone is a stage."""

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
from jsurgery.errors import InputError

SUBJECTS = ("vbench", "vbench-results", "fidelity", "study", "study-results")


def join_words(arguments: list[str]) -> list[str]:
    """`evaluate vbench ...` as one word, for argparse: `evaluate` by itself is a stage with flags of its own."""
    if arguments[:1] == ["evaluate"] and arguments[1:2] and arguments[1] in SUBJECTS:
        return [" ".join(arguments[:2]), *arguments[2:]]
    return arguments


def add(commands: Commands) -> None:
    add_vbench(commands)
    add_fidelity(commands)
    add_study(commands)


def add_vbench(commands: Commands) -> None:
    text = "videos in VBench's layout and names, scored where its package is installed; running it again resumes"
    command = commands.add("evaluate vbench", run_vbench, text, config=None)
    command.add_argument("--prompts", required=True, help="VBench's *full_info.json, or a text file of its prompts")
    command.add_argument("--info", metavar="FILE", help="*full_info.json: the dimensions of a text file's prompts")
    command.add_argument("--augmented", metavar="FILE", help="what the model is told instead, line by line")
    command.add_argument("--output", required=True, help="a folder: gets videos/ and results/")
    command.add_argument("--subset", type=positive, default=1, metavar="N", help="every N-th prompt (the paper's: 5)")
    command.add_argument("--seeds", type=positive, metavar="N", help="videos a prompt (default: VBench's)")
    text = "what the noise depends on"
    command.add_argument("--seed_rule", choices=["video", "index"], default="video", help=text)
    command.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="share I, from 0, of N commands")
    add_fields(command, SAMPLE_FIELDS)
    add_processes(command)

    text = "sums of VBench's or VBench-2.0's results, as the leaderboard's, beside the paper's, as Markdown"
    command = commands.add("evaluate vbench-results", run_vbench_results, text, config=None)
    command.add_argument("files", nargs="+", metavar="FILE", help="*_eval_results.json, or a folder of them")
    command.add_argument("--name", default="this model")
    add_json(command)


def add_fidelity(commands: Commands) -> None:
    text = "videos and velocities of models against their teacher's, at equal prompts and noise"
    command = commands.add("evaluate fidelity", run_fidelity, text, config=None)
    command.add_argument("--teacher", required=True, help="a folder, a bundled name or a repository")
    text = "folders of models, such as RUN/model"
    command.add_argument("--model", required=True, nargs="+", help=text, metavar="FOLDER")
    command.add_argument("--prompts_file", required=True, help="one prompt a line")
    command.add_argument("--workdir", required=True, help="gets fidelity.json; running it again resumes")
    text = "frames (default: the config's)"
    command.add_argument("--durations", type=positives, default=(), metavar="F,F,…", help=text)
    add_fields(command, {flag: field for flag, field in SAMPLE_FIELDS.items() if flag not in ("model", "frames")})
    text = "also LPIPS, by lpips.LPIPS(net='alex') in this safetensors file"
    command.add_argument("--lpips", metavar="FILE", help=text)
    text = "also CLIP's scores, by a CLIPModel's folder or repository"
    command.add_argument("--clip", metavar="FOLDER", help=text)
    add_json(command)


def add_study(commands: Commands) -> None:
    text = "one page on which people say which of two videos they prefer, and the key that stays with you"
    command = commands.add("evaluate study", run_study, text, config=None)
    for side in "ab":
        text = "mp4 files, of the same names in both folders"
        command.add_argument(f"--{side}", required=True, metavar="DIR", help=text)
    text = "pairs, drawn at random (default: 50)"
    command.add_argument("--prompts", type=positive, default=50, metavar="N", help=text)
    command.add_argument("--info", metavar="FILE", help="VBench's *full_info.json: the dimensions of prompts")
    command.add_argument("--output", default="study", help="a folder: gets study.html and study.key.json")
    text = "of the drawn prompts; sides and orders are never repeatable"
    command.add_argument("--seed", type=int, default=0, help=text)

    text = "preferences per dimension with confidence intervals and a sign test, as Markdown"
    command = commands.add("evaluate study-results", run_study_results, text, config=None)
    command.add_argument("files", nargs="+", metavar="FILE", help="what participants saved")
    command.add_argument("--key", metavar="FILE", help="study.key.json (default: the one beside the first file)")
    add_json(command)


def run_vbench(options: Options, overrides: Overrides) -> None:
    config = read_sampling_config(options, overrides)
    if options.coordinator and options.shard != (0, 1):
        raise InputError("--shard: expected none with --coordinator, by which each process has its share")
    join_processes(options)
    from jsurgery.evaluate.vbench import evaluate, read_suite

    suite, prompts = read_suite(options.prompts, options.info, options.augmented, options.subset)
    rule, seeds = options.seed_rule, options.seeds
    evaluate(config, suite, prompts, options.output, rule=rule, seeds=seeds, shard=options.shard)


def run_fidelity(options: Options, overrides: Overrides) -> None:
    models, options.model, options.frames = options.model, options.teacher, None
    config = read_sampling_config(options, overrides)
    from jsurgery.data.prompts import read_prompts
    from jsurgery.evaluate.fidelity import evaluate_fidelity

    evaluate_fidelity(
        config,
        models,
        read_prompts(options.prompts_file),
        options.workdir,
        options.durations,
        options.json,
        lpips_weights=options.lpips,
        clip_model=options.clip,
    )


def run_vbench_results(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.evaluate.vbench_scores import report_results

    report_results(options.files, options.name, options.json)


def run_study(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.report.study_page import build_study

    a, b = options.a, options.b
    print(build_study(a, b, options.output, prompts=options.prompts, info=options.info, seed=options.seed))


def run_study_results(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.evaluate.study import report_study

    report_study(options.files, options.key, options.json)
