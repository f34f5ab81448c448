"""`jsurgery convert`: transformers between layouts, and the VAE and text encoder of the original repository."""

import dataclasses
import json
import os
import pathlib
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from etils import epath
from flax import nnx
from torch.nn import functional as F

from jsurgery import cli
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import InputError
from jsurgery.io.safetensors import read_tensors, write_tensors
from jsurgery.wan import checkpoint_layouts, tensor_prefixes, torch_layout
from jsurgery.wan import convert as convert_module
from jsurgery.wan.checkpoint import load_text_encoder, load_vae, open_text_encoder, save_transformer
from jsurgery.wan.checkpoint_layouts import original_text_encoder_name, original_vae_name
from jsurgery.wan.convert import convert
from jsurgery.wan.model_config import TextEncoderConfig, VaeConfig, WanConfig
from jsurgery.wan.model_folder import check_pipeline, pipeline_folder
from jsurgery.wan.models import VAE_5B
from jsurgery.wan.text_encoder import TextEncoder, position_buckets
from jsurgery.wan.vae import WanVae

ONE_HEAD = WanConfig(
    num_attention_heads=1, in_channels=4, out_channels=4, text_dim=24, freq_dim=32, ffn_dim=48, num_layers=2
)
UMT5 = {"vocab": 40, "dim": 24, "heads": 3, "head_dim": 4, "ffn": 20, "layers": 2, "buckets": 32}


def test_converting_through_all_layouts_gives_the_same_tensors(tmp_path, random_transformer, capsys):
    """And the same types: bfloat16 stays bfloat16."""
    save_transformer(random_transformer(ONE_HEAD), tmp_path / "float32", "original")
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in read_tensors(tmp_path / "float32").items()}
    write_tensors(tmp_path / "start" / "weights.safetensors", tensors)

    steps = [
        ("comfyui", "comfy.safetensors"),
        ("diffusers", "diffusers"),
        ("comfyui", "b.safetensors"),
        ("original", "c"),
    ]
    previous = "start"
    for layout, output in steps:
        arguments = [f"--model={tmp_path / previous}", f"--output={tmp_path / output}", f"--layout={layout}"]
        assert cli.main(["convert", *arguments]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / output)
        previous = output
    assert set(read_tensors(tmp_path / "diffusers")) == set(
        checkpoint_layouts.transformer_tensors(random_transformer(ONE_HEAD))
    )
    found = read_tensors(tmp_path / "c")
    assert all(tensor.dtype == ml_dtypes.bfloat16 for tensor in found.values())
    np.testing.assert_equal(found, tensors)


def test_converting_a_pipeline_folder_and_a_hybrid(tmp_path, tiny_pipeline, random_transformer, capsys):
    convert(str(tiny_pipeline), tmp_path / "original", "original")
    convert(str(tmp_path / "original"), tmp_path / "back", "diffusers")
    expected = tiny_pipeline / "transformer"
    np.testing.assert_equal(read_tensors(tmp_path / "back"), read_tensors(expected))
    assert (tmp_path / "back" / "config.json").read_text() == (expected / "config.json").read_text()

    hybrid = tmp_path / "hybrid"
    operated = random_transformer(WanConfig(**vars(ONE_HEAD) | {"hybrid": HybridConfig((1, 2))}))
    save_transformer(operated, hybrid, more={"base_pipeline": "somewhere"})
    fields = json.loads((hybrid / "config.json").read_text())
    assert fields["base_pipeline"] == "somewhere"
    convert(str(hybrid), tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == fields
    np.testing.assert_equal(read_tensors(tmp_path / "copy"), read_tensors(hybrid))
    assert cli.main(["convert", f"--model={hybrid}", f"--output={tmp_path / 'no'}", "--layout=original"]) == 2
    assert "a hybrid transformer has no original layout" in capsys.readouterr().err


def original_umt5(vocab, dim, heads, head_dim, ffn, layers, buckets) -> dict[str, tuple[int, ...]]:
    """The names and shapes in the original repository's encoder, copied from its modules."""
    shapes = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    for i in range(layers):
        block = {f"attn.{side}": (heads * head_dim, dim) for side in "qkv"} | {"attn.o": (dim, heads * head_dim)}
        block |= {
            "ffn.gate.0": (ffn, dim),
            "ffn.fc1": (ffn, dim),
            "ffn.fc2": (dim, ffn),
            "norm1": (dim,),
            "norm2": (dim,),
        }
        block |= {"pos_embedding.embedding": (buckets, heads)}
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def umt5_embeddings(tensors: dict[str, torch.Tensor], ids: np.ndarray, heads: int) -> np.ndarray:
    """The forward pass of the original encoder for one prompt, from tensors with its names."""

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * tensors[f"{name}.weight"]

    x = tensors["token_embedding.weight"][torch.tensor(ids)]
    buckets = torch.tensor(position_buckets(len(ids), 32, 128)).long()
    for i in range(UMT5["layers"]):
        linear = lambda name, x, block=f"blocks.{i}": x @ tensors[f"{block}.{name}.weight"].T
        h = norm(x, f"blocks.{i}.norm1")
        q, k, v = (linear(f"attn.{side}", h).unflatten(-1, (heads, -1)).transpose(0, 1) for side in "qkv")
        bias = tensors[f"blocks.{i}.pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        y = torch.softmax(q @ k.mT + bias, -1) @ v
        x = x + linear("attn.o", y.transpose(0, 1).flatten(1))
        h = norm(x, f"blocks.{i}.norm2")
        x = x + linear("ffn.fc2", linear("ffn.fc1", h) * F.gelu(linear("ffn.gate.0", h), approximate="tanh"))
    return norm(x, "norm").numpy()


def test_text_encoder_converted_from_a_pth_gives_the_same_embeddings(tmp_path):
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) * 0.5 for name, shape in original_umt5(**UMT5).items()}
    torch.save(tensors, tmp_path / "t5.pth")
    convert(str(tmp_path / "t5.pth"), tmp_path / "text_encoder")
    ids = np.array([3, 17, 5, 39, 1])
    encoder = load_text_encoder(tmp_path / "text_encoder")
    found = encoder(ids[None], np.ones((1, 5), np.int32))[0]
    expected = umt5_embeddings(tensors, ids, UMT5["heads"])
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    # A control: swapping two tensors of equal shape changes the result.
    tensors["blocks.1.ffn.gate.0.weight"], tensors["blocks.1.ffn.fc1.weight"] = (
        tensors["blocks.1.ffn.fc1.weight"],
        tensors["blocks.1.ffn.gate.0.weight"],
    )
    assert np.abs(found - umt5_embeddings(tensors, ids, UMT5["heads"])).max() > 1e-3


def test_bfloat16_in_a_pth_stays_bfloat16(tmp_path):
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in original_umt5(**UMT5).items()}
    torch.save(tensors, tmp_path / "t5.pth")
    convert(str(tmp_path / "t5.pth"), tmp_path / "text_encoder")
    found = read_tensors(tmp_path / "text_encoder")
    for name, tensor in found.items():
        assert tensor.dtype == ml_dtypes.bfloat16
        assert np.array_equal(tensor.astype(np.float32), tensors[original_text_encoder_name(name)].float().numpy())
    assert found["shared.weight"].shape == (40, 24)


def test_original_names_of_umt5_xxl():
    shapes = torch_layout.mirrored_shapes(nnx.eval_shape(lambda: TextEncoder(TextEncoderConfig(), rngs=nnx.Rngs(0))))
    found = {original_text_encoder_name(name): shape for name, shape in shapes.items()}
    expected = original_umt5(vocab=256384, dim=4096, heads=64, head_dim=64, ffn=10240, layers=24, buckets=32)
    assert found == expected and len(found) == 242


def test_original_names_of_the_vae():
    """Compared with diffusers' own converter."""
    shapes = torch_layout.mirrored_shapes(nnx.eval_shape(lambda: WanVae(VaeConfig(), rngs=nnx.Rngs(0))))
    original = {original_vae_name(name): name for name in shapes}
    assert len(original) == len(shapes) == 194
    assert convert_wan_vae_to_diffusers(dict(original)) == {name: name for name in shapes}
    pairs = {
        "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
        "encoder.downsamples.8.time_conv.weight": (384, 384, 3, 1, 1),
        "decoder.upsamples.4.residual.2.weight": (384, 192, 3, 3, 3),
        "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
        "decoder.upsamples.14.residual.6.bias": (96,),
        "decoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "encoder.head.2.weight": (32, 384, 3, 3, 3),
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.bias": (16,),
    }
    for name, shape in pairs.items():
        assert shapes[original[name]] == shape, name


def test_the_vae_of_wan2_2_converted_from_the_original_names(tmp_path):
    """The names in the original repository's file, of some layers of every kind."""
    config = VaeConfig(**VAE_5B | {"base_dim": 2, "decoder_base_dim": 3})
    torch.manual_seed(0)
    expected = AutoencoderKLWan.from_config(config.to_json()).state_dict()
    original = {original_vae_name(name, shortcuts=True): name for name in expected}
    for old, new in {
        "encoder.conv1.weight": "encoder.conv_in.weight",
        "encoder.downsamples.0.downsamples.1.residual.2.bias": "encoder.down_blocks.0.resnets.1.conv1.bias",
        "encoder.downsamples.1.downsamples.0.shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.downsamples.2.downsamples.2.resample.1.weight": "encoder.down_blocks.2.downsampler.resample.1.weight",
        "encoder.downsamples.2.downsamples.2.time_conv.bias": "encoder.down_blocks.2.downsampler.time_conv.bias",
        "decoder.upsamples.1.upsamples.2.residual.6.weight": "decoder.up_blocks.1.resnets.2.conv2.weight",
        "decoder.upsamples.0.upsamples.3.time_conv.weight": "decoder.up_blocks.0.upsampler.time_conv.weight",
        "decoder.upsamples.2.upsamples.3.resample.1.bias": "decoder.up_blocks.2.upsampler.resample.1.bias",
        "decoder.middle.1.proj.weight": "decoder.mid_block.attentions.0.proj.weight",
        "decoder.head.0.gamma": "decoder.norm_out.gamma",
        "conv2.weight": "post_quant_conv.weight",
    }.items():
        assert original[old] == new
    assert len(original) == len(expected) and "encoder.downsamples.3.downsamples.2.resample.1.bias" not in original
    torch.save({old: expected[new] for old, new in original.items()}, tmp_path / "Wan2.2_VAE.pth")
    convert(str(tmp_path / "Wan2.2_VAE.pth"), tmp_path / "vae")
    assert load_vae(tmp_path / "vae").config == config
    write_tensors(tmp_path / "vae.safetensors", {name: tensor.numpy() for name, tensor in expected.items()})
    convert(str(tmp_path / "vae.safetensors"), tmp_path / "again")
    for folder in ("vae", "again"):
        np.testing.assert_equal(read_tensors(tmp_path / folder), {name: t.numpy() for name, t in expected.items()})


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_vae_converted_from_the_original_names(tmp_path, kind):
    torch.manual_seed(0)
    reference = AutoencoderKLWan(base_dim=4)
    expected = reference.state_dict()
    tensors = {original_vae_name(name): tensor for name, tensor in expected.items()}
    file = tmp_path / f"Wan2.1_VAE.{kind}"
    if kind == "pth":
        torch.save(tensors, file)
    else:
        write_tensors(file, {name: tensor.numpy() for name, tensor in tensors.items()})
    convert(str(file), tmp_path / "vae")
    assert load_vae(tmp_path / "vae").config == VaeConfig(base_dim=4)
    loaded = AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())

    del tensors["decoder.middle.0.residual.3.gamma"]
    write_tensors(tmp_path / "lacking.safetensors", {name: tensor.numpy() for name, tensor in tensors.items()})
    with pytest.raises(InputError, match=r"lacking.*missing decoder\.middle\.0\.residual\.3\.gamma \(16, 1, 1, 1\)"):
        convert(str(tmp_path / "lacking.safetensors"), tmp_path / "other")


PREFIXES = ("model.diffusion_model.", "diffusion_model.", "module.", "_orig_mod.", "model.", "module._orig_mod.model.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_transformer_is_read_under_any_prefix(tmp_path, tiny_pipeline, layout, prefix):
    convert(str(tiny_pipeline), tmp_path / "plain", layout)
    fields = json.loads((tmp_path / "plain" / "config.json").read_text())
    plain = read_tensors(tmp_path / "plain")
    write_tensors(tmp_path / "m" / "w.safetensors", {prefix + name: tensor for name, tensor in plain.items()})
    (tmp_path / "m" / "config.json").write_text(json.dumps(fields))
    convert(str(tmp_path / "m"), tmp_path / "out")
    np.testing.assert_equal(read_tensors(tmp_path / "out"), read_tensors(tiny_pipeline / "transformer"))


def test_wrappers_within_names_are_taken_out_and_two_of_a_name_refused(tmp_path, tiny_pipeline):
    plain = read_tensors(tiny_pipeline / "transformer")
    wrapped = {name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): t for name, t in plain.items()}
    folder = shutil.copytree(tiny_pipeline / "transformer", tmp_path / "m")
    write_tensors(folder / "diffusion_pytorch_model.safetensors", wrapped)
    convert(str(folder), tmp_path / "out")
    np.testing.assert_equal(read_tensors(tmp_path / "out"), plain)
    twice = wrapped | {"blocks.1.attn1.to_q.bias": plain["blocks.1.attn1.to_q.bias"]}
    write_tensors(folder / "diffusion_pytorch_model.safetensors", twice)
    with pytest.raises(InputError, match="holds blocks.1.attn1.to_q.bias twice"):
        convert(str(folder), tmp_path / "other")


def test_the_shortest_prefix_after_which_99_of_100_names_are_known():
    known = {f"block.{i}.weight" for i in range(100)}.__contains__
    prefix = lambda names: tensor_prefixes.shortest_prefix(names, known)
    names = [f"block.{i}.weight" for i in range(100)]
    assert prefix(names) == "" and prefix([f"a.b.{name}" for name in names]) == "a.b."
    assert prefix([*(f"a.{name}" for name in names[:99]), "other"]) == "a."
    assert prefix([*(f"a.{name}" for name in names[:98]), "other", "another"]) is None
    assert prefix(["x", "y"]) is None and prefix([]) is None


def test_a_text_encoder_as_comfyui_has_it(tmp_path, tiny_pipeline):
    """One file with the tokenizer among its tensors, a prefix, and the embeddings under their other name alone."""
    plain = read_tensors(tiny_pipeline / "text_encoder")
    named = {name.replace("shared.", "encoder.embed_tokens."): tensor for name, tensor in plain.items()}
    write_tensors(tmp_path / "a.safetensors", named | {"spiece_model": np.zeros(9, np.uint8)})
    write_tensors(tmp_path / "b.safetensors", {f"text_encoders.umt5xxl.transformer.{n}": t for n, t in plain.items()})
    for name in "ab":
        convert(str(tmp_path / f"{name}.safetensors"), tmp_path / name)
        np.testing.assert_equal(read_tensors(tmp_path / name), plain)
        assert load_text_encoder(tmp_path / name).config == load_text_encoder(tiny_pipeline / "text_encoder").config
    folder = shutil.copytree(tiny_pipeline / "text_encoder", tmp_path / "text_encoder")
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", named)
    _, tensors = open_text_encoder(folder)
    assert set(tensors) == set(plain)


@pytest.mark.parametrize("prefix", ["", "model.", "first_stage_model."])
@pytest.mark.parametrize("named", [lambda name: name, original_vae_name])
def test_a_vae_in_one_file_of_any_names(tmp_path, prefix, named):
    expected = {name: tensor.numpy() for name, tensor in AutoencoderKLWan(base_dim=4).state_dict().items()}
    write_tensors(tmp_path / "vae.safetensors", {prefix + named(name): tensor for name, tensor in expected.items()})
    convert(str(tmp_path / "vae.safetensors"), tmp_path / "vae")
    np.testing.assert_equal(read_tensors(tmp_path / "vae"), expected)


def test_the_original_repositorys_folder_becomes_a_pipeline(tmp_path, tiny_pipeline, monkeypatch):
    convert(str(tiny_pipeline), tmp_path / "m", "original")
    sizes = load_vae(tiny_pipeline / "vae").config
    monkeypatch.setattr(convert_module, "VaeConfig", lambda base_dim: dataclasses.replace(sizes, base_dim=base_dim))
    parts = (
        ("vae", "Wan2.1_VAE.pth", original_vae_name),
        ("text_encoder", "models_t5_x.pth", original_text_encoder_name),
    )
    for part, file, name_of in parts:
        tensors = read_tensors(tiny_pipeline / part)
        torch.save({name_of(name): torch.tensor(tensor) for name, tensor in tensors.items()}, tmp_path / "m" / file)
    (tmp_path / "m" / "google" / "umt5-xxl").mkdir(parents=True)
    shutil.copy(tiny_pipeline / "tokenizer" / "spiece.model", tmp_path / "m" / "google" / "umt5-xxl")
    with pytest.raises(InputError, match="jsurgery convert --model="):
        pipeline_folder(epath.Path(tmp_path / "m"))
    convert(str(tmp_path / "m"), tmp_path / "out")
    assert check_pipeline(str(tmp_path / "out")) == check_pipeline(str(tiny_pipeline))
    for part in ("transformer", "vae", "text_encoder"):
        np.testing.assert_equal(read_tensors(tmp_path / "out" / part), read_tensors(tiny_pipeline / part))


def test_a_pickle_with_more_than_tensors_is_converted(tmp_path, tiny_pipeline):
    tensors = {name: torch.tensor(t) for name, t in read_tensors(tiny_pipeline / "transformer").items()}
    shutil.copy(tiny_pipeline / "transformer" / "config.json", tmp_path)
    torch.save({"state_dict": {f"module.{n}": t for n, t in tensors.items()}, "step": 7, "lr": 0.1}, tmp_path / "a.pt")
    convert(str(tmp_path / "a.pt"), tmp_path / "out")
    np.testing.assert_equal(read_tensors(tmp_path / "out"), read_tensors(tiny_pipeline / "transformer"))
    torch.save({"generator": tensors, "generator_ema": tensors}, tmp_path / "b.pt")
    with pytest.raises(InputError, match=r"b.pt: expected a dictionary of tensors, found .*generator, generator_ema"):
        convert(str(tmp_path / "b.pt"), tmp_path / "other")


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"conv1.weight": torch.zeros(3).to(torch.float8_e4m3fn)}, "conv1.weight: holds numbers of type float8_e4m3fn"),
        ({"conv1.weight": torch.zeros(3, 3).to_sparse()}, "float32 .sparse_coo."),
        ({"blocks.0.self_attn.q.lora_down.weight": torch.zeros(3)}, "holds a LoRA"),
        ({"a.weight": torch.zeros(3), "a.weight_scale_inv": torch.zeros(1)}, "fp8_scaled"),
        ({0: torch.zeros(3)}, "expected a dictionary of tensors"),
    ],
)
def test_a_pickle_of_another_format_is_named(tmp_path, tensors, found):
    torch.save(tensors, tmp_path / "m.pt")
    with pytest.raises(InputError, match=f"m.pt: .*{found}"):
        convert(str(tmp_path / "m.pt"), tmp_path / "out")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    tensors = {"token_embedding.weight": torch.zeros(3, 2), "conv1.weight": Payload()}
    torch.save(tensors, "model.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"model\.pth: refused: it names posix\.mkdir"):
        convert("model.pth", "out")
    assert not pathlib.Path("payload-ran").exists() and not pathlib.Path("out").exists()
    torch.load("model.pth", weights_only=False)
    assert pathlib.Path("payload-ran").exists()  # a control: it runs where pickles are trusted


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (lambda sound: b"", "an empty file"),
        (lambda sound: b"<!DOCTYPE html>", "HTML"),
        (lambda sound: b"version https://git-lfs.github.com/spec/v1\noid", "git-LFS pointer"),
        (lambda sound: sound[:-40], "truncated"),
        (lambda sound: sound[:200], "truncated"),
        (lambda sound: b"\x80\x02garbage", "truncated or damaged"),
        (lambda sound: b"\x80\x02.", "truncated or damaged"),  # found by fuzzing: no UnpicklingError, but an IndexError
    ],
)
def test_a_damaged_pth_is_refused(tmp_path, content, cause):
    file = tmp_path / "Wan2.1_VAE.pth"
    torch.save({"conv1.weight": torch.zeros(300)}, file)
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(InputError, match=f"Wan2.1_VAE.pth: not a file of torch.save: .*{cause}"):
        convert(str(file), tmp_path / "out")


def test_bad_arguments_are_refused(tmp_path, monkeypatch, tiny_pipeline, capsys):
    def refusal(model, output="out", layout="diffusers") -> str:
        arguments = [f"--model={model}", f"--output={tmp_path / output}", f"--layout={layout}"]
        assert cli.main(["convert", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "out").exists()
        return line

    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    assert "list.pth: expected a dictionary of tensors, found list" in refusal(tmp_path / "list.pth")
    torch.save({"step": torch.zeros(3)}, tmp_path / "other.pth")
    assert "found tensors such as step" in refusal(tmp_path / "other.pth")
    assert "absent.pth: no such file" in refusal(tmp_path / "absent.pth")
    assert "found a VAE" in refusal(tiny_pipeline / "vae")
    assert "token_embedding.weight of 2 axes" in (
        torch.save({"token_embedding.weight": torch.zeros(3)}, tmp_path / "t5.pth") or refusal(tmp_path / "t5.pth")
    )
    assert "not a transformer" in refusal(tmp_path / "t5.pth", layout="original")
    assert "takes a name that ends in .safetensors" in refusal(tiny_pipeline, layout="comfyui")
    assert "takes the name of a folder" in refusal(tiny_pipeline, output="out.safetensors")
    shutil.copytree(tiny_pipeline / "vae", tmp_path / "there")
    assert "is there already" in refusal(tiny_pipeline, output="there")
    assert cli.main(["convert", "--model=a", "--output=b", "--config.seed=1"]) == 2
    assert "convert takes no config" in capsys.readouterr().err

    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in refusal(tmp_path / "t5.pth")
