"""Runs the NPU's compiler or simulator on one graph, in a process of its own: a crash costs only that graph.

python -m jsurgery.export.qnn_process compile|simulate MODEL.ONNX TARGET CHIP [INPUTS.NPZ]

It imports no module that loads JAX, which would take longer than compiling a small graph.
"""

import os
import sys
from typing import Any

import numpy as np

from .child_process import end_with_parent

CHIPS = {"SM8750": (69, 79), "SM8650": (57, 75)}  # name -> (QNN's number of the chip, version of its HTP)


def session(model: str, chip: str, context: str | None):
    """An ONNX Runtime session on the QNN provider. With the path of a `context` it compiles into that file, and nodes
    that QNN refuses stay on the CPU; without, it simulates the NPU, and such nodes are an error."""
    import onnxruntime
    import onnxruntime_qnn

    onnxruntime.set_default_logger_severity(0 if context else 3)
    onnxruntime.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 0 if context else 3
    if context:
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_file_path", context)
        options.add_session_config_entry("ep.context_embed_mode", "0")
    else:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    soc, arch = CHIPS[chip]
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == "QNNExecutionProvider"]
    options.add_provider_for_devices(
        devices,
        {
            "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
            "htp_arch": str(arch),
            "soc_model": str(soc),
            "enable_htp_fp16_precision": "1",
            "htp_graph_finalization_optimization_mode": "3",
        },
    )
    return onnxruntime.InferenceSession(model, sess_options=options)


def main(action: str, model: str, target: str, chip: str, inputs: str = "") -> None:
    """Compiles the model into `target`, or simulates it on `inputs` and writes its outputs to `target`."""
    end_with_parent()
    if action == "compile":
        session(model, chip, target)
        return
    with np.load(inputs) as file:
        arrays = dict(file)
    running = session(model, chip, None)
    names = [output.name for output in running.get_outputs()]
    outputs: dict[str, Any] = dict(zip(names, running.run(names, arrays), strict=True))
    np.savez(target, **outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # does not wait for the compiler's threads
