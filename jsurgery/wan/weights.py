"""Safetensors in and out of NNX modules.

A module *mirrors* a reference checkpoint when its attribute path is the tensor's name ("encoder.down_blocks.0.conv1").
Only leaves differ: NNX keeps kernels input-first and channels last, torch keeps weights output-first.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import nnx

from jsurgery.errors import InputError

if TYPE_CHECKING:
    from jsurgery.wan.transformer import WanTransformer

Tensors = dict[str, np.ndarray]

# A torch weight's axes in the order in which NNX keeps them, by their number: linear, 2-D and 3-D convolution.
_KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
_LEAF_NAMES = {"kernel": "weight", "embedding": "weight"}

# safetensors' own reader for NumPy knows no bfloat16.
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_tensors(path: epath.PathLike) -> Tensors:
    """All tensors of a .safetensors file, or of a folder of them (sharded, with an index, or not).

    Raises InputError, naming the file and the likely cause, where a file is missing or unreadable.
    """
    return _collect(epath.Path(path), _read_file)


def check_tensors(path: epath.PathLike) -> None:
    """Raises InputError where `read_tensors` would, having read the headers of the files and their sizes only."""
    _collect(epath.Path(path), _read_header)


def _collect(path: epath.Path, read: Callable[[epath.Path], dict[str, Any]]) -> dict[str, Any]:
    """What `read` makes of each file, by tensor name."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected safetensors weights")
    if not path.is_dir():
        return read(path)

    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise InputError(f"{path}: expected one index of shards, found {', '.join(i.name for i in indices)}")
    if indices:
        return _collect_shards(indices[0], read)

    tensors: dict[str, Any] = {}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path}: no .safetensors file in this folder")
    for file in files:
        shard = read(file)
        if twice := tensors.keys() & shard.keys():
            raise InputError(
                f"{file}: holds {min(twice)}, which another file of the folder holds too; keep one variant"
            )
        tensors |= shard
    return tensors


def _collect_shards(index: epath.Path, read: Callable[[epath.Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        shard_of = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(shard_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: expected JSON with a weight_map of tensor to file ({error!r})") from error
    if absent := [shard for shard in shards if not (index.parent / shard).exists()]:
        raise InputError(
            f"{index}: names {len(shards)} shards, of which {', '.join(absent)} not there; download incomplete?"
        )
    tensors: dict[str, Any] = {}
    for shard in shards:
        tensors |= read(index.parent / shard)
    if lost := shard_of.keys() - tensors.keys():
        raise InputError(f"{index}: names {len(lost)} tensors that no shard holds, such as {min(lost)}")
    return tensors


def _damaged(file: epath.Path, start: bytes, size: int, fault: object) -> InputError:
    """The error for a file that begins with `start` and is not safetensors, with the likely cause."""
    start = start[:200].lstrip().lower()
    if not size:
        cause = "the file is empty"
    elif start.startswith(b"version https://git-lfs"):
        cause = "it is a git-LFS pointer; run `git lfs pull`"
    elif start.startswith(b"<"):
        cause = "it is an HTML or XML page, perhaps a download that needed a login"
    else:
        cause = f"its {size} bytes are truncated or damaged ({fault}); download it again"
    return InputError(f"{file}: not a safetensors file: {cause}")


def _read_header(file: epath.Path) -> dict[str, Any]:
    """Each tensor's dtype, shape and place, from a file whose size is what they add up to."""
    size = file.stat().length
    with file.open("rb") as stream:
        start = stream.read(200)
        header_size = int.from_bytes(start[:8], "little")
        if len(start) < 8 or header_size > size - 8:
            raise _damaged(file, start, size, "the header is cut short")
        stream.seek(8)
        text = stream.read(header_size)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        expected = 8 + header_size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, start, size, "the header is not JSON") from error
    if size != expected:
        raise _damaged(file, start, size, f"the header speaks of {expected}")
    return header


def _read_file(file: epath.Path) -> Tensors:
    data = file.read_bytes()
    try:
        parsed = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise _damaged(file, data, len(data), error) from error
    if foreign := {tensor["dtype"] for _, tensor in parsed} - _DTYPES.keys():
        raise InputError(
            f"{file}: holds tensors of type {', '.join(sorted(foreign))}; expected one of {', '.join(_DTYPES)}"
        )
    return {name: np.frombuffer(t["data"], _DTYPES[t["dtype"]]).reshape(t["shape"]) for name, t in parsed}


def write_tensors(
    path: epath.PathLike, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Writes one .safetensors file under a temporary name, then renames it: a file with the final name is complete."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # safetensors writes an array's buffer as it lies, so a transposed view has to be copied first.
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(safetensors.numpy.save(contiguous, metadata={"format": "pt"} | (metadata or {})))
    temporary.replace(path)


def mirrored_tensors(module: nnx.Module) -> Tensors:
    """The module's parameters under the reference library's names and layouts."""
    return {name: _to_torch(leaf, np.asarray(param[...])) for name, leaf, param in _mirrored_params(module)}


def load_mirrored(
    module: nnx.Module,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: jnp.dtype | None = None,
    source: epath.PathLike = "weights",
) -> None:
    """Fills the module, which may be abstract (from nnx.eval_shape), in place.

    Parameters keep their sharding, if they have one, and their dtype, unless `dtype` is given.
    Raises InputError, naming `source`, with all missing, unexpected and mis-shaped tensors; nothing is then filled.
    """
    params = {name: (leaf, param) for name, leaf, param in _mirrored_params(module)}
    # A stand-in without memory: only the shape in the reference's layout is wanted.
    expected = {name: _to_torch(leaf, np.broadcast_to(0, param.shape)).shape for name, (leaf, param) in params.items()}
    _check_fit(expected, tensors, source)
    for name, (leaf, param) in params.items():
        value = _from_torch(leaf, tensors[name]).astype(dtype or param.dtype)
        param.set_value(jax.device_put(value, param.get_value().sharding))


def _check_fit(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray], source: epath.PathLike
) -> None:
    """Raises InputError with all missing, unexpected and mis-shaped tensors."""
    problems = [f"missing {name} {expected[name]}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected {name} {tensors[name].shape}" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} should be {shape}, is {tensors[name].shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise InputError(f"{source}: {len(problems)} tensors do not fit: {'; '.join(problems)}")


def _mirrored_params(module: nnx.Module) -> list[tuple[str, str, nnx.Param]]:
    """(reference name, NNX leaf name, parameter) for each parameter."""
    params = []
    for (*path, leaf), param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        name = ".".join(map(str, (*path, _LEAF_NAMES.get(str(leaf), leaf))))
        params.append((name, str(leaf), param))
    return params


def _to_torch(leaf: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(np.argsort(_KERNEL_AXES[array.ndim])) if leaf == "kernel" else array


def _from_torch(leaf: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(_KERNEL_AXES[array.ndim]) if leaf == "kernel" else array


# The transformer. Ours, diffusers' name, the original repository's name; `{i}` counts blocks, which ours keeps stacked,
# `{j}` the layers of a feature map, of which each converted block has its own. A layer is a kernel and a bias.
TRANSFORMER_LAYERS = (
    ("patch_embedding", "patch_embedding", "patch_embedding"),
    ("condition.text_in", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition.text_out", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition.time_in", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition.time_out", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition.time_proj", "condition_embedder.time_proj", "time_projection.1"),
    ("blocks.attn1.to_q", "blocks.{i}.attn1.to_q", "blocks.{i}.self_attn.q"),
    ("blocks.attn1.to_k", "blocks.{i}.attn1.to_k", "blocks.{i}.self_attn.k"),
    ("blocks.attn1.to_v", "blocks.{i}.attn1.to_v", "blocks.{i}.self_attn.v"),
    ("blocks.attn1.to_out", "blocks.{i}.attn1.to_out.0", "blocks.{i}.self_attn.o"),
    ("blocks.attn2.to_q", "blocks.{i}.attn2.to_q", "blocks.{i}.cross_attn.q"),
    ("blocks.attn2.to_k", "blocks.{i}.attn2.to_k", "blocks.{i}.cross_attn.k"),
    ("blocks.attn2.to_v", "blocks.{i}.attn2.to_v", "blocks.{i}.cross_attn.v"),
    ("blocks.attn2.to_out", "blocks.{i}.attn2.to_out.0", "blocks.{i}.cross_attn.o"),
    ("blocks.ffn_in", "blocks.{i}.ffn.net.0.proj", "blocks.{i}.ffn.0"),
    ("blocks.ffn_out", "blocks.{i}.ffn.net.2", "blocks.{i}.ffn.2"),
    ("proj_out", "proj_out", "head.head"),
)
TRANSFORMER_ARRAYS = (
    ("blocks.attn1.norm_q", "blocks.{i}.attn1.norm_q.weight", "blocks.{i}.self_attn.norm_q.weight"),
    ("blocks.attn1.norm_k", "blocks.{i}.attn1.norm_k.weight", "blocks.{i}.self_attn.norm_k.weight"),
    ("blocks.attn2.norm_q", "blocks.{i}.attn2.norm_q.weight", "blocks.{i}.cross_attn.norm_q.weight"),
    ("blocks.attn2.norm_k", "blocks.{i}.attn2.norm_k.weight", "blocks.{i}.cross_attn.norm_k.weight"),
    ("blocks.norm2_scale", "blocks.{i}.norm2.weight", "blocks.{i}.norm3.weight"),
    ("blocks.norm2_bias", "blocks.{i}.norm2.bias", "blocks.{i}.norm3.bias"),
    ("blocks.scale_shift_table", "blocks.{i}.scale_shift_table", "blocks.{i}.modulation"),
    ("scale_shift_table", "scale_shift_table", "head.modulation"),
    ("query_maps.kernels.{j}", "blocks.{i}.attn1.phi_q.{j}.kernel", None),
    ("query_maps.biases.{j}", "blocks.{i}.attn1.phi_q.{j}.bias", None),
    ("query_maps.log_scale", "blocks.{i}.attn1.phi_q.log_scale", None),
    ("key_maps.kernels.{j}", "blocks.{i}.attn1.phi_k.{j}.kernel", None),
    ("key_maps.biases.{j}", "blocks.{i}.attn1.phi_k.{j}.bias", None),
    ("key_maps.log_scale", "blocks.{i}.attn1.phi_k.log_scale", None),
)


def transformer_names(layout: str = "diffusers") -> dict[str, str]:
    """Our parameter path -> the tensor name of a layout ("diffusers" or "original"), with `{i}` and `{j}` left in."""
    column = {"diffusers": 1, "original": 2}[layout]
    names = {row[0]: name for row in TRANSFORMER_ARRAYS if (name := row[column])}
    for row in TRANSFORMER_LAYERS:
        names |= {f"{row[0]}.kernel": f"{row[column]}.weight", f"{row[0]}.bias": f"{row[column]}.bias"}
    return names


def transformer_tensors(model: "WanTransformer", layout: str = "diffusers") -> Tensors:
    """The parameters of a WanTransformer under a layout's names and shapes."""
    return {
        name: _transformer_to_torch(path, np.asarray(param[...] if slot is None else param[slot]), model.config)
        for name, path, slot, param in _transformer_params(model, layout)
    }


def load_transformer_tensors(
    model: "WanTransformer",
    tensors: Mapping[str, np.ndarray],
    layout: str = "diffusers",
    source: epath.PathLike = "weights",
) -> None:
    """Fills a WanTransformer, which may be abstract (from nnx.eval_shape); raises InputError like `load_mirrored`."""
    entries = list(_transformer_params(model, layout))
    stand_in = lambda param, slot: np.broadcast_to(0, param.shape if slot is None else param.shape[1:])
    expected = {
        name: _transformer_to_torch(path, stand_in(param, slot), model.config).shape
        for name, path, slot, param in entries
    }
    _check_fit(expected, tensors, source)
    slices: dict[str, list[np.ndarray]] = {}
    for name, path, _, _ in entries:
        slices.setdefault(path, []).append(
            _transformer_from_torch(path, tensors[name].astype(np.float32), model.config)
        )
    for _, path, slot, param in entries:
        if path in slices:
            values = slices.pop(path)
            param.set_value(jnp.asarray(values[0] if slot is None else np.stack(values)))


def _transformer_params(model: "WanTransformer", layout: str) -> Iterator[tuple[str, str, int | None, nnx.Param]]:
    """(tensor name, our path, index on the stacked axis or None, parameter) for each tensor of the layout."""
    names = transformer_names(layout)
    config = model.config
    converted = config.hybrid.converted if config.hybrid else ()
    for keys, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parts = [str(key) for key in keys]
        path = ".".join(parts)
        pattern = names.get(".".join("{j}" if part.isdigit() else part for part in parts))
        if pattern is None:
            raise InputError(f"{path}: a hybrid transformer has no {layout} layout; use diffusers")
        layer = next((part for part in parts if part.isdigit()), None)
        if "{i}" not in pattern:
            yield pattern, path, None, param
            continue
        blocks = range(config.num_layers) if parts[0] == "blocks" else converted
        for slot, block in enumerate(blocks):
            yield pattern.format(i=block, j=layer), path, slot, param


def _transformer_to_torch(path: str, array: np.ndarray, config: Any) -> np.ndarray:
    if path == "patch_embedding.kernel":
        return array.reshape(*config.patch_size, config.in_channels, config.dim).transpose(4, 3, 0, 1, 2)
    if path.endswith("scale_shift_table"):
        return array[None]
    return array.T if path.endswith(".kernel") else array


def _transformer_from_torch(path: str, array: np.ndarray, config: Any) -> np.ndarray:
    if path == "patch_embedding.kernel":
        return array.transpose(2, 3, 4, 1, 0).reshape(-1, config.dim)
    if path.endswith("scale_shift_table"):
        return array[0]
    return array.T if path.endswith(".kernel") else array
