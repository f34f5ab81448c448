"""Parts from JAX to TFLite through a TensorFlow SavedModel: a second path that shares only weights with the torch path.

Attention is the O(N^2) reference here: the files serve comparisons, and tools that read SavedModels.
"""

import os
import pathlib
import shutil
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from jax.experimental import jax2tf

from .artefacts import Artefact, make_all
from .jax_reference import JaxParts
from .parity import errors, load_sample
from .parts import ExportJob


def export(job: ExportJob, folder: pathlib.Path, precisions: tuple[str, ...] = ()) -> None:
    """Writes every part as a SavedModel folder and converts that to a .tflite file."""
    parts, functions, tensors = {part.name: part for part in job.parts()}, JaxParts(job), job.tensors()

    def make(artefact: Artefact, file: pathlib.Path) -> dict[str, Any]:
        part = parts[artefact.part]
        specs = [tf.TensorSpec(tensors[name].shape, tensors[name].dtype, name) for name in part.inputs]
        with jax.default_matmul_precision("highest"):
            function = jax2tf.convert(functions.function(part, plain=True), with_gradient=False)
            named = lambda *arguments: dict(zip(part.outputs, function(*arguments), strict=True))
            module: Any = tf.Module()
            module.run = tf.function(named, autograph=False, input_signature=specs)
            target = folder / "savedmodel" / part.name
            shutil.rmtree(target, ignore_errors=True)
            tf.saved_model.save(module, str(target), signatures=module.run.get_concrete_function())
        converter = tf.lite.TFLiteConverter.from_saved_model(str(target))
        file.write_bytes(converter.convert())
        interpreter = Interpreter(model_path=str(file), num_threads=2)
        runner = interpreter.get_signature_runner()
        arguments: dict[str, np.ndarray] = dict(zip(part.inputs, load_sample(folder, 0, part.inputs), strict=True))
        outputs = runner(**arguments)
        facts = {
            "saved_model": f"savedmodel/{part.name}",
            "inputs": {name: name for name in part.inputs},
            "outputs": {name: name for name in part.outputs},
        }
        return facts | errors(part, [outputs[name] for name in part.outputs], folder)

    make_all(job.fingerprint, job.artefacts(folder, "savedmodel"), make)
