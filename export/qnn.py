"""A compile for Qualcomm's Hexagon NPU (HTP) with no phone and no account, by ONNX Runtime's QNN provider on x86.

What it says of memory traffic is the compiler's own estimate. It says nothing of latency: that takes a device.
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

SIMULATED = 4e9  # multiply-adds of a part up to which the simulator is asked to run it
ERROR = re.compile(r"\[E:|<E>|Error|FAIL|error code|out of memory")
SUMMARY = re.compile(r"\b((?:spill|fill|write_total|read_total)_bytes)=(\d+)")


def export(job: ExportJob, folder: pathlib.Path, chips: tuple[str, ...]) -> None:
    """A context binary of every part that belongs on the NPU, from its ONNX artefact."""
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
        made = simulate(model, artefact.variant, dict(zip(part.inputs, inputs, strict=True)), file.parent)
        return facts | {"simulated": True} | errors(part, made, folder)

    make_all(job.fingerprint, job.artefacts(folder, "qnn", chips), make)


def multiply_adds(model: pathlib.Path) -> int:
    """Of an ONNX file's matrix products and convolutions."""
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
    """Compiles in a process of its own; leaves the binary as `file`, and beside it the ONNX file that runs it."""
    import onnx

    wrapper = file.with_suffix(".context.onnx")
    binary = file.with_suffix(".context_qnn.bin")
    for stale in (wrapper, binary):
        stale.unlink(missing_ok=True)
    output = call("compile", str(model), str(wrapper), chip)
    compiled = onnx.load(wrapper, load_external_data=False)
    left = [node for node in compiled.graph.node if node.op_type != "EPContext"]
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
        "off_npu": sorted(node.op_type for node in left),
        "npu_share": 1 - len(left) / total,
        "ddr": {name: traffic.get(f"{name}_bytes") for name in ("write_total", "read_total", "spill", "fill")},
    }


def simulate(model: pathlib.Path, chip: str, inputs: dict[str, np.ndarray], folder: pathlib.Path) -> list[np.ndarray]:
    """The outputs in order, by the compiler's simulator of the NPU."""
    given, made = folder / "tmp.inputs.npz", folder / "tmp.outputs.npz"
    arrays: dict[str, Any] = inputs
    np.savez(given, **arrays)
    call("simulate", str(model), str(made), chip, str(given))
    with np.load(made) as found:
        outputs = [found[name] for name in found.files]
    given.unlink()
    made.unlink()
    return outputs


def call(*arguments: str) -> str:
    """`qnn_process` for one action; of what the compiler prints, figures, errors and the end."""
    command = [sys.executable, "-m", "jsurgery.export.qnn_process", *arguments]
    told, last = [], collections.deque(maxlen=50)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes, text=True, errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line)
            if SUMMARY.search(line) or ERROR.search(line):
                told.append(line)
    output = "".join([*last, *told])
    if process.returncode:
        raise InputError(f"{arguments[1]}: {arguments[0]} for {arguments[3]} failed; {reason(output)}")
    return output


def reason(output: str) -> str:
    """The last line that tells of an error, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if ERROR.search(line)]
    return (told or lines or ["it said nothing"])[-1][-300:]
