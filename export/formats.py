"""The formats of an export: their precisions, file suffixes, required packages and largest errors against JAX."""

# The precisions of each format. The others are made from the first.
PRECISIONS = {
    "tflite": ("float32", "fp16", "int8", "int4", "w8a16"),
    "savedmodel": ("float32",),
    "onnx": ("float32",),
    "qnn": ("fp16",),
}

SUFFIXES = {"tflite": ".tflite", "savedmodel": ".tflite", "onnx": ".onnx", "qnn": ".bin"}

# The modules that each format imports, and the package that installs each.
PACKAGES = {
    "tflite": {"torch": "torch", "litert_torch": "litert-torch", "ai_edge_quantizer": "ai-edge-quantizer"},
    "savedmodel": {"tensorflow": "tensorflow", "ai_edge_litert": "ai-edge-litert"},
    "onnx": {"torch": "torch", "onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
    "qnn": {"onnxruntime_qnn": "onnxruntime-qnn"},
    "ai_hub": {"qai_hub": "qai-hub"},
}

# Largest relative errors |ours - JAX's| / |JAX's| of a part's outputs. "torch" is the module before conversion.
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
