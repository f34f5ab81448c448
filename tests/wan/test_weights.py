"""Checkpoint layouts: names and shapes at full size, round trips, memory, shards, and refused files."""

import json
import os
import pathlib
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
import transformers
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from flax import nnx

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import InputError
from jsurgery.io.safetensors import LazyTensor, open_tensors, read_tensors, write_shards, write_tensors
from jsurgery.wan import checkpoint_layouts, torch_layout
from jsurgery.wan.checkpoint import load_transformer, read_config, save_transformer
from jsurgery.wan.model_config import TextEncoderConfig, WanConfig
from jsurgery.wan.text_encoder import TextEncoder
from jsurgery.wan.transformer import WanTransformer
from tests.conftest import FULL_GRID

ROOT = pathlib.Path(__file__).parents[2]
PUBLISHED = {
    "1.3B": (WanConfig(), 825, 1_418_996_800),
    "14B": (WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40), 1095, 14_288_491_584),
}
SMALL = WanConfig(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24, freq_dim=32, ffn_dim=48,
    num_layers=3,
)  # fmt: skip
ONE_HEAD = WanConfig(
    num_attention_heads=1, in_channels=4, out_channels=5, text_dim=24, freq_dim=32, ffn_dim=48, num_layers=2
)


def abstract(config: WanConfig) -> WanTransformer:
    return nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))


def original_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes in the original repository, copied from its modules."""
    dim, ffn = config.dim, config.ffn_dim
    patch = config.patch_size
    layers = {
        "patch_embedding": (dim, config.in_channels, *patch),
        "text_embedding.0": (dim, config.text_dim),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, config.freq_dim),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "head.head": (config.out_channels * int(np.prod(patch)), dim),
    }
    shapes = {"head.modulation": (1, 2, dim)}
    for i in range(config.num_layers):
        for attention in ("self_attn", "cross_attn"):
            layers |= {f"blocks.{i}.{attention}.{side}": (dim, dim) for side in "qkvo"}
            shapes |= {f"blocks.{i}.{attention}.norm_{side}.weight": (dim,) for side in "qk"}
        layers |= {f"blocks.{i}.ffn.0": (ffn, dim), f"blocks.{i}.ffn.2": (dim, ffn)}
        shapes |= {f"blocks.{i}.modulation": (1, 6, dim)}
        shapes |= {f"blocks.{i}.norm3.{leaf}": (dim,) for leaf in ("weight", "bias")}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def random_original(config: WanConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in original_shapes(config).items()}


def diffusers_fields(config: WanConfig) -> dict:
    return {name: value for name, value in config.to_json().items() if name != "_class_name"}


def write_header(file: pathlib.Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes a sparse file of full size, whose header alone takes space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_at_full_size(name):
    config, count, parameters = PUBLISHED[name]
    model = abstract(config)
    found = {n: tensor.shape for n, tensor in checkpoint_layouts.lazy_transformer_tensors(model, "original").items()}
    assert found == original_shapes(config)
    assert len(found) == count

    with torch.device("meta"):
        reference = WanTransformer3DModel(**diffusers_fields(config))
    found = {n: tensor.shape for n, tensor in checkpoint_layouts.lazy_transformer_tensors(model).items()}
    assert found == {n: tuple(tensor.shape) for n, tensor in reference.state_dict().items()}
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters

    comfyui = checkpoint_layouts.lazy_transformer_tensors(model, "comfyui")
    assert set(comfyui) == {f"model.diffusion_model.{n}" for n in original_shapes(config)}


def unused(function, state, *arguments) -> list[str]:
    """The parameters that the traced function does not read."""
    jaxpr = jax.make_jaxpr(function)(state, *arguments).jaxpr
    read = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    return [path for path, variable in zip(paths, jaxpr.invars, strict=False) if id(variable) not in read]


def test_14b_traces_and_reads_every_tensor():
    config, *_ = PUBLISHED["14B"]
    graph, state = nnx.split(abstract(config))
    latents = jax.ShapeDtypeStruct((1, 3, 60, 104, 16), jnp.float32)
    timesteps, text = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32)
    run = lambda state, *arguments: nnx.merge(graph, state)(*arguments)
    assert jax.eval_shape(run, state, latents, timesteps, text).shape == (1, 3, 60, 104, 16)
    assert unused(run, state, latents, timesteps, text) == []
    # A control: without the text, its embedding is not read.
    ignored = unused(lambda state, x: nnx.merge(graph, state).patch_embedding(x), state, jnp.zeros((1, 2, 64)))
    assert any("text_in" in path for path in ignored)


def test_umt5_xxl_traces_and_reads_every_tensor():
    encoder = nnx.eval_shape(lambda: TextEncoder(TextEncoderConfig(), rngs=nnx.Rngs(0)))
    shapes = torch_layout.mirrored_shapes(encoder)
    config = transformers.UMT5Config(**TextEncoderConfig().to_json())
    with torch.device("meta"):
        reference = transformers.UMT5EncoderModel(config)
    expected = {n: tuple(t.shape) for n, t in reference.state_dict().items() if n != "encoder.embed_tokens.weight"}
    assert shapes == expected and len(shapes) == 242
    graph, state = nnx.split(encoder)
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    run = lambda state, ids, mask: nnx.merge(graph, state)(ids, mask)
    assert jax.eval_shape(run, state, ids, ids).shape == (1, 512, 4096)
    assert unused(run, state, ids, ids) == []


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_config_is_derived_from_shapes_of_tensors(tmp_path, name, prefix):
    config, *_ = PUBLISHED[name]
    file = tmp_path / "wan.safetensors"
    write_header(file, {prefix + n: shape for n, shape in original_shapes(config).items()})
    assert read_config(file) == config
    assert read_config(tmp_path) == config


def test_round_trip_through_the_diffusers_layout_is_exact(tmp_path):
    """original -> ours -> diffusers -> ours -> original."""
    tensors = random_original(SMALL)
    write_tensors(tmp_path / "original" / "diffusion_pytorch_model.safetensors", tensors)
    fields = {"_class_name": "WanModel", "model_type": "t2v", "dim": 32, "num_heads": 2, "eps": 1e-5, "num_layers": 3}
    (tmp_path / "original" / "config.json").write_text(json.dumps(fields))

    first = load_transformer(tmp_path / "original")
    assert (first.config.num_attention_heads, first.config.eps) == (2, 1e-5)
    save_transformer(first, tmp_path / "diffusers")
    # The names are those of diffusers' own converter.
    expected = convert_wan_transformer_to_diffusers({n: torch.tensor(t) for n, t in tensors.items()})
    np.testing.assert_equal(read_tensors(tmp_path / "diffusers"), {n: t.numpy() for n, t in expected.items()})

    save_transformer(load_transformer(tmp_path / "diffusers"), tmp_path / "again", "original")
    np.testing.assert_equal(read_tensors(tmp_path / "again"), tensors)
    assert load_transformer(tmp_path / "again").config == first.config


def test_comfyui_layout_in_bfloat16(tmp_path):
    tensors = {
        f"model.diffusion_model.{name}": np.asarray(jnp.asarray(tensor, jnp.bfloat16))
        for name, tensor in random_original(ONE_HEAD).items()
    }
    write_tensors(tmp_path / "wan.safetensors", tensors)
    model = load_transformer(tmp_path / "wan.safetensors")
    assert model.config == ONE_HEAD
    save_transformer(model, tmp_path / "back.safetensors", "comfyui")
    for name, tensor in read_tensors(tmp_path / "back.safetensors").items():
        assert tensor.dtype == np.float32 and np.array_equal(tensor, tensors[name].astype(np.float32)), name
    with pytest.raises(InputError, match="heads of 128 channels, found 16"):
        save_transformer(abstract(SMALL), tmp_path / "small.safetensors", "comfyui")


def test_shards_are_compatible_with_diffusers(tmp_path, random_transformer):
    model = random_transformer(SMALL)
    save_transformer(model, tmp_path, shard_bytes=40_000)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    expected = checkpoint_layouts.transformer_tensors(model)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    np.testing.assert_equal(checkpoint_layouts.transformer_tensors(load_transformer(tmp_path)), expected)
    reference = WanTransformer3DModel.from_pretrained(tmp_path)
    for name, tensor in reference.state_dict().items():
        assert np.array_equal(tensor.numpy(), expected[name]), name

    WanTransformer3DModel(**diffusers_fields(SMALL)).save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert load_transformer(tmp_path / "theirs").config == SMALL

    save_transformer(model, tmp_path)  # one file, which replaces the shards and their index
    assert sorted(file.name for file in tmp_path.glob("diff*")) == ["diffusion_pytorch_model.safetensors"]
    np.testing.assert_equal(read_tensors(tmp_path), expected)


def test_a_failed_save_leaves_the_folder_unchanged(tmp_path):
    old = {name: np.full(8, i, np.float32) for i, name in enumerate("abc")}
    write_shards(tmp_path, "model", old, shard_bytes=32)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fails() -> np.ndarray:
        raise OSError("no space left")

    new = {name: tensor + 10 for name, tensor in old.items()} | {"d": LazyTensor((8,), np.dtype(np.float32), fails)}
    with pytest.raises(OSError, match="no space"):
        write_shards(tmp_path, "model", new, shard_bytes=32)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.suffix != ".tmp"} == before
    np.testing.assert_equal(read_tensors(tmp_path), old)


def test_files_are_compatible_with_safetensors(tmp_path):
    tensors = {
        "scalar": np.float32(3).reshape(()),
        "empty": np.zeros((0, 4), np.float16),
        "bytes": np.arange(5, dtype=np.uint8),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "flags": np.array([True, False]),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"made": "here"})
    np.testing.assert_equal(safetensors.numpy.load_file(tmp_path / "a.safetensors"), tensors)
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}
    safetensors.numpy.save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, tmp_path / "b.safetensors")
    for name, tensor in read_tensors(tmp_path / "b.safetensors").items():
        assert tensor.dtype == tensors[name].dtype
        np.testing.assert_array_equal(tensor.reshape(tensors[name].shape), tensors[name])


def test_a_loaded_model_does_not_depend_on_the_file(tmp_path, random_transformer):
    model = random_transformer(SMALL)
    save_transformer(model, tmp_path)
    loaded = load_transformer(tmp_path)
    with (tmp_path / "diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.write(b"\0" * file.seek(0, os.SEEK_END))
    np.testing.assert_equal(
        checkpoint_layouts.transformer_tensors(loaded), checkpoint_layouts.transformer_tensors(model)
    )


MEASURE = """
import gc
import os
import pathlib
import sys
import jax, jax.numpy as jnp
import numpy as np
from etils import epath
from etils.epath import backend
from flax import nnx
from ml_collections import ConfigDict
from jsurgery.runtime.mesh import make_mesh, parameter_shardings
from jsurgery.wan import checkpoint_layouts
from jsurgery.io.safetensors import read_tensors
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.checkpoint import load_transformer, read_config
from tests.faults.fake_gcs import FakeGcs

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

path = sys.argv[1]
jnp.zeros(3).block_until_ready()
before = memory("VmRSS")
model = load_transformer(path)
jax.block_until_ready(nnx.state(model))
print(memory("VmHWM") - before)

del model
gc.collect()
before = memory("VmRSS")
tensors = read_tensors(path)
model = nnx.eval_shape(lambda: WanTransformer(read_config(path), rngs=nnx.Rngs(0)))
checkpoint_layouts.load_transformer_tensors(model, tensors, "original")
print(memory("VmHWM") - before)

sharded = load_transformer(path, mesh=make_mesh(ConfigDict({"data": 1, "fsdp": 2, "context": 1, "tensor": 2})))
kernel = sharded.blocks.attn1.to_q.kernel[...]
assert kernel.addressable_shards[0].data.shape == (kernel.shape[0], kernel.shape[1] // 2, kernel.shape[2] // 2)
shardings = parameter_shardings(kernel.sharding.mesh, nnx.state(sharded))
assert all(jax.tree.leaves(jax.tree.map(lambda leaf, s: leaf.sharding == s, nnx.state(sharded), shardings)))
assert all(jax.tree.leaves(jax.tree.map(np.array_equal, nnx.state(sharded), nnx.state(model))))

if os.environ.get("FULL_GRID") != "1":  # `make kernels`: the rest takes as long again
    sys.exit()
store = FakeGcs()
store.objects = {f"bucket/model/{file.name}": file.read_bytes() for file in pathlib.Path(path).iterdir()}
backend.fsspec_backend._get_filesystem = lambda name: store
epath.gpath._is_tf_installed = lambda: False
remote = load_transformer("gs://bucket/model", mesh=kernel.sharding.mesh)
assert all(jax.tree.leaves(jax.tree.map(np.array_equal, nnx.state(remote), nnx.state(model))))
print(store.bytes_read)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_of_loading_and_loading_onto_a_mesh(tmp_path):
    """Loading needs little more memory than the model; a control, which reads all files first, needs more.

    From an object store, a process with several devices reads every byte once.
    """
    config = WanConfig(num_attention_heads=6, ffn_dim=3072, num_layers=8, text_dim=64, freq_dim=32)
    ramp = np.arange(4096 * 6144, dtype=np.float32)
    tensors = {
        name: LazyTensor(shape, ramp.dtype, lambda i=i, shape=shape: ramp[i : i + int(np.prod(shape))].reshape(shape))
        for i, (name, shape) in enumerate(original_shapes(config).items())
    }
    write_shards(tmp_path, "diffusion_pytorch_model", tensors, shard_bytes=60_000_000)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert sum(sizes) > 300e6 and len(sizes) > 4
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    lazy, eager, *downloaded = map(int, process.stdout.split())
    bound = 1.3 * max(sizes) + sum(sizes)
    assert lazy < bound < eager, (lazy, bound, eager)
    assert len(downloaded) == FULL_GRID
    assert all(0.999 * sum(sizes) < each < 1.001 * sum(sizes) for each in downloaded), (downloaded, sizes)


def refusal(path) -> str:
    with pytest.raises(InputError) as refused:
        load_transformer(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_other_models_are_refused_by_name(tmp_path, tiny_pipeline):
    assert "found a UMT5 text encoder" in refusal(tiny_pipeline / "text_encoder")
    assert "found a VAE" in refusal(tiny_pipeline / "vae")
    assert "no such file or folder" in refusal(tmp_path / "absent")
    write_tensors(tmp_path / "a.safetensors", {"conv.weight": np.zeros(3)})
    assert "tensors such as conv.weight" in refusal(tmp_path / "a.safetensors")

    tensors = random_original(ONE_HEAD)
    for name in ("img_emb.proj.1.weight", "blocks.0.cross_attn.k_img.weight", "vace_blocks.0.after_proj.bias"):
        write_tensors(tmp_path / "b.safetensors", tensors | {name: np.zeros(3)})
        assert name in (message := refusal(tmp_path / "b.safetensors")) and "expected a text-to-video model" in message


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"model_type": "i2v"}, ["model_type", "'t2v'", "'i2v'"]),
        ({"dim": 96}, ["dim", "128", "96"]),
        ({"num_layers": 40}, ["num_layers", "expected 2", "found 40"]),
        ({"_class_name": None, "model_type": "i2v"}, ["model_type", "'i2v'"]),
        ({"num_heads": 3}, ["num_heads", "divisor of 128", "found 3"]),
        ({"_class_name": "VaceWanModel"}, ["_class_name", "WanModel", "'VaceWanModel'"]),
    ],
)
def test_an_original_config_that_does_not_fit_is_refused(tmp_path, fields, parts):
    write_tensors(tmp_path / "diffusion_pytorch_model.safetensors", random_original(ONE_HEAD))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v"} | fields))
    message = refusal(tmp_path)
    assert all(part in message for part in ["config.json", *parts]), message


def test_a_missing_config_that_is_needed_is_refused(tmp_path, random_transformer):
    save_transformer(random_transformer(SMALL), tmp_path)
    remove_config = lambda folder: [(folder / name).unlink() for name in ("config.json", "hashes.json")]
    remove_config(tmp_path)
    assert "a width of 32 is not heads of 128" in refusal(tmp_path)
    hybrid = random_transformer(WanConfig(**vars(SMALL) | {"hybrid": HybridConfig((1, 2, 8))}))
    save_transformer(hybrid, tmp_path / "hybrid")
    with pytest.raises(InputError, match="no original layout"):
        save_transformer(hybrid, tmp_path / "original", "original")
    assert not (tmp_path / "original").exists()
    remove_config(tmp_path / "hybrid")
    assert "a hybrid transformer without its config.json" in refusal(tmp_path / "hybrid")


def test_the_config_of_another_model_beside_a_file_is_ignored(tmp_path):
    write_tensors(tmp_path / "wan.safetensors", random_original(ONE_HEAD))
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert read_config(tmp_path / "wan.safetensors") == ONE_HEAD
    for content in ("[1]", "<html>"):
        (tmp_path / "config.json").write_text(content)
        assert "config.json: expected" in refusal(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = random_original(ONE_HEAD)
    tensors["blocks.1.self_attn.q.weight"] = np.zeros((128, 64), np.float32)
    tensors["blocks.1.extra"] = tensors.pop("blocks.0.ffn.2.bias")
    write_tensors(tmp_path / "wan.safetensors", tensors)
    message = refusal(tmp_path / "wan.safetensors")
    assert "wan.safetensors: 3 tensors do not fit" in message
    assert "missing blocks.0.ffn.2.bias (128,)" in message and "unexpected blocks.1.extra (128,)" in message
    assert "blocks.1.self_attn.q.weight should be (128, 128), is (128, 64)" in message

    write_tensors(tmp_path / "wan.safetensors", {n: t for n, t in tensors.items() if not re.search("attn", n)})
    assert "; and 22 more" in refusal(tmp_path / "wan.safetensors")
    del tensors["blocks.0.ffn.0.weight"]
    write_tensors(tmp_path / "wan.safetensors", tensors)
    assert "missing blocks.0.ffn.0.weight" in refusal(tmp_path / "wan.safetensors")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_pickles_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    pickled = tmp_path / "model" / "diffusion_pytorch_model.bin"
    pickled.write_bytes(pickle.dumps({"patch_embedding.weight": Payload()}))
    assert "diffusion_pytorch_model.bin; pickles are not read" in refusal(tmp_path / "model")
    assert "diffusion_pytorch_model.bin: not a safetensors file: it is a pickle" in refusal(pickled)
    torch.save({"a": torch.zeros(3)}, pickled)
    assert "it is a pickle" in refusal(pickled.rename(tmp_path / "model.safetensors"))
    assert not (tmp_path / "payload-ran").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "payload-ran").exists()  # a control: it runs where a pickle is loaded


def test_damaged_files_are_named(tmp_path):
    tensors = random_original(ONE_HEAD)
    write_shards(tmp_path, "diffusion_pytorch_model", tensors, shard_bytes=200_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    assert len(open_tensors(tmp_path)) == len(tensors)
    sound = shard.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    for content, cause in [
        (sound[:-1], "truncated"),
        (b"", "empty"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (sound[:header].replace(b'"F32"', b'"F16"') + sound[header:], "has"),
        (sound[:header].replace(b'"F32"', b'"F9_"') + sound[header:], "F9_"),
        (sound[:header].replace(b'"shape"', b'"shade"') + sound[header:], "header"),
    ]:
        shard.write_bytes(content)
        message = refusal(tmp_path)
        assert str(shard) in message and cause in message, message
    shard.unlink()
    assert f"{shard.name} not there" in refusal(tmp_path)
    shard.write_bytes(sound)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert "a shard without its index" in refusal(tmp_path)


def test_a_file_in_an_object_store_is_read(tmp_path):
    """It has no path on this machine, and cannot be memory-mapped."""
    write_tensors(tmp_path / "a.safetensors", {"a": np.arange(3.0), "b": np.arange(4.0)})

    class Remote:
        def __getattr__(self, name):
            return getattr(tmp_path / "a.safetensors", name)

        def __str__(self):
            return "gs://bucket/a.safetensors"

    from jsurgery.io import safetensors

    local = (tmp_path / "a.safetensors").read_bytes()
    stored = safetensors._stored(Remote(), np.dtype(np.float64), (4,), len(local) - 32)  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(stored), np.arange(4.0))
