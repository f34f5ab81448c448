"""Parts from torch to TFLite by litert-torch, and to lower precisions by ai-edge-quantizer.

Importing litert-torch turns on 64-bit types in JAX for the whole process; hence `worker`.
"""

import collections
import contextlib
import functools
import io
import pathlib
from typing import Any

import litert_torch
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe_manager

from .artefacts import Artefact, make_all
from .mobile_parts import MobileParts
from .parity import errors, load_sample
from .parts import ExportJob, Part

LARGE = 1 << 30  # bytes of weights from which the converter saves memory
SIGNATURE = "serving_default"
# Activation ranges are the calibrated ones times this, so that other inputs are not clipped. It costs 2 of 16 bits.
MARGIN = 4


def export(job: ExportJob, folder: pathlib.Path, precisions: tuple[str, ...]) -> None:
    """Writes every part in every one of `precisions`, which are some of PRECISIONS["tflite"]."""
    parts, modules = {part.name: part for part in job.parts()}, MobileParts(job, folder)

    @functools.lru_cache(maxsize=1)
    def float32(name: str) -> tuple[pathlib.Path, dict[str, Any]]:
        """The float32 file from which the other precisions of a part are made, and facts of the torch module."""
        artefact = Artefact(folder, "tflite", "float32", name)
        if artefact.record(job.fingerprint) is not None:
            return artefact.path, {}
        part, file = parts[name], folder / "tflite" / "tmp.float32.tflite"
        module = modules.module(part).requires_grad_(False)
        facts = {"torch": modules.error(part, module)}
        convert(module, modules.arguments(part), file)
        return file, facts

    def make(artefact: Artefact, file: pathlib.Path) -> dict[str, Any]:
        part, precision = parts[artefact.part], artefact.precision
        source, facts = float32(part.name)
        if precision == "float32":
            file.write_bytes(source.read_bytes())
        else:
            weights = precision if part.quantizes else "fp16"
            facts = facts | {"weights": weights}
            samples = range(1, job.samples) if weights == "w8a16" else ()
            quantize(source, RECIPES[weights](), [load_sample(folder, n, part.inputs) for n in samples], file)
        facts = facts | describe(file, part)
        return facts | errors(part, run(file, facts, load_sample(folder, 0, part.inputs)), folder)

    make_all(job.fingerprint, job.artefacts(folder, "tflite", precisions), make)
    (folder / "tflite" / "tmp.float32.tflite").unlink(missing_ok=True)


def convert(module, arguments: tuple, file: pathlib.Path) -> None:
    """Writes a module of static shape as a .tflite file."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    with quiet():
        litert_torch.convert(module, arguments, lightweight_conversion=size > LARGE).export(str(file))


def describe(file: pathlib.Path, part: Part) -> dict[str, Any]:
    """Facts of a .tflite file: names of the part's tensors in its signature, counts of operations, highest rank."""
    interpreter = Interpreter(model_path=str(file), experimental_default_delegate_latest_features=False)
    signature = interpreter.get_signature_list()[SIGNATURE]
    operations = collections.Counter(op["op_name"] for op in interpreter._get_ops_details())
    operations.pop("DELEGATE", None)
    return {
        "inputs": dict(zip(part.inputs, sorted(signature["inputs"], key=_number), strict=True)),
        "outputs": dict(zip(part.outputs, sorted(signature["outputs"], key=_number), strict=True)),
        "operations": dict(operations.most_common()),
        "max_rank": max(len(tensor["shape"]) for tensor in interpreter.get_tensor_details()),
    }


def run(file: pathlib.Path, facts: dict[str, Any], arguments: list[np.ndarray]) -> list[np.ndarray]:
    """The part's outputs, in order, by LiteRT's interpreter."""
    runner = Interpreter(model_path=str(file), num_threads=2).get_signature_runner()
    outputs = runner(**dict(zip(facts["inputs"].values(), arguments, strict=True)))
    return [outputs[name] for name in facts["outputs"].values()]


def quantize(source: pathlib.Path, recipe: list, calibration: list[list[np.ndarray]], file: pathlib.Path) -> None:
    """Quantises `source` by a recipe of ai-edge-quantizer into `file`.

    `calibration` holds samples of the inputs, in order, from which recipes with integer activations take ranges.
    """
    file.unlink(missing_ok=True)
    with quiet():
        worker = quantizer.Quantizer(str(source), recipe)
        ranges: Any = None
        if worker.need_calibration:
            names = sorted(Interpreter(model_path=str(source)).get_signature_runner().get_input_details(), key=_number)
            data = [dict(zip(names, arguments, strict=True)) for arguments in calibration]
            ranges = {
                tensor: {end: value * MARGIN if end in ("min", "max") else value for end, value in range_of.items()}
                for tensor, range_of in worker.calibrate({SIGNATURE: data}).items()
            }
        worker.quantize(ranges).export_model(str(file))


Everything = qtyping.TFLOperationName.ALL_SUPPORTED
Algorithm = algorithm_manager.AlgorithmName


def half_weights() -> list:
    """Weights in float16, computation in float32."""
    recipe = recipe_manager.RecipeManager()
    half = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=half, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
    )
    recipe.add_quantization_config(".*", Everything, config, Algorithm.FLOAT_CASTING)
    return recipe.get_quantization_recipe()


def dynamic_int8() -> list:
    """Weights in 8 bits; activations in 8 bits with ranges taken at run time."""
    recipe = recipe_manager.RecipeManager()
    recipe.add_dynamic_config(".*", Everything, 8)
    return recipe.get_quantization_recipe()


def int4_weights() -> list:
    """Weights in 4 bits, computation in float32."""
    recipe = recipe_manager.RecipeManager()
    recipe.add_weight_only_config(".*", Everything, 4)
    return recipe.get_quantization_recipe()


def w8a16() -> list:
    """Linear layers with 8-bit weights and 16-bit activations. Attention stays float32: the numbers that its linear
    branch divides have too wide a range for a fixed step size."""
    recipe = recipe_manager.RecipeManager()
    recipe.add_static_config(".*", qtyping.TFLOperationName.FULLY_CONNECTED, 16, 8)
    return recipe.get_quantization_recipe()


RECIPES = {"fp16": half_weights, "int8": dynamic_int8, "int4": int4_weights, "w8a16": w8a16}


@contextlib.contextmanager
def quiet():
    """Hides the libraries' progress bars, which would break up the command's own lines."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _number(name: str) -> int:
    """The number at the end of a tensor's name, to sort args_10 after args_9."""
    return int("".join(filter(str.isdigit, name.rpartition("_")[2])) or 0)
