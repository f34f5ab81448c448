"""Weights in formats that are not read, recognised by the names of their tensors."""

import re
from collections.abc import Iterable

UNQUANTISED = "which are not read; take the model's file in bfloat16 or float16"
# A pattern in a tensor's name -> what a file with such tensors holds, and the way out.
FORMATS = (
    (
        r"(^|[._])lora_(A|B|a|b|up|down|unet|te|transformer)\b|\.(hada_w|lokr_w)\d|\.dora_scale$|^lora_",
        "a LoRA, which changes another model; name that model, and give this file as --lora",
    ),
    (
        r"(^|\.)scaled_fp8$|\.(scale_weight|scale_input|weight_scale|weight_scale_inv|input_scale|comfy_quant)$",
        f"weights in float8 with scales (fp8_scaled), {UNQUANTISED}",
    ),
    (
        r"bitsandbytes__|\.(absmax|nested_absmax|quant_map|SCB)$",
        f"weights quantised by bitsandbytes (NF4 or int8), {UNQUANTISED}",
    ),
    (r"\.(qweight|qzeros|wscales|g_idx)$", f"weights quantised by GPTQ, AWQ or SVDQuant, {UNQUANTISED}"),
    (r"\.(int8_weight|weight\._data|weight\._scale)$", f"weights quantised to int8 or by quanto, {UNQUANTISED}"),
    (r"^(optimizer|param_groups|exp_avg)\b", "the state of an optimiser; take the file of the weights beside it"),
)
_FORMATS = tuple((re.compile(pattern), kind) for pattern, kind in FORMATS)


def foreign_format(names: Iterable[str]) -> str | None:
    """What a file holds whose tensors have these names, if that is a format that is not read; else None."""
    for name in names:
        for pattern, kind in _FORMATS:
            if pattern.search(name):
                return f"{kind}: {name[:80]}"
    return None
