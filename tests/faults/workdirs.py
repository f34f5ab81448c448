"""Workdirs of stages on a tiny random model, processes that run there, and checks of the files that they leave."""

import hashlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jsurgery.data import sprites
from jsurgery.data.shards import Record, Records, shard_path, text_array, write_shard
from jsurgery.data.video_writer import write_video
from jsurgery.evaluate.sprites_score import DIMENSIONS
from jsurgery.io.files import write_json
from jsurgery.io.hashes import MANIFEST, find_damage
from jsurgery.io.safetensors import read_tensors
from jsurgery.load_config import load_config
from jsurgery.run import Run
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.surgery.distillation.saved_maps import INITIAL, TRAINED, save_maps
from jsurgery.surgery.distillation.update import initial_maps
from jsurgery.wan.video_size import latent_grid

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {
    "video.frames": "5", "video.height": "64", "video.width": "48", "sampler.steps": "2", "trace.prompts": "6",
    "trace.holdout": "1", "trace.keep_steps": "2", "trace.batch": "1", "hybrid.rates": "2", "plan.rates": "2",
    "plan.budget": "2R2", "distill.steps": "12", "distill.batch": "2", "finetune.steps": "12", "finetune.batch": "2",
    "data.clips": "8",
    "evaluate.validation_clips": "4", "log_every": "2", "checkpoint.every": "2", "data.workers": "1",
    "data.clips_per_shard": "1", "finetune.ema": "0.5", "evaluate.prompts": "6", "evaluate.batch": "2",
}  # fmt: skip
# Folders that a stage reads; `export` reads its folder as the model.
INPUTS = {
    "distill": ("trace",),
    "finetune": ("trace", "distill", "plan", "hybrid", "latents"),
    "evaluate": ("trace", "distill", "plan", "hybrid", "latents", "finetune"),
    "export": ("hybrid",),
}
FOLDERS = {
    "encode": "encoded",
    "synthesize": "synthesized",
    "evaluate": "evaluation",
}  # of stages whose folder has another name
CLIPS = 6
TWO_DEVICES = "--xla_force_host_platform_device_count=2 "


class Workdirs:
    """Prepares workdirs in which all earlier stages are done, and runs processes in them."""

    def __init__(self, folder: pathlib.Path, model: pathlib.Path, **fields: str):
        self.folder = folder
        self.fields = FIELDS | {"model.path": str(model)} | fields
        # tensorboardX would import torch, which takes seconds, at every start.
        without_torch = folder / "without_torch"
        without_torch.mkdir(parents=True, exist_ok=True)
        (without_torch / "torch.py").write_text("raise ImportError\n")
        self.environment = os.environ | {
            "PYTHONPATH": f"{without_torch}{os.pathsep}{ROOT}",
            "JAX_PLATFORMS": "cpu",
            # Processes load what earlier ones have compiled, so that they start within seconds.
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

        self.inputs = folder / "made_up"
        write_inputs(load_config("tiny", self.fields), self.inputs)

    def prepare(self, stage: str, name: str = "run") -> pathlib.Path:
        """A new workdir with the folders that `stage` reads."""
        workdir = self.folder / name
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.mkdir()
        for part in INPUTS.get(stage, ()):
            shutil.copytree(self.inputs / part, workdir / ("model" if stage == "export" else part))
        if stage == "evaluate":
            shutil.copytree(self.inputs / "hybrid", workdir / "model")
            (workdir / "evaluation").mkdir()
            # The bounds of the score, which would take a while to measure.
            write_json(workdir / "evaluation" / "reference.json", [dict.fromkeys(DIMENSIONS, x) for x in (1.0, 0.0)])
        return workdir

    def arguments(self, stage: str, workdir: pathlib.Path, **fields: str) -> list[str]:
        config = [f"--config.{name}={value}" for name, value in (self.fields | fields).items()]
        more = {
            "encode": [f"--videos={self.folder / 'videos'}"],
            "synthesize": [f"--prompts_file={self.prompts()}", "--config.data.clips_per_shard=5"],
            "export": ["--formats=onnx", "--one_file"],
        }
        return [stage, f"--workdir={workdir}", *config, *more.get(stage, [])]

    def prompts(self) -> pathlib.Path:
        """A file of prompts."""
        file = self.folder / "prompts.txt"
        file.write_text("\n".join(sprites.scene_at(0, number, two_sprites=0.0).caption for number in range(8)))
        return file

    def start(self, stage: str, workdir: pathlib.Path, *, wrapper: Sequence[str] = (), **fields: str):
        program = [*wrapper, "--"] if wrapper else ["-m", "jsurgery"]
        command = [sys.executable, *program, *self.arguments(stage, workdir, **fields)]
        environment = self.environment | ({"PYTHONPATH": str(ROOT)} if stage == "export" else {})
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def run(self, stage: str, workdir: pathlib.Path, **more) -> subprocess.CompletedProcess:
        process = self.start(stage, workdir, **more)
        _, errors = process.communicate(timeout=3600)
        return subprocess.CompletedProcess(process.args, process.returncode, "", errors)

    def run_two(self, kind: str, number: int, stage: str, workdir: pathlib.Path) -> list[int]:
        """The exit codes of two processes of one run, of which the second is signalled."""
        with socket.socket() as found:
            found.bind(("localhost", 0))
            coordinator = f"localhost:{found.getsockname()[1]}"
        environment, started = self.environment | {"XLA_FLAGS": TWO_DEVICES + os.environ.get("XLA_FLAGS", "")}, []
        for process in range(2):
            wrapper = [str(pathlib.Path(__file__).with_name("killed.py")), kind, str(number * process), os.devnull]
            flags = [f"--coordinator={coordinator}", "--num_processes=2", f"--process_id={process}"]
            fields = {"mesh.fsdp": "2", "mesh.tensor": "2"}
            command = [sys.executable, *wrapper, "--", *self.arguments(stage, workdir, **fields), *flags]
            log = (self.folder / f"process{process}.log").open("a")
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return [process.wait(timeout=3600) for process in started]

    def run_signalled(
        self, kind: str, number: int | str, stage: str, workdir: pathlib.Path, **more
    ) -> tuple[subprocess.CompletedProcess, list[str]]:
        """A run that `killed.py` signals, and the lines of its log."""
        log = workdir.with_name(f"{workdir.name}.log")
        log.unlink(missing_ok=True)
        wrapper = [str(pathlib.Path(__file__).with_name("killed.py")), kind, str(number), str(log)]
        process = self.run(stage, workdir, wrapper=wrapper, **more)
        return process, log.read_text().splitlines() if log.exists() else []


def result(workdir: pathlib.Path, stage: str) -> dict[str, str]:
    """The result of a finished stage: {name: hash} of its tensors, records or artefacts."""
    files = {"distill": "distill/feature_maps.safetensors", "finetune": "model/hybrid_wan.safetensors"}
    if stage in files:
        return {name: digest(values) for name, values in read_tensors(workdir / files[stage]).items()}
    if stage == "export":
        artefacts = json.loads((workdir / "export" / "manifest.json").read_text())["artefacts"]
        rows = json.loads((workdir / "export" / "parity.json").read_text())
        return {one["file"]: one["sha256"] for one in artefacts} | {"parity": json.dumps(rows)}
    if stage == "evaluate":
        return {path.name: path.read_text() for path in (workdir / "evaluation").glob("*.json") if path.stem != "stage"}
    folders = {"trace": workdir / "trace", "encode": workdir / "encoded", "synthesize": workdir / "synthesized"}
    found = {}
    for shards in sorted({path.parent for path in folders[stage].rglob("*.array_record")}):
        records = Records(shards)
        for number in range(len(records)):
            for name, values in records[number].items():
                found[f"{shards.name} {number} {name}"] = digest(values)
    return found


def digest(values: np.ndarray) -> str:
    return f"{values.dtype} {values.shape} {hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()}"


def check_complete(workdir: pathlib.Path) -> int:
    """Fails if a file with its final name is not complete; returns the number of files checked."""
    checked = 0
    for path in sorted(workdir.rglob("*")):
        if path.is_dir() or "checkpoints" in path.parts or path.name == "lock":
            continue
        if path.suffix == ".array_record":
            records = Records(path.parent)
            assert all(records[number] for number in range(len(records))), path
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".safetensors":
            read_tensors(path)
        else:
            continue
        checked += 1
    for manifest in workdir.rglob(MANIFEST):
        assert find_damage(epath.Path(manifest.parent)) == [], manifest
        checked += 1
    return checked


def write_clips(folder: pathlib.Path) -> None:
    """Videos with captions for `encode`."""
    folder.mkdir()
    for number in range(CLIPS):
        scene = sprites.scene_at(0, number, two_sprites=0.0)
        write_video(folder / f"{number}.mp4", sprites.render(scene, 9, 64, 48), 16)
        (folder / f"{number}.txt").write_text(scene.caption)


def write_inputs(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes finished stages with random traces, feature maps and latents, as inputs of `distill` and `finetune`."""
    run = Run(config, str(workdir))
    rng, model, rates = np.random.default_rng(0), run.model_config, config.hybrid.rates
    shape = (*latent_grid(config.video.frames, config.video.height, config.video.width), model.in_channels)
    noise = lambda *shape: rng.normal(size=shape).astype(np.float32)

    def write(stage: StageFolder, shards: str, records: Iterator[Record]) -> None:
        stage.begin()
        write_shard(shard_path(stage.folder / shards, 0), records)
        stage.end()

    prompts, kept = config.trace.prompts, config.trace.keep_steps
    text = lambda: noise(config.text_length, model.text_dim)
    write(run.stages["trace"], "text", ({"embedding": text(), "prompt": text_array("")} for _ in range(prompts + 1)))
    steps = (
        {
            "latents": noise(*shape).astype(np.float16),
            "timestep": np.float32(500 + 100 * step),
            "conditional": np.bool_(True),
            "prompt": np.int32(prompt),
        }
        for prompt in range(prompts)
        for step in range(kept)
    )
    write(run.stages["trace"], "steps", steps)
    for part in ("train", "validation"):
        clips = (
            {"latents": noise(*shape).astype(np.float16), "text": text(), "caption": text_array("")} for _ in range(8)
        )
        write(run.stages["latents"], part, clips)

    run.stages["distill"].begin()
    teacher: Any = types.SimpleNamespace(config=model)
    maps = initial_maps(config, teacher)
    for name in (INITIAL, TRAINED):
        save_maps(run.stages["distill"].folder / name, maps, rates, range(model.num_layers))
    table = np.full((model.num_layers, len(rates)), 0.1).tolist()
    names = ("errors", "initial_errors", "softmax_share", "teacher_softmax_share", "velocity_errors")
    found = {"blocks": list(range(model.num_layers)), "rates": list(rates), "samples": 1}
    write_json(run.stages["distill"].folder / "errors.json", found | dict.fromkeys(names, table))
    run.stages["distill"].end()
    run.run_stage("plan")
    run.run_stage("hybrid")
    run.stages["finetune"].begin()
    run.stages["finetune"].end()
