"""The formats of an export: what each needs, its precisions, file names and bounds of parity."""

# What each format imports, and the package to name where that is missing.
PACKAGES = {
    "tflite": {"torch": "torch", "litert_torch": "litert-torch", "ai_edge_quantizer": "ai-edge-quantizer"},
    "savedmodel": {"tensorflow": "tensorflow", "ai_edge_litert": "ai-edge-litert"},
    "onnx": {"torch": "torch", "onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
    "qnn": {"onnxruntime_qnn": "onnxruntime-qnn"},
    "ai_hub": {"qai_hub": "qai-hub"},
}

# Relative errors |ours - JAX's| / |JAX's| of a part's outputs.
BOUNDS = {
    ("torch", "float32"): 1e-5,
    ("tflite", "float32"): 1e-5,
    ("tflite", "fp16"): 1e-3,
    ("tflite", "int8"): 2e-2,
    ("tflite", "int4"): 2e-1,
    ("tflite", "w8a16"): 2e-2,
    ("savedmodel", "float32"): 1e-5,
    ("onnx", "float32"): 1e-5,
    ("qnn", "fp16"): 5e-3,
}

# Precisions of each format; the first is what the others are made from.
PRECISIONS = {
    "tflite": ("float32", "fp16", "int8", "int4", "w8a16"),
    "savedmodel": ("float32",),
    "onnx": ("float32",),
    "qnn": ("fp16",),
}

SUFFIXES = {"tflite": ".tflite", "savedmodel": ".tflite", "onnx": ".onnx", "qnn": ".bin"}
