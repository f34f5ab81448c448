"""`make rehearsal`: the commands on a model of the true size of Wan2.1 1.3B, with random weights, on two CPU cores.

The transformer, text encoder and VAE have their true shapes; the video has 5 frames of 64x96. The time and the peak of
the resident memory (VmHWM) of each command are printed. A command that fails, or takes more than 16 GiB, ends the
rehearsal. At the end all stages run again, and each but the report must be up to date.

Fine-tuning runs on two blocks of true width: for all 30, weights, gradients and AdamW's moments take 22.7 GB. Wan2.2
TI2V 5B samples with 11 of its 30 blocks: beside weights in 16 bits XLA keeps a copy in 32 on CPUs.

    python -m tests.full_size.rehearse FOLDER [--only NAME [NAME ...]]
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from jsurgery.io.safetensors import open_tensors

LIMIT_GIB = 16
PROMPTS = ("a red circle moves left over a grey background", "a blue square moves up over a white background")
SIZE = {"video.frames": 5, "video.height": 64, "video.width": 96, "sampler.steps": 3}
SETTINGS = SIZE | {
    "trace.prompts": 2, "trace.holdout": 1, "trace.keep_steps": 3, "trace.batch": 1, "distill.mode": "traces",
    "distill.steps": 2, "distill.batch": 1, "distill.velocity_steps": 0, "distill.trajectories": 1,
    "plan.errors": "attention", "finetune.steps": 0, "evaluate.prompts": 2, "evaluate.batch": 1, "evaluate.videos": 1,
    "log_every": 1, "compile_cache": False,
}  # fmt: skip
TUNED = {
    "finetune.steps": 2, "finetune.batch": 1, "plan.budget": "1R2",
}  # fmt: skip
EXPORT = ("litert_torch", "ai_edge_litert", "ai_edge_quantizer", "onnx", "onnxscript", "onnxruntime")
STAGES = ("trace", "distill", "plan", "operate", "finetune", "evaluate", "report")


def flags(folder: pathlib.Path, workdir: str, model: str, changes: dict[str, Any]) -> list[str]:
    """The options of a stage's command."""
    fields = {"model.path": folder / model, "prompts": folder / "prompts.txt"} | SETTINGS | changes
    return [
        "--config=wan_1_3b_lowres", f"--workdir={folder / workdir}", *(f"--config.{n}={v}" for n, v in fields.items())
    ]  # fmt: skip


def stages(folder: pathlib.Path) -> dict[str, list[str]]:
    """The commands of the three surgeries, by name."""
    traced = flags(folder, "traced", "wan", {})
    sampling = flags(folder, "sampling", "wan", {"distill.mode": "sampling"})
    small = flags(folder, "small", "wan_two_blocks", TUNED)
    return {
        **{stage: [stage, *traced] for stage in STAGES},
        **{f"{stage}, mode=sampling": [stage, *sampling] for stage in STAGES[:2]},
        **{f"{stage}, two blocks": [stage, *small] for stage in STAGES[:5]},
    }


def others(folder: pathlib.Path) -> dict[str, list[str]]:
    """The commands that are not stages, by name."""
    model = f"--model={folder / 'wan'}"
    sizes = [f"--{name.partition('.')[2]}={value}" for name, value in SIZE.items()]
    sample = ["sample", "--config=wan_1_3b_lowres", f"--prompt={PROMPTS[0]}", *sizes, "--config.trace.keep_steps=3"]
    return {
        "sample": [*sample, model, f"--output={folder / 'teacher.mp4'}"],
        "sample, operated": [*sample, f"--model={folder / 'traced' / 'hybrid'}", f"--output={folder / 'hybrid.mp4'}"],
        "sample, Wan2.2 5B": [
            *("sample", "--config=wan2_2_5b", f"--prompt={PROMPTS[0]}", *sizes, "--config.trace.keep_steps=3"),
            *(f"--model={folder / 'wan2_2'}", f"--output={folder / 'wan2_2.mp4'}"),
        ],
        "convert": ["convert", model, f"--output={folder / 'original'}", "--layout=original"],
        "convert, back": ["convert", f"--model={folder / 'original'}", f"--output={folder / 'back'}"],
        "verify": ["verify", model],
        "export, one block": [
            *("export", "--config=wan_1_3b_lowres", model, *sizes[:3], f"--workdir={folder / 'exported'}"),
            *("--parts=block_00", "--formats=tflite,onnx", "--precision=fp16"),
        ],
    }


def run(name: str, command: list[str]) -> str:
    """Runs a Python module and returns its stderr. Prints time and memory; raises SystemExit if it fails."""
    began = time.monotonic()
    with open(os.environ["REHEARSAL_LOG"], "a+b") as log:
        start = log.seek(0, os.SEEK_END)
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(start)
        told = log.read().decode()
    gib = usage.ru_maxrss / 2**20
    print(f"{name:24} {time.monotonic() - began:7.0f} s {gib:7.1f} GiB", flush=True)
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with {os.waitstatus_to_exitcode(status)}\n{told[-3000:]}")
    if gib > LIMIT_GIB:
        raise SystemExit(f"{name}: {gib:.1f} GiB; expected at most {LIMIT_GIB}")
    return told


def check_finite(folder: pathlib.Path) -> int:
    """Raises SystemExit if a number in the results is not finite. Returns how many files it has read."""
    files = [
        *folder.glob("*/distill/*.safetensors"),
        *folder.glob("*/distill/errors.json"),
        *folder.glob("*/plan/*.json"),
    ]
    files += [*folder.glob("*/evaluation/*.json"), *folder.glob("*/evaluation/*.npy")]
    for file in files:
        arrays: Iterator[Any] = iter(())
        if file.suffix == ".json":
            json.loads(file.read_text(), parse_constant=lambda word, file=file: sys.exit(f"{file}: holds {word}"))
        elif file.suffix == ".npy":
            arrays = iter([np.load(file)])
        else:
            arrays = (np.asarray(tensor, np.float32) for tensor in open_tensors(file).values())
        if not all(np.isfinite(array).all() for array in arrays):
            raise SystemExit(f"{file}: holds a number that is not finite")
    return len(files)


def rehearse(folder: pathlib.Path, only: set[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["REHEARSAL_LOG"] = str(folder / "log.txt")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, *PROMPTS]) + "\n")
    began = time.monotonic()
    write = ["tests.full_size.write_folder"]
    commands = {"write the model": [*write, str(folder / "wan")]}
    commands |= {"write two blocks": [*write, str(folder / "wan_two_blocks"), "--blocks=2"]}
    shared = f"--text_encoder_of={folder / 'wan'}"
    commands |= {"write Wan2.2 5B": [*write, str(folder / "wan2_2"), "--kind=wan2.2-5b", "--blocks=11", shared]}
    commands |= {name: ["jsurgery", *command] for name, command in (stages(folder) | others(folder)).items()}
    if missing := [name for name in EXPORT if importlib.util.find_spec(name) is None]:
        del commands["export, one block"]
        print(f"export, one block: NOT RUN, without {', '.join(missing)}: pip install '.[export]'")
    for name, command in commands.items():
        if not only or name in only:
            run(name, command)
    if only:
        return
    print(f"{check_finite(folder)} files of finite numbers")
    for name, command in stages(folder).items():
        told = run(f"{name}, again", ["jsurgery", *command])
        if "up to date" not in told and name != "report":  # which is written anew from the stages' results
            raise SystemExit(f"{name}: expected it to be up to date\n{told}")
    print(f"rehearsal: {(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="names of commands")
    arguments = parser.parse_args()
    rehearse(arguments.folder.absolute(), set(arguments.only))
