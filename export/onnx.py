"""Parts from torch to ONNX, which Qualcomm's compilers read; their outputs are checked in ONNX Runtime."""

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
    """Writes every part in float32. Inputs and outputs have the names of the job's tensors."""
    parts, modules = {part.name: part for part in job.parts()}, MobileParts(job, folder)

    def make(artefact: Artefact, file: pathlib.Path) -> dict[str, Any]:
        part = parts[artefact.part]
        module = modules.module(part).requires_grad_(False)
        facts = {"torch": modules.error(part, module)}
        convert(module, modules.arguments(part), part, file)
        operations = collections.Counter(node.op_type for node in onnx.load(file).graph.node)
        names = {"inputs": {n: n for n in part.inputs}, "outputs": {n: n for n in part.outputs}}
        outputs = run(file, part, load_sample(folder, 0, part.inputs))
        return facts | names | {"operations": dict(operations.most_common())} | errors(part, outputs, folder)

    make_all(job.fingerprint, job.artefacts(folder, "onnx"), make)


def convert(module: torch.nn.Module, arguments: tuple, part: Part, file: pathlib.Path) -> None:
    """Writes a module of static shape as an ONNX file, with the part's names of inputs and outputs."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        names: dict[str, Any] = {"input_names": list(part.inputs), "output_names": list(part.outputs)}
        program = torch.onnx.export(module, arguments, dynamo=True, **names)
    assert program is not None
    program.save(file)


def run(file: pathlib.Path, part: Part, arguments: list[np.ndarray]) -> list[np.ndarray]:
    """The part's outputs, in order, by ONNX Runtime on the CPU."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    outputs: list[Any] = list(session.run(list(part.outputs), dict(zip(part.inputs, arguments, strict=True))))
    return outputs
