"""LoRAs of every key style, merged: against the formula in float64 and against diffusers with peft."""

import json
import re

import diffusers
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.cli import main
from jsurgery.io.safetensors import read_tensors
from jsurgery.wan.checkpoint import load_transformer, open_transformer, save_transformer
from jsurgery.wan.convert import convert
from jsurgery.wan.lora import check_loras
from jsurgery.wan.lora_file import LoraSource
from jsurgery.wan.model_config import WanConfig

CONFIG = WanConfig(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=8, ffn_dim=40,
    num_layers=2,
)  # fmt: skip
D = CONFIG.dim
# A layer: its name in diffusers, in the original repository, and [out, in].
LAYERS = (
    ("blocks.0.attn1.to_q", "blocks.0.self_attn.q", (D, D)),
    ("blocks.1.attn1.to_out.0", "blocks.1.self_attn.o", (D, D)),
    ("blocks.1.attn2.to_v", "blocks.1.cross_attn.v", (D, D)),
    ("blocks.0.ffn.net.0.proj", "blocks.0.ffn.0", (40, D)),
    ("blocks.1.ffn.net.2", "blocks.1.ffn.2", (D, 40)),
    ("condition_embedder.time_proj", "time_projection.1", (6 * D, D)),
    ("proj_out", "head.head", (16, D)),
)
RANK, ALPHA, SCALE = 3, 6.0, 0.7


def draw(*shape):
    generator = torch.Generator().manual_seed(int(np.prod(shape)) + len(shape))
    return torch.randn(*shape, generator=generator) / 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_transformer):
    path = tmp_path_factory.mktemp("lora") / "base"
    save_transformer(random_transformer(CONFIG), path)
    return path


@pytest.fixture(scope="module")
def weights(folder):
    return read_tensors(folder)


def merged_by_us(folder, file, scale=SCALE):
    _, tensors = open_transformer(folder, loras=[LoraSource(str(file), scale)])
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def expected(weights, factor, layers=LAYERS):
    """W + factor * B A in float64, of the pairs that `pairs` writes."""
    merged = {name: values.astype(np.float64) for name, values in weights.items()}
    for name, _, (out, into) in layers:
        change = draw(out, RANK).double().numpy() @ draw(RANK, into).double().numpy()
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + factor * change
    return merged


def distance(found, wanted):
    assert found.keys() == wanted.keys()
    return max(np.abs(found[name] - wanted[name]).max() for name in found)


def pairs(style, layers=LAYERS):
    """The tensors of a LoRA file in a key style."""
    tensors = {}
    for name, original, (out, into) in layers:
        down, up = draw(RANK, into), draw(out, RANK)
        prefix, a, b, alpha = {
            "diffusers": (f"transformer.{name}", "lora_A.weight", "lora_B.weight", False),
            "diffusion_model": (f"diffusion_model.{original}", "lora_A.weight", "lora_B.weight", False),
            "comfyui": (f"diffusion_model.{original}", "lora_down.weight", "lora_up.weight", True),
            "kohya": (f"lora_unet_{original.replace('.', '_')}", "lora_down.weight", "lora_up.weight", True),
            "peft": (f"base_model.model.{name}", "lora_A.weight", "lora_B.weight", False),
            "adapter": (original, "lora_A.default.weight", "lora_B.default.weight", False),
        }[style]
        tensors |= {f"{prefix}.{a}": down, f"{prefix}.{b}": up}
        if alpha:
            tensors[f"{prefix}.alpha"] = torch.tensor(ALPHA)
    return tensors


@pytest.mark.parametrize("style", ["diffusers", "diffusion_model", "comfyui", "kohya", "peft", "adapter"])
def test_every_key_style_is_merged_as_the_formula_says(tmp_path, folder, weights, style):
    file = tmp_path / "lora.safetensors"
    save_file(pairs(style), file)
    factor = SCALE * (ALPHA / RANK if style in ("comfyui", "kohya") else 1)
    found = merged_by_us(folder, file)
    assert distance(found, expected(weights, factor)) < 1e-6
    assert distance(found, expected(weights, 1.1 * factor)) > 1e-3, "the control"
    untouched = weights.keys() - {f"{name}.weight" for name, *_ in LAYERS}
    assert all(np.array_equal(found[name], weights[name]) for name in untouched) and len(untouched) > 40


def test_differences_of_weights_biases_norms_and_modulation(tmp_path, folder, weights):
    changes = {
        "diffusion_model.blocks.0.self_attn.q.diff_b": ("blocks.0.attn1.to_q.bias", (D,)),
        "diffusion_model.blocks.1.self_attn.norm_k.diff": ("blocks.1.attn1.norm_k.weight", (D,)),
        "diffusion_model.blocks.1.norm3.diff": ("blocks.1.norm2.weight", (D,)),
        "diffusion_model.blocks.1.norm3.diff_b": ("blocks.1.norm2.bias", (D,)),
        "diffusion_model.blocks.0.diff_m": ("blocks.0.scale_shift_table", (1, 6, D)),
        "diffusion_model.head.diff_m": ("scale_shift_table", (1, 2, D)),
        "diffusion_model.patch_embedding.diff": ("patch_embedding.weight", (D, 4, 1, 2, 2)),
        "diffusion_model.patch_embedding.diff_b": ("patch_embedding.bias", (D,)),
        "diffusion_model.text_embedding.0.diff": ("condition_embedder.text_embedder.linear_1.weight", (D, 16)),
    }
    file = tmp_path / "lora.safetensors"
    save_file(pairs("comfyui") | {name: draw(*shape) for name, (_, shape) in changes.items()}, file)
    wanted = expected(weights, SCALE * ALPHA / RANK)
    for name, shape in changes.values():
        wanted[name] = wanted[name] + SCALE * draw(*shape).double().numpy()
    assert distance(merged_by_us(folder, file), wanted) < 1e-6


def test_two_loras_add_up_and_16_bits_are_rounded_once(tmp_path, folder, weights):
    one, two, half = tmp_path / "one.safetensors", tmp_path / "two.safetensors", tmp_path / "half"
    save_file(pairs("kohya", LAYERS[:3]), one)
    save_file({name: tensor.bfloat16() for name, tensor in pairs("diffusers", LAYERS[:1]).items()}, two)
    _, tensors = open_transformer(folder, loras=[LoraSource(str(one), 0.5), LoraSource(str(two), -1.0)])
    wanted = expected(weights, 0.5 * ALPHA / RANK, LAYERS[:3])
    name, _, (out, into) = LAYERS[0]
    rounded = lambda *shape: draw(*shape).bfloat16().double().numpy()
    wanted[f"{name}.weight"] = wanted[f"{name}.weight"] - rounded(out, RANK) @ rounded(RANK, into)
    assert distance({name: np.asarray(tensor) for name, tensor in tensors.items()}, wanted) < 1e-6

    model = load_transformer(folder)
    save_transformer(model, half)
    stored = {name: torch.from_numpy(np.array(values)).bfloat16() for name, values in read_tensors(half).items()}
    save_file(stored, half / "diffusion_pytorch_model.safetensors")
    (half / "hashes.json").unlink()
    output = convert(str(half), str(tmp_path / "out"), loras=[LoraSource(str(one), 0.5)])
    written = load_file(output / "diffusion_pytorch_model.safetensors")
    wanted = expected({k: v.float().numpy() for k, v in stored.items()}, 0.5 * ALPHA / RANK, LAYERS[:3])
    for name, values in written.items():
        assert values.dtype == torch.bfloat16 and torch.equal(values, torch.from_numpy(wanted[name]).bfloat16())


@pytest.fixture(scope="module")
def reference(folder):
    fields = {name: value for name, value in CONFIG.to_json().items() if not name.startswith("_")}
    model = diffusers.WanTransformer3DModel(**fields).eval()
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return model


def velocities(model, loaded):
    """Of diffusers' and of our transformer for the same inputs."""
    latents, text, times = draw(1, 4, 2, 6, 4), draw(1, 5, 16), torch.tensor([300.0])
    with torch.no_grad():
        theirs = model(latents, times, text, return_dict=False)[0].permute(0, 2, 3, 4, 1).numpy()
    ours = loaded(jnp.asarray(latents.permute(0, 2, 3, 4, 1).numpy()), jnp.asarray([300.0]), jnp.asarray(text.numpy()))
    return theirs, np.asarray(ours)


def test_a_file_that_diffusers_writes_gives_the_model_that_diffusers_computes(tmp_path, folder, reference):
    """Written by peft and diffusers with another alpha than rank, which stands in the header alone."""
    config = peft.LoraConfig(r=RANK, lora_alpha=5, target_modules=["to_q", "to_v", "to_out.0", "ffn.net.2"])
    reference.add_adapter(config, "made")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    try:
        state, metadata = peft.get_peft_model_state_dict(reference, adapter_name="made"), config.to_dict()
        diffusers.WanPipeline.save_lora_weights(
            tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata
        )
        file = str(tmp_path / "pytorch_lora_weights.safetensors")
        with safe_open(file, "np") as opened:
            assert json.loads(opened.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 5
        theirs, ours = velocities(reference, load_transformer(folder, loras=[LoraSource(file)]))
        assert np.abs(theirs - ours).max() < 1e-5 * np.abs(theirs).max()
        _, without = velocities(reference, load_transformer(folder))
        _, double = velocities(reference, load_transformer(folder, loras=[LoraSource(file, 2.0)]))
        assert min(np.abs(theirs - other).max() for other in (without, double)) > 1e-3 * np.abs(theirs).max()
    finally:
        reference.delete_adapters("made")


@pytest.mark.parametrize("style", ["diffusers", "diffusion_model", "comfyui"])
def test_diffusers_own_reader_merges_the_same(tmp_path, folder, reference, style):
    """Of the layers that it reads, which differ by style."""
    file = tmp_path / "lora.safetensors"
    save_file(pairs(style, LAYERS[:5]), file)
    state = load_file(file)
    if style != "diffusers":
        state = _convert_non_diffusers_wan_lora_to_diffusers(state)
    reference.load_lora_adapter(state, prefix="transformer", adapter_name="read")
    try:
        reference.fuse_lora(adapter_names=["read"])
        named = {re.sub(r"\.base_layer", "", name): p for name, p in reference.state_dict().items()}
        theirs = {name: p.numpy().copy() for name, p in named.items() if "lora_" not in name}
    finally:
        reference.unfuse_lora()
        reference.delete_adapters("read")
    assert distance(merged_by_us(folder, file, 1.0), theirs) < 1e-6


def test_a_lora_of_the_teacher_on_an_operated_model(tmp_path, random_transformer, weights, capsys):
    maps = FeatureMapConfig()
    config = WanConfig(**{**vars(CONFIG), "hybrid": HybridConfig(rates=(1, 4), feature_map=maps)})
    folder, file = tmp_path / "hybrid", tmp_path / "lora.safetensors"
    save_transformer(random_transformer(config), folder)
    save_file(pairs("diffusers"), file)
    check_loras(config, [LoraSource(str(file))])
    assert not capsys.readouterr().err, "it changes no queries or keys of block 1, which is converted"
    layers = [*LAYERS, ("blocks.1.attn1.to_k", "blocks.1.self_attn.k", (D, D))]
    save_file(pairs("kohya", layers), file)
    check_loras(config, [LoraSource(str(file))])
    line = capsys.readouterr().err
    assert "blocks.1.attn1.to_k.weight" in line and "converted" in line and len(line.splitlines()) == 1
    found = merged_by_us(folder, file)
    wanted = expected(read_tensors(folder), SCALE * ALPHA / RANK, layers)
    assert distance(found, wanted) < 1e-6 and any("phi_q" in name for name in found)


def test_what_convert_and_sample_write_lists_the_loras(tmp_path, tiny_pipeline, capsys):
    from jsurgery.data.video_writer import read_settings
    from jsurgery.wan.checkpoint import read_config

    network = read_config(tiny_pipeline / "transformer")
    name = "blocks.0.attn1.to_v"
    file = tmp_path / "motion.safetensors"
    save_file(
        {f"{name}.lora_A.weight": draw(RANK, network.dim), f"{name}.lora_B.weight": 40 * draw(network.dim, RANK)}, file
    )
    size = ["--frames=5", "--height=32", "--width=48", "--steps=1", "--guidance=1", "--prompt=x"]
    plain, merged = (tmp_path / f"{name}.png" for name in ("plain", "merged"))
    assert main(["sample", f"--model={tiny_pipeline}", f"--output={plain}", *size]) == 0
    lora = ["--lora", str(file), "--lora_scale", "0.5"]
    assert main(["sample", f"--model={tiny_pipeline}", f"--output={merged}", *size, *lora]) == 0
    settings = read_settings(merged)
    assert [(item["file"], item["scale"], len(item["sha256"])) for item in settings["loras"]] == [(file.name, 0.5, 64)]
    assert "loras" not in read_settings(plain) and merged.read_bytes() != plain.read_bytes()

    output = tmp_path / "written"
    assert main(["convert", f"--model={tiny_pipeline}", f"--output={output}", *lora]) == 0
    assert json.loads((output / "config.json").read_text())["loras"] == settings["loras"]
    assert not np.array_equal(
        read_tensors(output)[f"{name}.weight"], read_tensors(tiny_pipeline / "transformer")[f"{name}.weight"]
    )
    capsys.readouterr()
