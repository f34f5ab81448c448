"""The process of the NPU's compiler or simulator, one for each graph: a crash of either costs that graph alone.

python -m jsurgery.export.qnn_process compile|simulate MODEL.ONNX TARGET CHIP [INPUTS.NPZ]

It imports nothing of jsurgery that loads JAX: starting would take longer than a small graph's compile.
"""

import os
import sys
from typing import Any

import numpy as np

from .child_process import end_with_parent

CHIPS = {"SM8750": (69, 79), "SM8650": (57, 75)}  # name -> QNN's number of the chip, version of its HTP


def session(model: str, chip: str, context: str | None):
    """A session of ONNX Runtime on the NPU's compiler; nodes that it refuses go to the CPU when compiling."""
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
    end_with_parent()
    if action == "compile":
        session(model, chip, target)
        return
    with np.load(inputs) as given:
        found = dict(given)
    running = session(model, chip, None)
    names = [output.name for output in running.get_outputs()]
    made: dict[str, Any] = dict(zip(names, running.run(names, found), strict=True))
    np.savez(target, **made)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the compiler's threads are not waited for
