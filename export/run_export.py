"""`jsurgery export`: a model folder in formats that phones run. Each format is made in a process of its own."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.config import recorded_section
from jsurgery.data.prompts import load_prompts
from jsurgery.diffusion import schedule
from jsurgery.errors import InputError
from jsurgery.io.files import write_json
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.runtime.lock import locked
from jsurgery.runtime.progress import say
from jsurgery.runtime.stage_folder import StageFolder, read_marker
from jsurgery.version import __version__
from jsurgery.wan.model_config import TextEncoderConfig, WanConfig, read_text_encoder_config, read_vae_config
from jsurgery.wan.model_folder import model_path, pipeline_folder, transformer_folder
from jsurgery.wan.pipeline_parts import check_index, check_sizes
from jsurgery.wan.tokenizer import EOS, PAD
from jsurgery.wan.video_size import check_size

from .artefacts import Artefact
from .formats import PACKAGES, PRECISIONS
from .kinds import check_kinds
from .parity import check_parity, missing_samples, parity_rows
from .parts import FORMAT_VERSION, ExportJob
from .worker import LOG

FIELDS = ("video", "text_length", "sampler", "seed")
SIZE = ("frames", "height", "width")
SAMPLES = 9  # of the reference: artefacts are compared on the first, the others calibrate
PAPER_FRAMES = (81, 101, 121, 141)
LARGEST = 1_900_000_000  # bytes of a file's weights, or of a tensor: TFLite and ONNX files address less than 2 GB
FORMULA = [
    "data = latents - sigma * velocity",
    "corrected = corrector . (latents, previous corrected, data of two steps ago, data of the last step, data)",
    "latents = predictor . (corrected, data of the last step, data) + renoise * normal noise",
]


def export(
    config: ConfigDict,
    workdir: str,
    *,
    model: str | None = None,
    formats: Sequence[str] = ("tflite", "savedmodel", "onnx", "qnn"),
    precisions: Sequence[str] = ("float32", "fp16"),
    chips: Sequence[str] = ("SM8750",),
    blocks_per_file: int = 1,
    only: Sequence[str] = (),
    score: int = 0,
    ai_hub: Sequence[str] | None = None,
) -> pathlib.Path:
    """Writes `workdir/export`: artefacts by format, manifest.json and parity.json. Keeps artefacts that it finds there.

    `model` is a model folder, by default `workdir/model`. `blocks_per_file` 0 puts the whole transformer into one file.
    `only` are the names of the parts to make, by default all. `score` is a number of sprites prompts whose videos, made
    by every TFLite precision and by JAX, are scored. `ai_hub` are the choices of `ai_hub.export`, which runs last.
    Raises InputError for missing packages and for input that does not fit, and ParityError, after everything is made,
    where an artefact exceeds its bound.
    """
    if "://" in str(workdir):
        raise InputError(f"--workdir={workdir}: export writes to local folders only")
    formats = [name for name in PRECISIONS if name in formats or (name == "onnx" and "qnn" in formats)]
    if ai_hub:
        formats = [name for name in PRECISIONS if name in {*formats, "tflite" if ai_hub[1] == "tflite" else "onnx"}]
    need_packages([*formats, *(["ai_hub"] if ai_hub else [])])
    if only and (score or ai_hub):
        raise InputError(f"--parts={','.join(only)}: expected all parts with --score and --ai_hub")
    job, left_out = make_job(config, pathlib.Path(workdir), model, blocks_per_file, only)
    stage = StageFolder(workdir, "export", config, FIELDS, weights=job.identity, blocks_per_file=str(blocks_per_file))
    stage.done()
    with locked(stage.folder):
        return write_formats(config, stage, job, left_out, formats, precisions, chips, score, ai_hub)


def write_formats(
    config: ConfigDict,
    stage: StageFolder,
    job: ExportJob,
    left_out: dict[str, str],
    formats: Sequence[str],
    precisions: Sequence[str],
    chips: Sequence[str],
    score: int,
    ai_hub: Sequence[str] | None,
) -> pathlib.Path:
    """What `export` does once its input is checked and the folder is locked."""
    stage.begin()
    folder = pathlib.Path(stage.folder)
    job.write(folder)
    if job.base:
        (folder / "tokenizer").mkdir(exist_ok=True)
        shutil.copy(f"{job.base}/tokenizer/spiece.model", folder / "tokenizer")
    shutil.copy(pathlib.Path(__file__).with_name("driver.py"), folder)
    for component, reason in left_out.items():
        say(f"export: {component} left out: {reason}")

    # A process starts only if something is missing: it would import its libraries first.
    samples = SAMPLES if "w8a16" in precisions else 1
    names = {name for part in job.needed() for name in (*part.inputs, *part.outputs)}
    if missing_samples(folder, 1, names) or missing_samples(folder, samples, names - {"video"}):
        run_worker("jax_reference", folder, str(samples))
    for format in formats:
        choices = tuple({"tflite": precisions, "qnn": chips}.get(format, ()))
        try:
            if any(artefact.record(job.fingerprint) is None for artefact in job.artefacts(folder, format, choices)):
                run_worker(format, folder, *choices)
        finally:
            write_json(epath.Path(folder) / "manifest.json", manifest(config, job, folder, left_out))
    complete = [name for name in precisions if "tflite" in formats and not job.only]
    if complete:
        run_worker("end_to_end", folder, *complete)
    if score and complete:
        run_worker("video_score", folder, str(score), *complete)
    rows = parity_rows(records(job, folder))
    rows += [json.loads(file.read_text()) for file in sorted((folder / "chain").glob("*.json"))]
    write_json(epath.Path(folder) / "parity.json", rows)
    check_parity(rows, folder / "parity.json")
    if not job.only:
        stage.end()
    if ai_hub:
        run_worker("ai_hub", folder, *ai_hub)
    return folder


def ddr_table(
    config: ConfigDict, workdir: str, chips: Sequence[str], *, frames: Sequence[int] = (), tile: int = 0
) -> None:
    """Prints the memory traffic of a block by number of `frames`. Measures only rows that `ddr.json` does not hold yet.

    The network is the config's model, or Wan2.1 1.3B where it names none. `frames` () means the paper's, `tile` 0 the
    exported tile size. Raises InputError for missing packages.
    """
    need_packages(["onnx", "qnn"])
    network = WanConfig()
    if config.model.path:
        file = transformer_folder(model_path(config.model.path)) / "config.json"
        network = WanConfig.from_json(json.loads(file.read_text()), source=str(file))
    folder = pathlib.Path(workdir) / "export"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = dataclasses.asdict(dataclasses.replace(network, hybrid=None))
    settings = {"model": sizes, "frames": frames or PAPER_FRAMES, "tile": tile}
    settings |= {"height": config.video.height, "width": config.video.width, "text_length": config.text_length}
    for chip in chips:
        command = [sys.executable, "-m", "jsurgery.export.npu_traffic", str(folder), chip, json.dumps(settings)]
        subprocess.run(command, check=True)


def need_packages(formats: Sequence[str]) -> None:
    """Raises InputError that names the packages of these formats that are not installed."""
    for format in formats:
        missing = [package for name, package in PACKAGES[format].items() if importlib.util.find_spec(name) is None]
        if missing:
            flag = "--ai_hub" if format == "ai_hub" else f"--formats={format}"
            raise InputError(f"{flag}: needs {', '.join(missing)}: pip install 'jsurgery[export]'")


def make_job(
    config: ConfigDict, workdir: pathlib.Path, model: str | None, blocks_per_file: int, only: Sequence[str] = ()
) -> tuple[ExportJob, dict[str, str]]:
    """The job, and the components that it leaves out, each with the reason.

    Raises InputError where there is no such model, it does not take the video size, or it has no part named in `only`.
    """
    if model is None and not (workdir / "model").exists():
        raise InputError(f"{workdir / 'model'}: no such folder; run `jsurgery surgery` first, or name one with --model")
    folder = epath.Path(workdir / "model") if model is None else model_path(model)
    transformer = transformer_folder(folder)
    file = transformer / "config.json"
    if not file.exists():
        raise InputError(f"{file}: no such file; export reads the diffusers layout, see `jsurgery convert`")
    network = WanConfig.from_json(json.loads(file.read_text()), source=str(file))
    check_kinds(network, str(file))
    check_size(network, config.video.frames, config.video.height, config.video.width)
    left_out, encoder, decoder = {}, False, True
    try:
        base = str(pipeline_folder(folder))
    except InputError:
        base, left_out["VAE and text encoder"] = "", f"{folder} holds a transformer alone"
    if base:
        check_index(epath.Path(base))
        text, vae = read_text_encoder_config(f"{base}/text_encoder"), read_vae_config(f"{base}/vae")
        check_sizes(network, vae, text, folder)
        size = encoder_bytes(epath.Path(base) / "text_encoder" / "config.json")
        encoder = size <= LARGEST
        if not encoder:
            left_out["text encoder"] = f"{size / 1e9:.1f} GB in float32, over what one file holds"
        size = 4 * vae.base_dim * math.prod(config.video[name] for name in SIZE)
        decoder = size <= LARGEST and not vae.is_residual
        if vae.is_residual:
            left_out["VAE decoder"] = "the mobile form has no decoder with shortcuts, as Wan2.2's"
        elif not decoder:
            left_out["VAE decoder"] = f"{size / 1e9:.1f} GB for all frames after one layer, over what one file holds"
    trace = workdir / "trace"
    traced = bool(base) and was_traced(trace, config)
    job = ExportJob(
        transformer=str(transformer),
        base=base,
        text_encoder=encoder,
        identity=" ".join(folder_fingerprint(path) for path in (transformer, base and epath.Path(base)) if path),
        frames=config.video.frames,
        height=config.video.height,
        width=config.video.width,
        text_length=config.text_length,
        blocks_per_file=blocks_per_file,
        samples=SAMPLES,
        trace=str(trace) if traced else "",
        prompts=tuple(load_prompts(config, SAMPLES)) if encoder and not traced else (),
        sampler=recorded_section(config, "sampler"),
        seed=config.seed,
        decoder=decoder,
        only=tuple(only),
    )
    names = [part.name for part in job.parts()]
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"--parts={unknown[0]}: no such part; expected some of {', '.join(names)}")
    return job, left_out


def encoder_bytes(file: epath.Path) -> int:
    """Bytes of a text encoder's weights in float32, by its config; norms and position biases are not counted."""
    config = TextEncoderConfig.from_json(json.loads(file.read_text()))
    layer = 4 * config.d_model * config.num_heads * config.d_kv + 3 * config.d_model * config.d_ff
    return 4 * (config.vocab_size * config.d_model + config.num_layers * layer)


def was_traced(trace: pathlib.Path, config: ConfigDict) -> bool:
    """Whether a complete trace of videos and texts of this size is there."""
    marker = read_marker(epath.Path(trace))
    if marker is None or not marker["complete"]:
        return False
    size = {f"video.{name}": config.video[name] for name in SIZE}
    size["text_length"] = config.text_length
    return all(marker["made_with"].get(field) == value for field, value in size.items())


def run_worker(module: str, folder: pathlib.Path, *choices: str) -> None:
    """Runs a module's `export` in a process of its own. Raises InputError with its message, or RuntimeError."""
    message = folder / "error.txt"
    message.unlink(missing_ok=True)
    command = [sys.executable, "-m", "jsurgery.export.worker", module, str(folder), *choices]
    # litert-torch lowers through JAX and needs JAX's default here.
    environment = os.environ | {"JAX_NUMPY_RANK_PROMOTION": "allow"}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
        code = process.wait()
    if message.exists():
        raise InputError(message.read_text())
    if code:
        raise RuntimeError(f"the process of {module} ended with {code}; see {folder / LOG.format(module)}")


def records(job: ExportJob, folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of the job's complete artefacts, in order of format and part."""
    complete = []
    for file in sorted(folder.glob("*/*.json")):
        record = json.loads(file.read_text()) if file.parent.name in PRECISIONS else {}
        if record.get("made_with") != job.fingerprint:
            continue
        artefact = Artefact(folder, record["format"], record["precision"], record["part"], record.get("chip", ""))
        if artefact.record(job.fingerprint) is not None:
            complete.append(record)
    order = [part.name for part in job.parts()]
    return sorted(complete, key=lambda record: (list(PRECISIONS).index(record["format"]), order.index(record["part"])))


def manifest(config: ConfigDict, job: ExportJob, folder: pathlib.Path, left_out: dict[str, str]) -> dict[str, Any]:
    """The content of manifest.json: what an app needs to know to run the export."""
    sampler = job.sampler
    timesteps = sampler.get("timesteps", ())
    rows = schedule(sampler["solver"], sampler["steps"], sampler["shift"], timesteps)._asdict()
    network = job.config
    return {
        "format_version": FORMAT_VERSION,
        "jsurgery": __version__,
        "transformer": {"name": pathlib.Path(job.transformer).name, "identity": job.identity, "rates": network.rates},
        "video": config.video.to_dict(),
        "tensors": {name: dataclasses.asdict(tensor) for name, tensor in job.tensors().items()},
        "parts": [
            {"name": part.name, "step": part.step, "inputs": part.inputs, "outputs": part.outputs}
            for part in job.parts()
        ],
        "left_out": left_out,
        "tokenizer": {"file": "tokenizer/spiece.model", "length": job.text_length, "padding": PAD, "end": EOS}
        if job.text_encoder
        else None,
        "sampler": {
            **{name: sampler[name] for name in ("solver", "steps", "shift", "guidance", "negative_prompt")},
            "formula": FORMULA,
            "schedule": {name: column.tolist() for name, column in rows.items()},
        },
        "calibration": "traced steps" if job.trace else "noise and prompts",
        "packages": installed(),
        "artefacts": [
            {name: value for name, value in record.items() if name not in ("made_with", "torch")}
            for record in records(job, folder)
        ],
    }


def installed() -> dict[str, str]:
    """The versions of those packages of the formats that are installed."""
    versions = {}
    for package in sorted({package for packages in PACKAGES.values() for package in packages.values()}):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
