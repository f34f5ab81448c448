"""The commands. Exit codes: 0 done, 1 a fault of ours, 2 bad input, 3 does not fit, 4 parity breached, 130 and 143
stopped by SIGINT and SIGTERM."""

import argparse
import contextlib
import ctypes
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from jsurgery.ablate.sweeps import TABLES
from jsurgery.config import load_config, split_topology
from jsurgery.errors import Diverged, DoesNotFit, InputError, Interrupted, ParityError, Terminated, refusal

STAGES = ("trace", "distill", "plan", "operate", "finetune", "evaluate", "report")
SAMPLE_FIELDS = {
    "model": "model.path",
    "frames": "video.frames",
    "height": "video.height",
    "width": "video.width",
    "steps": "sampler.steps",
    "guidance": "sampler.guidance",
    "shift": "sampler.shift",
    "solver": "sampler.solver",
    "negative_prompt": "sampler.negative_prompt",
    "seed": "seed",
}
COST_FIELDS = {name: f"video.{name}" for name in ("frames", "height", "width")}
# what may follow `evaluate`, which by itself is a stage
OF_EVALUATE = ("vbench", "vbench-results", "fidelity", "study", "study-results")
ARENA_MAX = -8  # of mallopt
CODES = {InputError: 2, Diverged: 2, DoesNotFit: 3, ParityError: 4, Interrupted: 130, Terminated: 143}


def main(arguments: Sequence[str] | None = None) -> int:
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax talks about every save
    warnings.filterwarnings("ignore", "Protobuf gencode version")  # grain, of the protobuf that the export needs
    share_memory()
    try:
        options, overrides = parse(sys.argv[1:] if arguments is None else arguments)
        options.command(options, overrides)
    except tuple(CODES) as error:
        return complain(error, CODES[type(error)])
    except KeyboardInterrupt:
        return complain("interrupted", CODES[Interrupted])
    except Exception as error:
        if (told := refusal(error)) is None:
            raise
        return complain(told, CODES[InputError])
    return 0


def share_memory() -> None:
    """Asks glibc for two pools of memory where it has one for every thread: each save of a checkpoint has new threads,
    and what they freed would stay theirs."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError, TypeError):  # another system's library
            ctypes.CDLL(None).mallopt(ARENA_MAX, 2)


def keep_compiled(config: ConfigDict) -> ConfigDict:
    """The same config. What the command compiles is kept for later ones, unless the config says no."""
    if config.compile_cache:
        from jsurgery.runtime.compile_cache import use_compile_cache

        use_compile_cache()
    return config


def complain(message: object, code: int) -> int:
    """One line on stderr; what a terminal would obey is spelt out. Returns the exit code."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(message).split()))
    print(f"jsurgery: {line}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str):
        raise InputError(f"{message} (see `{self.prog} --help`)")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Options of a command, and the `--config.a.b=value` overrides among the arguments."""
    overrides, rest = {}, []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--config."):
            if not equals:
                raise InputError(f"{name}: expected {name}=VALUE")
            overrides[name.removeprefix("--config.")] = value
        else:
            rest.append(argument)
    if rest[:1] == ["evaluate"] and rest[1:2] and rest[1] in OF_EVALUATE:
        rest[:2] = [" ".join(rest[:2])]

    parser = Parser(prog="jsurgery", description="Attention surgery for video diffusion transformers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(
        name: str, run: Callable, text: str, config: str | None = "tiny", otherwise: str = "by the model"
    ) -> Parser:
        sub = commands.add_parser(name, help=text, description=text)
        kind = f"a config file or a shipped name, and maybe @TOPOLOGY (default: {config or otherwise})"
        sub.add_argument("--config", default=config, help=kind)
        sub.set_defaults(command=run, name=name)
        return sub

    texts = {
        "surgery": "all stages in order; running it again resumes",
        "trace": "sample the teacher and keep the noisy latents on the way",
        "distill": "train the feature maps of every block at every rate",
        "plan": "choose every block's rate under the budget",
        "operate": "build the hybrid model",
        "finetune": "train the whole hybrid model briefly",
        "evaluate": "sample and score the model of every stage",
        "train": "train a tiny teacher from scratch",
    }
    for name, text in texts.items():
        sub = command(name, train if name == "train" else surgery, text)
        sub.add_argument("--workdir", required=True, help="where the files of this run go")
        if name != "train":
            add_processes(sub)
        if name == "plan":
            sub.add_argument("--front", action="store_true", help="also all plans that no other beats, as front.json")
    text = "one page about a run, as far as it has come; or about several"
    sub = command("report", report, text, config=None, otherwise="the run's own")
    about = sub.add_mutually_exclusive_group(required=True)
    about.add_argument("--workdir", help="the run; gets report.html")
    about.add_argument("--compare", nargs="+", metavar="RUN", help="workdirs of runs to put beside each other")
    sub.add_argument("--output", metavar="FILE", help="of --compare (default: compare.html)")
    add_processes(sub)
    sub = command("cost", cost, "parameters, FLOPs and bytes of a block and of the network; needs no weights")
    for flag, field in COST_FIELDS.items():
        sub.add_argument(f"--{flag}", help=f"short for --config.{field}", metavar="VALUE")
    sub.add_argument("--plan", help="a name like 15R2, or a plan.json (default: an operated model's own)")
    sub.add_argument("--feature_map", choices=["polynomial", "hedgehog"], default="polynomial")
    sub.add_argument("--json", metavar="FILE", help="also write the result here")
    sub.add_argument("--figure", metavar="DIR", help="also leave cost.html here")
    sub = command("ablate", ablate, "answer a question about the method by running its arms over several seeds")
    sub.add_argument("--table", choices=[*TABLES, "all", "evidence"], required=True)
    sub.add_argument("--seeds", type=positive, default=3, help="default: 3")
    sub.add_argument("--workdir", required=True, help="tables share what their arms have in common; runs are resumed")
    sub.add_argument("--results", metavar="FILE", help="also rewrite the table's section of this document")
    text = "where measurements are kept, and taken from (default: the workdir's measurements/)"
    sub.add_argument("--measurements", metavar="DIR", help=text)
    text = "measures seeds I, I + N, ... alone, beside N - 1 other runs; without it, a last run writes the tables"
    sub.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help=text)
    sub = command("sample", sample, "prompts to videos", config=None)
    prompts = sub.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt")
    prompts.add_argument("--prompts_file", help="one prompt a line; running it again makes the videos still missing")
    sub.add_argument("--output", help=".mp4, .gif or .png (default: out.mp4); with --prompts_file a folder of mp4")
    for flag, field in SAMPLE_FIELDS.items():
        sub.add_argument(f"--{flag}", help=f"short for --config.{field}", metavar="VALUE")
    text = "videos in VBench's layout and names, scored where its package is installed; running it again resumes"
    sub = command("evaluate vbench", evaluate_vbench, text, config=None)
    sub.add_argument("--prompts", required=True, help="VBench's *full_info.json, or a text file of its prompts")
    sub.add_argument("--info", metavar="FILE", help="*full_info.json: the dimensions of a text file's prompts")
    sub.add_argument("--augmented", metavar="FILE", help="what the model is told instead, line by line")
    sub.add_argument("--output", required=True, help="a folder: gets videos/ and results/")
    sub.add_argument("--subset", type=positive, default=1, metavar="N", help="every N-th prompt (the paper's: 5)")
    sub.add_argument("--seeds", type=positive, metavar="N", help="videos a prompt (default: VBench's)")
    sub.add_argument("--seed_rule", choices=["video", "index"], default="video", help="what the noise depends on")
    sub.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="share I, from 0, of N commands")
    for flag, field in SAMPLE_FIELDS.items():
        sub.add_argument(f"--{flag}", help=f"short for --config.{field}", metavar="VALUE")
    add_processes(sub)
    text = "sums of VBench's or VBench-2.0's results, as the leaderboard's, beside the paper's, as Markdown"
    sub = command("evaluate vbench-results", evaluate_vbench_results, text, config=None)
    sub.add_argument("files", nargs="+", metavar="FILE", help="*_eval_results.json, or a folder of them")
    sub.add_argument("--name", default="this model")
    sub.add_argument("--json", metavar="FILE", help="also write the result here")
    text = "videos and velocities of models against their teacher's, at equal prompts and noise"
    sub = command("evaluate fidelity", evaluate_fidelity, text, config=None)
    sub.add_argument("--teacher", required=True, help="a folder, a bundled name or a repository")
    sub.add_argument("--model", required=True, nargs="+", help="folders of models, such as RUN/model", metavar="FOLDER")
    sub.add_argument("--prompts_file", required=True, help="one prompt a line")
    sub.add_argument("--workdir", required=True, help="gets fidelity.json; running it again resumes")
    sub.add_argument("--durations", type=frames, default=(), metavar="F,F,…", help="frames (default: the config's)")
    for flag, field in SAMPLE_FIELDS.items():
        if flag not in ("model", "frames"):
            sub.add_argument(f"--{flag}", help=f"short for --config.{field}", metavar="VALUE")
    sub.add_argument("--lpips", metavar="FILE", help="also LPIPS, by lpips.LPIPS(net='alex') in this safetensors file")
    sub.add_argument("--clip", metavar="FOLDER", help="also CLIP's scores, by a CLIPModel's folder or repository")
    sub.add_argument("--json", metavar="FILE", help="also write the result here")
    text = "one page on which people say which of two videos they prefer, and the key that stays with you"
    sub = command("evaluate study", evaluate_study, text, config=None)
    for side in "ab":
        sub.add_argument(f"--{side}", required=True, metavar="DIR", help="mp4 files, of the same names in both folders")
    sub.add_argument("--prompts", type=positive, default=50, metavar="N", help="pairs, drawn at random (default: 50)")
    sub.add_argument("--info", metavar="FILE", help="VBench's *full_info.json: the dimensions of prompts")
    sub.add_argument("--output", default="study", help="a folder: gets study.html and study.key.json")
    sub.add_argument("--seed", type=int, default=0, help="of the drawn prompts; sides and orders are never repeatable")
    text = "preferences per dimension with confidence intervals and a sign test, as Markdown"
    sub = command("evaluate study-results", evaluate_study_results, text, config=None)
    sub.add_argument("files", nargs="+", metavar="FILE", help="what participants saved")
    sub.add_argument("--key", metavar="FILE", help="study.key.json (default: the one beside the first file)")
    sub.add_argument("--json", metavar="FILE", help="also write the result here")
    sub = command("encode", encode, "videos with captions to the latents and text embeddings that finetune reads")
    sub.add_argument("--videos", required=True, help="a folder with .txt captions, or .jsonl, .json, .csv, .parquet")
    sub.add_argument("--root", metavar="FOLDER", help="where an index's paths begin (default: the index's folder)")
    sub.add_argument("--workdir", required=True, help="gets encoded/; running it again resumes")
    add_processes(sub)
    sub = command("synthesize", synthesize, "clips that a teacher makes of prompts, as encode would leave them")
    sub.add_argument("--prompts_file", required=True, help="one prompt a line")
    sub.add_argument("--workdir", required=True, help="gets synthesized/; running it again resumes")
    add_processes(sub)
    sub = command("convert", convert, "a transformer from one checkpoint layout to another")
    sub.add_argument("--model", required=True, help="a folder, file or repository; or the original VAE or T5 .pth file")
    sub.add_argument("--output", required=True, help="a new folder; for comfyui a new .safetensors file")
    sub.add_argument("--layout", choices=["diffusers", "original", "comfyui"], default="diffusers")
    sub = command("verify", verify, "a checkpoint against diffusers and transformers, on this machine", config=None)
    sub.add_argument("--model", required=True, help="a folder, a bundled name or a repository")
    add_size(sub, frames=5, height=64, width=96)
    sub = command("push", push, "a model folder to the Hugging Face Hub, with a model card", config=None)
    sub.add_argument("--model", required=True, help="a folder in diffusers' layout")
    sub.add_argument("--repo", required=True, metavar="ORG/NAME")
    sub.add_argument("--private", action="store_true")
    sub.add_argument("--revision", metavar="BRANCH")
    sub = command("export", export, "a model folder to TFLite, ONNX and Qualcomm's NPU, with parity.json")
    sub.add_argument("--workdir", required=True, help="gets export/; running it again makes what is missing")
    sub.add_argument("--model", help="a model folder or a bundled name (default: the workdir's model/)")
    formats, precisions = "tflite,savedmodel,onnx,qnn", "float32,fp16,int8,int4,w8a16"
    sub.add_argument("--formats", type=some_of(formats), default=formats, help=f"default: {formats}")
    sub.add_argument("--precision", type=some_of(precisions), default="float32,fp16", help=f"of TFLite: {precisions}")
    sub.add_argument("--chips", type=some_of("SM8750,SM8650"), default="SM8750", help="of qnn: SM8750,SM8650")
    sub.add_argument("--blocks_per_file", type=positive, default=1, help="default: 1")
    sub.add_argument("--one_file", action="store_true", help="the transformer in one file, not in parts")
    sub.add_argument("--score", type=positive, metavar="N", help="also judge N sprites videos by the exported parts")
    sub.add_argument("--ai_hub", metavar="DEVICE", help="also compile, profile and run on a phone of Qualcomm AI Hub")
    runtimes = ["qnn_context_binary", "qnn_dlc", "precompiled_qnn_onnx", "onnx", "tflite"]
    sub.add_argument("--ai_hub_runtime", choices=runtimes, default=runtimes[0])
    sub.add_argument("--ai_hub_compile_options", default="", help="of compile jobs, such as --truncate_64bit_io")
    sub.add_argument("--ai_hub_options", default="", help="of profile and inference jobs")
    sub.add_argument("--ai_hub_link", action="store_true", help="also one binary of all parts; needs qnn_dlc")
    sub.add_argument("--ddr_table", action="store_true", help="instead: memory traffic a block, by the compiler")
    sub.add_argument("--ddr_frames", type=positives, default=(), help="of the table (default: 81,101,121,141)")
    sub.add_argument("--ddr_tile", type=positive, help="of the table: queries or keys at a time (default: 512)")
    for flag, field in COST_FIELDS.items():
        sub.add_argument(f"--{flag}", help=f"short for --config.{field}", metavar="VALUE")
    sub = command("compile", compile_ahead, "a stage's step for TPUs that are not there: does it fit, what moves")
    sub.add_argument("--stage", required=True, choices=["distill", "finetune", "sample", "train"])
    sub.add_argument("--topology", help="like v5e:4x4 (default: that of --config=NAME@TOPOLOGY)")
    sub.add_argument("--num_slices", type=positive, default=1)
    sub.add_argument("--json", metavar="FILE", help="also write the result here")
    sub = command("roofline", roofline, "an estimate of a whole surgery's step times and chip-hours on a TPU topology")
    sub.add_argument("--topology", help="like v6e:4x4 (default: that of --config=NAME@TOPOLOGY)")
    sub.add_argument("--efficiency", type=float, default=0.4, help="share of the peak rates to expect (default: 0.4)")
    sub.add_argument("--clips", type=positive, default=0, help="also the synthesis of so many training clips, apart")
    sub.add_argument("--compiled", nargs="+", default=[], metavar="FILE", help="of `compile --json`: what is exchanged")
    sub.add_argument("--json", metavar="FILE", help="also write the result here")
    text = "our transformer's forward, one attention layer or a step of distillation, beside others"
    bench = commands.add_parser("bench", help=text, description=text)
    subjects = bench.add_subparsers(required=True, metavar="SUBJECT", parser_class=Parser)
    text = "our forward beside diffusers', on the CPU"
    sub = subjects.add_parser("transformer", help=text, description=text)
    sub.set_defaults(command=bench_transformer, name="bench")
    weights = sub.add_mutually_exclusive_group()
    weights.add_argument("--model", help="a folder, a bundled name or a repository")
    weights.add_argument("--size", choices=["1.3b", "tiny"], default="1.3b", help="random weights (default: 1.3b)")
    add_size(sub, frames=1, height=480, width=832)
    sub.add_argument("--text_length", type=positive, default=512)
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    sub.add_argument("--runs", type=positive, default=3)
    text = "distillation of all blocks and rates in one pass beside one block and one rate at a time"
    sub = subjects.add_parser("distill", help=text, description=text)
    sub.set_defaults(command=bench_distill, name="bench")
    sub.add_argument("--config", default="tiny", help="its model is timed; without one, FLOPs are counted alone")
    sub.add_argument("--runs", type=positive, default=3)
    sub.add_argument("--json", metavar="FILE", help="also write the result here")
    text = "hybrid attention beside full softmax by the best stock kernel of this machine"
    sub = subjects.add_parser("attention", help=text, description=text)
    sub.set_defaults(command=bench_attention, name="bench")
    sub.add_argument("--rates", type=rates, default=rates("1,2,4,8,linear"), help="default: 1,2,4,8,linear")
    for flag, default in (("tokens", 16384), ("heads", 12), ("head_dim", 128), ("runs", 3)):
        sub.add_argument(f"--{flag}", type=positive, default=default, help=f"default: {default}")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on CPU, else bfloat16")
    sub.add_argument("--stabilizer", choices=["max", "lse"], default="lse")
    sub.add_argument("--implementation", choices=["xla", "reference", "tpu", "gpu", "stock"], help="default: the best")
    sub.add_argument("--backward", action="store_true", help="forward + backward too")
    text = "like 15R2,20R8,30R8: also whole forwards of Wan2.1 1.3B at 480x832, 81 frames, beside softmax's"
    sub.add_argument("--plans", type=lambda text: tuple(text.split(",")), default=(), help=text)
    sub.add_argument("--json", metavar="FILE", help="also write the result here")
    sub.add_argument("--estimate", metavar="CHIP", help="static cycles on a v4, v5e, v5p or v6e, with no TPU")
    text = "keep the best block sizes: measured on this TPU or GPU, or by the cycles of --estimate"
    sub.add_argument("--tune", action="store_true", help=text)
    return parser.parse_args(rest), overrides


def add_size(sub: argparse.ArgumentParser, **sizes: int) -> None:
    """The flags of a video's size, and where the result goes."""
    for name, default in sizes.items():
        sub.add_argument(f"--{name}", type=positive, default=default, help=f"default: {default}")
    sub.add_argument("--json", metavar="FILE", help="also write the result here")


def add_processes(sub: argparse.ArgumentParser) -> None:
    """The flags of a run of several processes."""
    text = "where process 0 listens, the same for all; auto on TPU pods and under Slurm or Open MPI"
    sub.add_argument("--coordinator", metavar="HOST:PORT", help=text)
    sub.add_argument("--num_processes", type=int, metavar="N", help="how many processes run this command")
    sub.add_argument("--process_id", type=int, metavar="I", help="which of them this is, from 0")


def join(options: argparse.Namespace) -> None:
    """Meets the other processes of this command, if it has any."""
    from jsurgery.runtime.processes import join as joined

    joined(options.coordinator, options.num_processes, options.process_id)


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, found {text!r}")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """(I, N) of a share like 0/4."""
    index, _, count = text.partition("/")
    if not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, found {text!r}")
    return int(index), int(count)


def frames(text: str) -> tuple[int, ...]:
    """Whole numbers in a list like 17,33."""
    return tuple(positive(number) for number in text.split(","))


def positives(text: str) -> tuple[int, ...]:
    return tuple(map(positive, text.split(",")))


def some_of(choices: str) -> Callable[[str], tuple[str, ...]]:
    """Reads a list of some of `choices`, both parted by commas."""

    def read(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if not set(found) <= set(choices.split(",")):
            raise argparse.ArgumentTypeError(f"expected some of {choices}, found {text!r}")
        return found

    return read


def rates(text: str) -> tuple:
    """Rates in a list like 1,2,8,linear."""
    return tuple(rate if rate == "linear" else positive(rate) for rate in text.split(","))


def surgery(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = keep_compiled(load_config(options.config, overrides))
    join(options)
    from jsurgery.run import begin
    from jsurgery.runtime.processes import is_first

    run = begin(config, options.workdir)
    run.stages(STAGES if options.name == "surgery" else (options.name,))
    if not is_first():
        return
    if options.name == "surgery":
        from jsurgery.report.summary import tell_result

        tell_result(config, run.workdir)
        print(run.workdir / "report.html")
    if options.name == "plan" and options.front:
        from jsurgery.report.cost_figures import neighbours, write_front_page
        from jsurgery.surgery.plan import front

        found = front(config, run.model_config, run.distill.folder, run.plan.folder)
        for row in neighbours(found):
            print("  ".join(row))
        chosen = found["chosen"]
        verdict = "proven optimal" if chosen["proven_optimal"] else f"not optimal: {chosen['optimum']:.5g} is possible"
        print(f"bound {chosen['error_bound']:.5g}; {verdict}")
        print(write_front_page(run.plan.folder, found))


def report(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    given = options.config is not None or bool(overrides)
    if options.compare and given:
        raise InputError("--compare: the runs' own configs are taken; leave --config away")
    if options.output and not options.compare:
        raise InputError("--output: of --compare only; report.html lies in the workdir")
    config = load_config(options.config or "tiny", overrides) if given else None
    join(options)
    from jsurgery.report.compare import write_comparison
    from jsurgery.report.page import write_report
    from jsurgery.run import begin
    from jsurgery.runtime.processes import is_first

    if config is not None:
        begin(config, options.workdir)  # refuses a workdir of another config
    if is_first():
        compared = options.compare and write_comparison(options.compare, options.output or "compare.html")
        print(compared or write_report(config, options.workdir))


def cost(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    given = {field: getattr(options, flag) for flag, field in COST_FIELDS.items()}
    config = load_config(options.config, overrides | {field: text for field, text in given.items() if text is not None})
    from jsurgery.report.cost_table import cost as counted
    from jsurgery.verify import check_report

    check_report(options.json)
    counted(
        config,
        options.config,
        plan=options.plan,
        feature_map=options.feature_map,
        report=options.json,
        figure=options.figure,
    )


def train(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = keep_compiled(load_config(options.config, overrides))
    from jsurgery.train.teacher import train_teacher

    print(train_teacher(config, options.workdir))


def ablate(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = keep_compiled(load_config(options.config, overrides))
    from jsurgery.ablate.ablate import ablate as ablated

    places = options.workdir, options.seeds, options.results, options.measurements
    ablated(config, options.table, *places, options.shard)


def sample(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = sampling_options(options, overrides)
    from jsurgery.data.prompts import read_prompts
    from jsurgery.sample import sample_videos

    single = options.prompts_file is None
    prompts = [options.prompt] if single else read_prompts(options.prompts_file)
    for file in sample_videos(config, prompts, options.output or ("out.mp4" if single else "samples"), single):
        print(file, flush=True)


def sampling_options(options: argparse.Namespace, overrides: dict[str, str]) -> ConfigDict:
    """The config of the flags of `sample`."""
    given = {field: getattr(options, flag) for flag, field in SAMPLE_FIELDS.items()}
    from jsurgery.sample import sampling_config

    overrides = overrides | {f: text for f, text in given.items() if text is not None}
    return keep_compiled(sampling_config(options.config, overrides))


def evaluate_vbench(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = sampling_options(options, overrides)
    if options.coordinator and options.shard != (0, 1):
        raise InputError("--shard: expected none with --coordinator, by which each process has its share")
    join(options)
    from jsurgery.evaluate.vbench import evaluate, read_suite

    suite, prompts = read_suite(options.prompts, options.info, options.augmented, options.subset)
    rule, seeds = options.seed_rule, options.seeds
    evaluate(config, suite, prompts, options.output, rule=rule, seeds=seeds, shard=options.shard)


def evaluate_fidelity(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    models, options.model, options.frames = options.model, options.teacher, None
    config = sampling_options(options, overrides)
    from jsurgery.data.prompts import read_prompts
    from jsurgery.evaluate.fidelity import evaluate_fidelity as compared

    prompts = read_prompts(options.prompts_file)
    compared(
        config,
        models,
        prompts,
        options.workdir,
        options.durations,
        options.json,
        lpips_weights=options.lpips,
        clip_model=options.clip,
    )


def evaluate_vbench_results(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery.evaluate.vbench_scores import report_results

    report_results(options.files, options.name, options.json)


def evaluate_study(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery.evaluate.study import build_study

    a, b = options.a, options.b
    print(build_study(a, b, options.output, prompts=options.prompts, info=options.info, seed=options.seed))


def evaluate_study_results(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery.evaluate.study import report_study

    report_study(options.files, options.key, options.json)


def encode(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = keep_compiled(load_config(options.config, overrides))
    join(options)
    from jsurgery.data.encode import encode_videos

    print(encode_videos(config, options.videos, options.root, options.workdir))


def synthesize(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = keep_compiled(load_config(options.config, overrides))
    join(options)
    from jsurgery.data.prompts import read_prompts
    from jsurgery.data.synthesize import synthesize_clips

    print(synthesize_clips(config, read_prompts(options.prompts_file), options.workdir))


def convert(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery.wan.convert import convert as converted

    print(converted(options.model, options.output, options.layout))


def verify(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery.verify import verify as verified

    verified(options.model, options.frames, options.height, options.width, options.json)


def push(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery.push import push as pushed

    print(pushed(options.model, options.repo, private=options.private, revision=options.revision))


def export(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    given = {field: getattr(options, flag) for flag, field in COST_FIELDS.items()}
    overrides = overrides | {field: text for field, text in given.items() if text is not None}
    config = keep_compiled(load_config(options.config, overrides))
    exporting = importlib.import_module("jsurgery.export.command")

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
            score=options.score or 0,
            ai_hub=hub,
        )
    )


def compile_ahead(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(options.config, overrides)
    topology = topology_of(options)
    from jsurgery.compile import compile_stage

    compile_stage(config, options.config, options.stage, topology, slices=options.num_slices, report=options.json)


def topology_of(options: argparse.Namespace) -> str:
    found = options.topology or split_topology(options.config)[1]
    if not found:
        raise InputError("--topology: expected one like v5e:4x4, or --config=NAME@TOPOLOGY")
    return found


def roofline(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(options.config, overrides)
    topology = topology_of(options)
    from jsurgery.roofline import roofline as estimated

    estimated(
        config,
        options.config,
        topology,
        efficiency=options.efficiency,
        clips=options.clips,
        compiled=options.compiled,
        report=options.json,
    )


def bench_transformer(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery.bench import bench_transformer as measured

    measured(
        model=options.model,
        size=options.size,
        frames=options.frames,
        height=options.height,
        width=options.width,
        text_length=options.text_length,
        dtype=options.dtype,
        runs=options.runs,
        report=options.json,
    )


def bench_distill(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = load_config(options.config, overrides)
    from jsurgery.bench_distill import bench_distill as measured

    measured(config, options.config, runs=options.runs, report=options.json)


def bench_attention(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    takes_no_config(options, overrides)
    from jsurgery import bench_attention as bench

    layer = {name: getattr(options, name) for name in ("rates", "tokens", "heads", "head_dim", "stabilizer")}
    if options.tune:
        bench.tune_attention(**layer, runs=options.runs, chip=options.estimate)
    elif options.estimate is not None:
        bench.estimate_attention(**layer, chip=options.estimate, backward=options.backward, report=options.json)
    else:
        bench.bench_attention(
            **layer,
            dtype=options.dtype,
            implementation=options.implementation,
            runs=options.runs,
            backward=options.backward,
            plans=options.plans,
            report=options.json,
        )


def takes_no_config(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    if overrides:
        raise InputError(f"--config.{min(overrides)}: {options.name} takes no config")


if __name__ == "__main__":
    sys.exit(main())
