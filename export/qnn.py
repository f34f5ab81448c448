"""Compiles parts for Qualcomm's Hexagon NPU (HTP) on x86, through ONNX Runtime's QNN provider: no phone, no account.

Memory traffic is the compiler's own estimate. Latency is unknown without a device.
"""

import collections
import math
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np

from jsurgery.errors import InputError

from .artefacts import Artefact, make_all
from .parity import errors, load_sample
from .parts import ExportJob

SIMULATED = 4e9  # multiply-adds: larger parts would take the simulator too long
ERROR = re.compile(r"\[E:|<E>|Error|FAIL|error code|out of memory")
SUMMARY = re.compile(r"\b((?:spill|fill|write_total|read_total)_bytes)=(\d+)")


def export(job: ExportJob, folder: pathlib.Path, chips: tuple[str, ...]) -> None:
    """Compiles the ONNX artefact of every part that runs on the NPU into a context binary, for each chip."""
    parts = {part.name: part for part in job.parts()}
    if "transformer" in parts:
        raise InputError("--formats=qnn: timesteps need float32, and the NPU has 16 bits: not with --one_file")

    def make(artefact: Artefact, file: pathlib.Path) -> dict[str, Any]:
        part = parts[artefact.part]
        model = Artefact(folder, "onnx", "float32", part.name).path
        facts = compile_model(model, file, artefact.variant)
        inputs = load_sample(folder, 0, part.inputs)
        if multiply_adds(model) > SIMULATED:
            return facts | {"simulated": False}
        outputs = simulate(model, artefact.variant, dict(zip(part.inputs, inputs, strict=True)), file.parent)
        return facts | {"simulated": True} | errors(part, outputs, folder)

    make_all(job.fingerprint, job.artefacts(folder, "qnn", chips), make)


def multiply_adds(model: pathlib.Path) -> int:
    """Multiply-adds of an ONNX file's matrix products and convolutions."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        shapes[value.name] = [size.dim_value for size in value.type.tensor_type.shape.dim]
    total = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            left, right = (shapes[name] for name in node.input[:2])
            inner = math.prod(right[1:]) if node.op_type == "Conv" else left[-1]
            total += math.prod(shapes[node.output[0]]) * inner
    return total


def compile_model(model: pathlib.Path, file: pathlib.Path, chip: str) -> dict[str, Any]:
    """Compiles in a process of its own: the binary becomes `file`, and beside it lies the ONNX file that runs it.

    Returns {"nodes", "off_npu": types of nodes that stay on the CPU, "npu_share", "ddr": bytes of memory traffic}.
    Raises InputError where nothing compiles.
    """
    import onnx

    wrapper = file.with_suffix(".context.onnx")
    binary = file.with_suffix(".context_qnn.bin")
    for stale in (wrapper, binary):
        stale.unlink(missing_ok=True)
    output = call("compile", str(model), str(wrapper), chip)
    compiled = onnx.load(wrapper, load_external_data=False)
    on_cpu = [node for node in compiled.graph.node if node.op_type != "EPContext"]
    contexts = [node for node in compiled.graph.node if node.op_type == "EPContext"]
    total = len(onnx.load(model, load_external_data=False).graph.node)
    if not contexts or not binary.exists():
        raise InputError(f"{model}: nothing of it compiles for {chip}; {reason(output)}")
    name = file.name.removeprefix("tmp.")
    for attribute in (attribute for node in contexts for attribute in node.attribute):
        if attribute.name == "ep_cache_context":
            attribute.s = name.encode()
    onnx.save(compiled, file.with_name(name).with_suffix(".onnx"))
    binary.replace(file)
    wrapper.unlink()
    traffic = {name: int(value) for name, value in SUMMARY.findall(output)}
    return {
        "nodes": total,
        "off_npu": sorted(node.op_type for node in on_cpu),
        "npu_share": 1 - len(on_cpu) / total,
        "ddr": {name: traffic.get(f"{name}_bytes") for name in ("write_total", "read_total", "spill", "fill")},
    }


def simulate(model: pathlib.Path, chip: str, inputs: dict[str, np.ndarray], folder: pathlib.Path) -> list[np.ndarray]:
    """The model's outputs, in order, by the compiler's simulator of the NPU."""
    input_file, output_file = folder / "tmp.inputs.npz", folder / "tmp.outputs.npz"
    arrays: dict[str, Any] = inputs
    np.savez(input_file, **arrays)
    call("simulate", str(model), str(output_file), chip, str(input_file))
    with np.load(output_file) as file:
        outputs = [file[name] for name in file.files]
    input_file.unlink()
    output_file.unlink()
    return outputs


def call(*arguments: str) -> str:
    """Runs an action of `qnn_process`. Returns the last lines that it prints, and all lines with figures or errors."""
    command = [sys.executable, "-m", "jsurgery.export.qnn_process", *arguments]
    notable, last = [], collections.deque(maxlen=50)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes, text=True, errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line)
            if SUMMARY.search(line) or ERROR.search(line):
                notable.append(line)
    output = "".join([*last, *notable])
    if process.returncode:
        raise InputError(f"{arguments[1]}: {arguments[0]} for {arguments[3]} failed; {reason(output)}")
    return output


def reason(output: str) -> str:
    """The last line about an error, or the last line if there is none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    error_lines = [line for line in lines if ERROR.search(line)]
    return (error_lines or lines or ["it printed nothing"])[-1][-300:]
