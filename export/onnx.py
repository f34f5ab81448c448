"""torch to ONNX, checked with ONNX Runtime; what Qualcomm's compilers take."""

import collections
import contextlib
import io
import pathlib
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from .artefacts import Artefact, make_all
from .mobile_parts import MobileParts
from .parity import errors, load_sample
from .parts import ExportJob, Part


def export(job: ExportJob, folder: pathlib.Path, precisions: tuple[str, ...] = ()) -> None:
    """Every part in float32; inputs and outputs carry the tensors' names."""
    parts, modules = {part.name: part for part in job.parts()}, MobileParts(job, folder)

    def make(artefact: Artefact, file: pathlib.Path) -> dict[str, Any]:
        part = parts[artefact.part]
        module = modules.module(part).requires_grad_(False)
        facts = {"torch": modules.error(part, module)}
        convert(module, modules.arguments(part), part, file)
        operations = collections.Counter(node.op_type for node in onnx.load(file).graph.node)
        names = {"inputs": {n: n for n in part.inputs}, "outputs": {n: n for n in part.outputs}}
        made = run(file, part, load_sample(folder, 0, part.inputs))
        return facts | names | {"operations": dict(operations.most_common())} | errors(part, made, folder)

    make_all(job.fingerprint, job.artefacts(folder, "onnx"), make)


def convert(module: torch.nn.Module, arguments: tuple, part: Part, file: pathlib.Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        names: dict[str, Any] = {"input_names": list(part.inputs), "output_names": list(part.outputs)}
        program = torch.onnx.export(module, arguments, dynamo=True, **names)
    assert program is not None
    program.save(file)


def run(file: pathlib.Path, part: Part, arguments: list[np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    made: list[Any] = list(session.run(list(part.outputs), dict(zip(part.inputs, arguments, strict=True))))
    return made
