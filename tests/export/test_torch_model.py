"""The torch module compared with our JAX model, and inside diffusers' pipeline."""

import dataclasses
import functools
import itertools
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import pallas_kernels
from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.diffusion import initial_noise
from jsurgery.errors import InputError
from jsurgery.export import torch_attention
from jsurgery.export.torch_attention import TorchFeatureMap
from jsurgery.export.torch_model import HybridWanTransformer3DModel, load
from jsurgery.load_config import load_config
from jsurgery.surgery.operate import operate, save_model
from jsurgery.wan.checkpoint import load_transformer, save_transformer
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_folder import BUNDLED
from jsurgery.wan.pipeline import load_pipeline
from pallas_kernels.feature_map import PolynomialMap

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 4, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 40,
}  # fmt: skip
PROMPT, TEXT_LENGTH = "a red circle moves left over a grey background", 12
MIXED = (4, 1, "linear", 2, 8)
GRIDS = {"24 tokens": (3, 2, 4), "27 tokens": (3, 3, 3)}  # rates 2, 4 and 8 divide 24, none divides 27
HYBRIDS = {
    "max": HybridConfig(MIXED, stabilizer="max"),
    "lse": HybridConfig(MIXED, stabilizer="lse"),
    "staggered": HybridConfig(MIXED, lattice="staggered"),
    "cubic": HybridConfig((2, 1, 4), (1, 2, 4), "staggered", "max", feature_map=FeatureMapConfig(3, 1, "softplus")),
    "no linear branch": HybridConfig((8, 1, 2), linear_branch=False),
}


@pytest.fixture(scope="module")
def saved(random_transformer, tmp_path_factory):
    """A function that returns (model, folder) of a case of HYBRIDS, every tensor random."""

    @functools.cache
    def saved(case):
        config = WanConfig(**SIZES, num_layers=len(HYBRIDS[case].rates), hybrid=HYBRIDS[case])
        model, folder = random_transformer(config), tmp_path_factory.mktemp("model")
        save_transformer(model, folder)
        return model, folder

    return saved


def inputs(grid):
    rng = np.random.default_rng(1)
    frames, height, width = grid
    latents = rng.normal(size=(2, frames, 2 * height, 2 * width, SIZES["in_channels"])).astype(np.float32)
    text = rng.normal(size=(2, 5, SIZES["text_dim"])).astype(np.float32)
    return latents, np.array([987.0, 13.5], np.float32), text


@functools.partial(jax.jit, static_argnums=0)
def run(graph, params, *arguments):
    return nnx.merge(graph, params)(*arguments)


def torch_velocity(module, latents, timesteps, text):
    latents, timesteps, text = (torch.tensor(x) for x in (latents, timesteps, text))
    with torch.no_grad():
        return module(latents.permute(0, 4, 1, 2, 3), timesteps, text, return_dict=False)[0].permute(0, 2, 3, 4, 1)


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("case", "grid"),
    [("max", "24 tokens"), *((case, "27 tokens") for case in HYBRIDS)],
)
def test_equals_the_jax_model(saved, case, grid, monkeypatch):
    model, folder = saved(case)
    arguments = inputs(GRIDS[grid])
    expected = run(*nnx.split(model), *arguments)
    module = load(folder)
    at_once = torch_velocity(module, *arguments)
    assert relative_error(at_once, expected) < 1e-5
    monkeypatch.setattr(torch_attention, "BLOCK_BYTES", 2600)  # 5 tokens of attention, 8 of a feed-forward
    in_blocks = torch_velocity(module, *arguments)
    assert relative_error(in_blocks, expected) < 1e-5 and relative_error(in_blocks, at_once) < 1e-6
    if case != "no linear branch":
        assert (in_blocks != at_once).any()  # that sums over the keys are made in blocks shows in the rounding


class LargestTensor(TorchDispatchMode):
    """Keeps the size in bytes of the largest tensor that an operation returns, and that operation."""

    def __init__(self):
        super().__init__()
        self.largest = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, (tensor.numel() * tensor.element_size(), str(func)))
        return outputs


@pytest.mark.parametrize(("stabilizer", "batch"), [("max", 1), ("lse", 2)])
def test_no_tensor_at_480p_is_larger_than_a_gib(stabilizer, batch, monkeypatch):
    """Blocks of the sizes of Wan2.1 1.3B on 32,760 tokens in float32, on tensors without values."""
    config = WanConfig(num_layers=4, hybrid=HybridConfig((1, 2, 8, "linear"), stabilizer=stabilizer))

    def largest():
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            module = HybridWanTransformer3DModel(config)
            latents, text = torch.zeros(batch, 16, 21, 60, 104), torch.zeros(batch, 512, 4096)
            with LargestTensor() as found:
                (velocity,) = module(latents, torch.zeros(batch), text, return_dict=False)
        assert velocity.shape == latents.shape
        return found.largest

    size, operation = largest()
    assert size <= 1 << 30, operation
    monkeypatch.setattr(torch_attention, "BLOCK_BYTES", 1 << 40)  # control: all tokens at once
    scores = 4 * batch * 12 * 32760 * 16380 if stabilizer == "max" else 4 * batch * 32760 * 8960
    assert largest()[0] == scores > 1 << 30


@pytest.mark.parametrize("activation", pallas_kernels.feature_map.ACTIVATIONS)
@pytest.mark.parametrize(("degree", "layers"), [(1, 1), (3, 2)])
def test_feature_maps_of_every_activation_equal_jax(activation, degree, layers):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) * 0.3
    widths = [8] + [8 * degree] * layers
    kernels = tuple(draw(2, d_in, d_out) for d_in, d_out in itertools.pairwise(widths))
    biases = tuple(draw(2, d_out) for d_out in widths[1:])
    ours = PolynomialMap(kernels, biases, draw(2), degree, activation)
    module = TorchFeatureMap(2, 8, FeatureMapConfig(degree, layers, activation))
    tensors = {"log_scale": ours.log_scale}
    for j, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        tensors |= {f"{j}.kernel": kernel, f"{j}.bias": bias}
    module.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()})
    x_BxNxHxD = draw(3, 5, 2, 8)
    with torch.no_grad():
        features = module(torch.tensor(x_BxNxHxD).transpose(1, 2)).transpose(1, 2)
    assert features.min() >= 0
    assert relative_error(features, ours(jnp.asarray(x_BxNxHxD))) < 1e-6


@pytest.mark.parametrize("case", ["max", "staggered"])
def test_control_another_feature_map_or_field_changes_the_velocity(saved, case):
    _, folder = saved(case)
    arguments = inputs(GRIDS["27 tokens"])
    module = load(folder)
    expected = torch_velocity(module, *arguments)
    maps = {name: p for name, p in module.named_parameters() if ".phi_" in name}
    assert len(maps) == 4 * 2 * 5
    for name, parameter in maps.items():
        if name.startswith("blocks.2.") and name.endswith("log_scale"):
            continue  # the scale of a linear block cancels
        kept = parameter.data
        parameter.data = kept + 0.1
        assert relative_error(torch_velocity(module, *arguments), expected) > 1e-4, name
        parameter.data = kept

    hybrid = module.config.hybrid
    for field, values in {"lattice": ("strided", "staggered"), "stabilizer": ("max", "lse")}.items():
        (other,) = set(values) - {getattr(hybrid, field)}
        wrong = HybridWanTransformer3DModel(
            dataclasses.replace(module.config, hybrid=dataclasses.replace(hybrid, **{field: other}))
        )
        wrong.load_state_dict(module.state_dict())
        assert relative_error(torch_velocity(wrong, *arguments), expected) > 1e-2, field


@pytest.mark.parametrize("cross_attn_norm", [True, False])
def test_a_model_without_hybrid_blocks_equals_diffusers(cross_attn_norm, tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"attention_head_dim": 20, "num_layers": 2, "cross_attn_norm": cross_attn_norm, "eps": 1e-5}
    reference = diffusers.WanTransformer3DModel(**sizes).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    module = load(tmp_path)
    assert module.state_dict().keys() == reference.state_dict().keys()
    arguments = inputs((3, 2, 5))
    expected = torch_velocity(reference, *arguments)
    assert relative_error(torch_velocity(module, *arguments), expected) < 1e-5

    latents, timesteps, text = (torch.tensor(x) for x in arguments)
    call = {"hidden_states": latents.permute(0, 4, 1, 2, 3), "timestep": timesteps, "encoder_hidden_states": text}
    with torch.no_grad():
        ours, theirs = module(**call), reference(**call)
    assert type(ours) is type(theirs) and ours.sample.shape == theirs.sample.shape
    assert (module.dtype, module.device) == (reference.dtype, reference.device)


def test_bfloat16_keeps_feature_maps_in_float32(saved):
    _, folder = saved("max")
    arguments = inputs(GRIDS["27 tokens"])
    module = load(folder, dtype=torch.bfloat16)
    assert module.dtype == torch.bfloat16 == module.blocks[0].attn1.to_q.weight.dtype
    assert module.blocks[0].attn1.phi_k.log_scale.dtype == torch.float32 == module.blocks[0].scale_shift_table.dtype
    exact, rounded = torch_velocity(load(folder), *arguments), torch_velocity(module, *arguments)
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded.float(), exact) < 0.05
    all_bfloat16 = load(folder).to(torch.bfloat16)
    assert relative_error(torch_velocity(all_bfloat16, *arguments).float(), exact) < 0.1


def test_traces_to_a_static_graph(saved):
    _, folder = saved("cubic")
    latents, timesteps, text = (torch.tensor(x) for x in inputs(GRIDS["27 tokens"]))
    arguments = latents.permute(0, 4, 1, 2, 3), timesteps, text
    module = load(folder)
    graph = torch.export.export(module, arguments, {"return_dict": False}).module()
    with torch.no_grad():
        expected = module(*arguments, return_dict=False)[0]
        assert relative_error(graph(*arguments, return_dict=False)[0], expected) < 1e-6


def test_missing_wrong_and_unexpected_tensors_are_named(saved, tmp_path):
    _, folder = saved("cubic")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["blocks.2.attn1.phi_k.0.bias"]
    tensors["blocks.1.attn1.phi_q.log_scale"] = torch.zeros(2)  # which a softmax block does not have
    tensors["proj_out.bias"] = torch.zeros(5)
    save_file(tensors, file)
    with pytest.raises(InputError) as error:
        load(copy)
    message = str(error.value)
    assert "missing blocks.2.attn1.phi_k.0.bias (2, 48)" in message and "proj_out.bias should be (16,)" in message
    assert "unexpected blocks.1.attn1.phi_q.log_scale (2,)" in message and "\n" not in message

    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{file.name}: .*not a safetensors file"):
        load(copy)
    file.unlink()
    with pytest.raises(InputError, match="no .safetensors file"):
        load(copy)
    with pytest.raises(InputError, match="config.json: no such file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "hybrid.format_version: this jsurgery reads 1 and 2, found 99"),
        ({"rates": [2, 1]}, "hybrid.rates has 2 entries, num_layers is 3"),
        ({"rates": [2, 1, 3]}, "hybrid.rates: expected rates of 1, 2, 4, linear, found 3"),
        ({"lattice": "hexagonal"}, "lattice: expected one of strided, staggered, staggered_rows, found 'hexagonal'"),
        ({"temperature": 1.0}, "temperature"),
    ],
)
def test_a_bad_hybrid_config_is_refused(saved, change, message, tmp_path):
    _, folder = saved("cubic")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hybrid": config["hybrid"] | change}))
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_bad_arguments_of_a_call_are_refused(saved):
    module = load(saved("cubic")[1])
    latents, timesteps, text = torch.zeros(1, 3, 3, 6, 6), torch.zeros(1), torch.zeros(1, 5, 12)
    for arguments, message in [
        ((latents[..., :5], timesteps, text), "width is 5"),
        ((latents, timesteps[None], text), r"timestep: .* found shape \(1, 1\)"),
        ((latents, timesteps, text, text), "encoder_hidden_states_image"),
        ((latents, timesteps, text, None, False, {"scale": 0.5}), "attention_kwargs: .* scale"),
        ((torch.zeros(1, 3, 1025, 2, 2), timesteps, text), "1025 positions"),
    ]:
        with pytest.raises(InputError, match=message):
            module(*arguments)


@pytest.fixture(scope="module")
def bundled():
    """The bundled model as a pipeline of diffusers."""
    return diffusers.WanPipeline.from_pretrained(BUNDLED["tiny_wan"])


@pytest.fixture(scope="module")
def operated(random_transformer, tmp_path_factory):
    """The bundled model with hybrid blocks of all kinds, whose feature maps are random."""
    teacher = load_transformer(BUNDLED["tiny_wan"] / "transformer")
    rates = tuple(rate for _, rate in zip(range(teacher.config.num_layers), itertools.cycle(MIXED), strict=False))
    hybrid = random_transformer(dataclasses.replace(teacher.config, hybrid=HybridConfig(rates)))
    nnx.update(hybrid, nnx.state(teacher))
    folder = tmp_path_factory.mktemp("operated")
    save_model(hybrid, folder, base_pipeline="tiny_wan")
    return folder


def latents_of(bundled, transformer, noise, steps):
    """Latents [B, T, H, W, C] that diffusers' pipeline samples with the given transformer."""
    pipeline = diffusers.WanPipeline(**bundled.components | {"transformer": transformer})
    pipeline.set_progress_bar_config(disable=True)
    frames, height, width, _ = noise.shape[1:]
    latents = pipeline(
        PROMPT,
        negative_prompt="",
        num_frames=4 * frames - 3,
        height=8 * height,
        width=8 * width,
        num_inference_steps=steps,
        guidance_scale=3.0,
        latents=torch.tensor(np.asarray(noise)).permute(0, 4, 1, 2, 3),
        max_sequence_length=TEXT_LENGTH,
        output_type="latent",
        return_dict=False,
    )[0]
    return latents.permute(0, 2, 3, 4, 1)


@pytest.fixture(scope="module")
def noise(bundled):
    return initial_noise(0, [0], (2, 8, 6, bundled.transformer.config.in_channels))


@pytest.mark.parametrize("folder", ["published", "operated at rate 1"])
def test_in_the_pipeline_rate_1_equals_the_transformer_of_diffusers(bundled, noise, folder, tmp_path):
    path = BUNDLED["tiny_wan"] / "transformer"
    if folder != "published":
        teacher = load_transformer(path)
        path = tmp_path
        save_transformer(operate(teacher, HybridConfig((1,) * teacher.config.num_layers), None), path)
    module = load(path)
    assert type(module) is HybridWanTransformer3DModel is not type(bundled.transformer)
    expected = latents_of(bundled, bundled.transformer, noise, steps=4)
    assert relative_error(latents_of(bundled, module, noise, steps=4), expected) < 1e-4


def test_in_the_pipeline_a_hybrid_gives_the_latents_of_jsurgery(bundled, operated, noise):
    steps, config = 10, load_config("tiny", {"model.path": str(operated)})
    config.video.frames, config.video.height, config.video.width, config.text_length = 5, 64, 48, TEXT_LENGTH
    config.sampler.update(solver="unipc", steps=steps, guidance=3.0, shift=bundled.scheduler.config.flow_shift)
    ours = load_pipeline(str(operated)).sample([PROMPT], config, seed=0)[0]
    theirs = latents_of(bundled, load(operated), noise, steps)
    assert relative_error(theirs, ours) < 1e-3
    assert relative_error(latents_of(bundled, bundled.transformer, noise, steps), ours) > 0.05  # control: the teacher


def test_the_pipeline_makes_a_video(bundled, operated):
    pipeline = diffusers.WanPipeline(**bundled.components | {"transformer": load(operated)}).to("cpu")
    pipeline.set_progress_bar_config(disable=True)
    (video,) = pipeline(PROMPT, num_frames=5, height=64, width=48, num_inference_steps=2, output_type="np").frames
    assert video.shape == (5, 64, 48, 3) and np.isfinite(video).all()


def test_diffusers_without_our_class_refuses_a_hybrid(operated, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(BUNDLED["tiny_wan"], folder, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(operated, folder / "transformer")
    with pytest.raises(OSError, match="no file named"):
        diffusers.WanPipeline.from_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", HybridWanTransformer3DModel.__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises((AttributeError, ValueError), match="HybridWanTransformer3DModel"):
        diffusers.WanPipeline.from_pretrained(folder)
    for variant in (None, "hybrid", "hybrid_wan"):
        with pytest.raises(OSError, match="no file named"):
            diffusers.WanTransformer3DModel.from_pretrained(operated, variant=variant)
    with pytest.raises(OSError):
        diffusers.WanPipeline.from_pretrained(operated)
