"""The VAE against diffusers' AutoencoderKLWan; saving and loading, and damaged files."""

import json
import os
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import nnx

from jsurgery.data import sprites
from jsurgery.errors import InputError
from jsurgery.io.safetensors import read_tensors, write_tensors
from jsurgery.wan import vae as vae_module
from jsurgery.wan.checkpoint import load_vae, save_vae
from jsurgery.wan.model_config import VaeConfig
from jsurgery.wan.model_folder import BUNDLED
from jsurgery.wan.torch_layout import load_mirrored, mirrored_tensors
from jsurgery.wan.vae import WanVae
from jsurgery.wan.vae_layers import RMSNorm
from jsurgery.wan.vae_tiles import Tiling

CONFIGS = {
    "wan": VaeConfig(base_dim=8, z_dim=4, latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(1.5, 0.5, 2.0, 1.0)),
    "other": VaeConfig(
        base_dim=6,
        decoder_base_dim=10,
        z_dim=3,
        dim_mult=(2, 1, 2, 3),
        num_res_blocks=1,
        temperal_downsample=(True, False, True),
        latents_mean=(0.1, -0.2, 0.3),
        latents_std=(1.5, 0.5, 2.0),
    ),
    "wan2.2": VaeConfig(
        base_dim=6,
        decoder_base_dim=4,
        z_dim=4,
        latents_mean=(0.1, -0.2, 0.3, 0.0),
        latents_std=(1.5, 0.5, 2.0, 1.0),
        is_residual=True,
        patch_size=2,
    ),
    "other 2.2": VaeConfig(
        base_dim=4,
        z_dim=3,
        dim_mult=(2, 1, 4, 2),
        num_res_blocks=1,
        temperal_downsample=(True, False, True),
        latents_mean=(0.1, -0.2, 0.3),
        latents_std=(1.5, 0.5, 2.0),
        is_residual=True,
        patch_size=2,
    ),
}


def random_reference(config: VaeConfig, seed: int = 0) -> AutoencoderKLWan:
    """The VAE of diffusers with random parameters, including gains and biases."""
    reference = AutoencoderKLWan.from_config(config.to_json()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if config.is_residual and name.startswith("decoder.conv_out"):
                noise *= 3  # so that some pixels are clipped
            fan_in = parameter[0].numel()
            parameter.copy_(
                1 + 0.3 * noise if "gamma" in name else 0.2 * noise if "bias" in name else noise * fan_in**-0.5
            )
    return reference


def ours(reference: AutoencoderKLWan, config: VaeConfig) -> WanVae:
    vae = nnx.eval_shape(lambda: WanVae(config, rngs=nnx.Rngs(0)))
    load_mirrored(vae, {name: tensor.numpy() for name, tensor in reference.state_dict().items()})
    return vae


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[AutoencoderKLWan, WanVae]]:
    references = {name: random_reference(config) for name, config in CONFIGS.items()}
    return {name: (reference, ours(reference, CONFIGS[name])) for name, reference in references.items()}


def random_video(frames: int, height: int, width: int, batch: int = 1) -> np.ndarray:
    shape = (batch, frames, height, width, 3)
    return np.random.default_rng(frames).uniform(-1, 1, shape).astype(np.float32)


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def channels_last(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


def relative_error(found, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


QUICK_COMPILATION = {"xla_backend_optimization_level": 0}


def quickly_compiled(function, **options):
    return jax.jit(function, compiler_options=QUICK_COMPILATION, **options)


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled_chunks():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("encode_chunk", "decode_chunk"):
            function = getattr(vae_module, name).__wrapped__
            patch.setattr(vae_module, name, quickly_compiled(function, static_argnames="graph", donate_argnames="kept"))
        yield


def reference_latents(reference: AutoencoderKLWan, video: np.ndarray) -> np.ndarray:
    config = reference.config
    with torch.no_grad():
        mean = channels_last(reference.encode(channels_first(video)).latent_dist.mode())
    return ((mean - np.array(config.latents_mean)) / np.array(config.latents_std)).astype(np.float32)


def reference_video(reference: AutoencoderKLWan, latents: np.ndarray) -> np.ndarray:
    z = latents * np.array(reference.config.latents_std) + np.array(reference.config.latents_mean)
    with torch.no_grad():
        return channels_last(reference.decode(channels_first(z.astype(np.float32))).sample)


def with_one_tensor_perturbed(vae: WanVae, part: str) -> WanVae:
    """A copy in which one kernel of the encoder or the decoder has relative errors of 1 percent."""
    copy = nnx.clone(vae)
    kernel = getattr(copy, part).mid_block.resnets[0].conv2.kernel
    noise = np.random.default_rng(0).standard_normal(kernel.shape)
    kernel[...] = kernel[...] * (1 + 1e-2 * noise.astype(np.float32))
    return copy


@pytest.mark.parametrize(
    "name, frames, height, width, batch",
    [
        ("wan", 1, 24, 40, 1),
        ("wan", 17, 24, 40, 1),
        ("other", 5, 24, 8, 2),
        ("wan2.2", 1, 48, 80, 1),
        ("wan2.2", 13, 48, 80, 1),
        ("other 2.2", 9, 48, 16, 2),
    ],
)
def test_encode_and_decode_match_diffusers(pairs, name, frames, height, width, batch):
    reference, vae = pairs[name]
    config = vae.config
    video = random_video(frames, height, width, batch)
    with torch.no_grad():
        posterior = reference.encode(channels_first(video)).latent_dist
        mean = channels_last(posterior.mode())
        logvar = channels_last(posterior.parameters.chunk(2, dim=1)[1])
        expected_video = channels_last(reference.decode(posterior.mode()).sample)
    expected_latents = (mean - np.array(config.latents_mean)) / np.array(config.latents_std)
    stride = config.strides[1]
    assert mean.shape == (batch, (frames + 3) // 4, height // stride, width // stride, config.z_dim)

    graph, state = nnx.split(vae)

    @quickly_compiled
    def run(state, video, latents):
        vae = nnx.merge(graph, state)
        mean, logvar = vae.moments(video)
        return vae.encode(video), mean, logvar, vae.decode(latents), vae.pixels(mean)

    found_latents, found_mean, found_logvar, found_video, found_pixels = run(
        state, video, expected_latents.astype(np.float32)
    )
    bound = 2e-5 if config.is_residual else 1e-5
    assert relative_error(found_latents, expected_latents) < bound
    assert relative_error(found_mean, mean) < bound
    assert relative_error(found_logvar, logvar) < bound
    assert relative_error(found_video, expected_video) < bound
    assert relative_error(np.clip(found_pixels, -1, 1), expected_video) < bound
    assert float(np.abs(found_pixels).max()) > 1, "pixels are clipped"
    assert np.mean(np.abs(expected_video) == 1) < 0.9, "nearly all pixels are clipped"

    chunked_latents = vae.encode_in_chunks(video)
    chunked_video = vae.decode_in_chunks(expected_latents)
    assert relative_error(chunked_latents, expected_latents) < bound
    assert relative_error(chunked_video, expected_video) < bound
    assert relative_error(chunked_latents, np.asarray(found_latents)) < bound
    assert relative_error(chunked_video, np.asarray(found_video)) < bound

    encoder_off, decoder_off = (with_one_tensor_perturbed(vae, part) for part in ("encoder", "decoder"))
    assert relative_error(encoder_off.encode_in_chunks(video), expected_latents) > 1e-4
    assert relative_error(decoder_off.decode_in_chunks(expected_latents), expected_video) > 1e-4
    latents_off, *_ = run(nnx.state(encoder_off), video, expected_latents.astype(np.float32))
    *_, video_off, _ = run(nnx.state(decoder_off), video, expected_latents.astype(np.float32))
    assert relative_error(latents_off, expected_latents) > 1e-4
    assert relative_error(video_off, expected_video) > 1e-4


def test_device_memory_does_not_grow_with_the_number_of_frames(pairs, monkeypatch):
    _, vae = pairs["wan"]

    def most_bytes(name, function, x):
        run_chunk, sizes = getattr(vae_module, name), []

        def run_and_measure(*args):
            result = run_chunk(*args)
            sizes.append(sum(array.nbytes for array in jax.live_arrays()))
            return result

        monkeypatch.setattr(vae_module, name, run_and_measure)
        function(x)
        monkeypatch.setattr(vae_module, name, run_chunk)
        return max(sizes)

    for name, function, clips in (
        ("encode_chunk", vae.encode_in_chunks, [random_video(frames, 24, 40) for frames in (9, 33)]),
        ("decode_chunk", vae.decode_in_chunks, [np.ones((1, frames, 3, 5, 4), np.float32) for frames in (3, 9)]),
    ):
        short, long = (most_bytes(name, function, clip) for clip in clips)
        assert short == long, name


def test_memory_for_decoding_at_full_size():
    """480x832 at full width takes less than 7.5 GB, for any number of frames."""
    graph, state = nnx.split(nnx.eval_shape(lambda: WanVae(VaeConfig(), rngs=nnx.Rngs(0))))
    latents = jax.ShapeDtypeStruct((1, 1, 60, 104, 16), jnp.float32)
    _, kept = vae_module.decode_chunk.eval_shape(graph, state, latents)
    memory = vae_module.decode_chunk.lower(graph, state, latents, kept).compile().memory_analysis()
    arguments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.decoder, kept)))
    assert memory.argument_size_in_bytes > 0.99 * arguments
    assert memory.alias_size_in_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    assert total < 7.5e9


@pytest.mark.parametrize(
    "frames, height, width, tiling",
    [
        (1, 24, 24, Tiling(16, 16, 8, 8)),
        (5, 40, 16, Tiling(24, 16, 16, 16)),
        (1, 16, 16, Tiling(16, 16, 8, 8)),
    ],
)
def test_tiled_results_match_diffusers(pairs, monkeypatch, frames, height, width, tiling):
    reference, vae = pairs["other"]
    monkeypatch.setattr(reference, "use_tiling", False)
    reference.enable_tiling(tiling.height, tiling.width, tiling.stride_height, tiling.stride_width)
    video = random_video(frames, height, width)
    expected_latents = reference_latents(reference, video)
    expected_video = reference_video(reference, expected_latents)
    latents = vae.encode_in_chunks(video, tiling)
    decoded = vae.decode_in_chunks(expected_latents, tiling)
    assert relative_error(latents, expected_latents) < 1e-5
    assert relative_error(decoded, expected_video) < 1e-5
    if frames == 1:
        one_tile = height <= tiling.height and width <= tiling.width
        assert np.array_equal(latents, vae.encode_in_chunks(video)) == one_tile
        assert np.array_equal(decoded, vae.decode_in_chunks(expected_latents)) == one_tile


def test_tiling_changes_results_of_a_trained_vae_only_slightly():
    """Latents, whose standard deviation is 0.7, change by 0.02 and videos by 0.003 on average."""
    vae = load_vae(BUNDLED["tiny_wan"] / "vae")
    clip = sprites.render(sprites.scene_at(1, 0, two_sprites=0.5), 1, 96, 128)
    video = sprites.to_float(clip)[None]
    tiling = Tiling(96, 96, 96, 64)
    latents = vae.encode_in_chunks(video)
    assert 0 < np.abs(vae.encode_in_chunks(video, tiling) - latents).mean() < 0.05
    assert 0 < np.abs(vae.decode_in_chunks(latents, tiling) - vae.decode_in_chunks(latents)).mean() < 0.01


def test_bfloat16_changes_results_of_a_trained_vae_only_slightly():
    """Latents, whose standard deviation is 0.7, change by 0.005 and videos by 0.002 on average."""
    clip = sprites.render(sprites.scene_at(1, 0, two_sprites=0.5), 1, 96, 80)
    video = sprites.to_float(clip)[None]
    full, half = (load_vae(BUNDLED["tiny_wan"] / "vae", dtype) for dtype in (jnp.float32, jnp.bfloat16))
    latents, found = full.encode_in_chunks(video), half.encode_in_chunks(video)
    assert found.dtype == np.float32 and 0 < np.abs(found - latents).mean() < 0.01
    assert 0 < np.abs(half.decode_in_chunks(latents) - full.decode_in_chunks(latents)).mean() < 0.004


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"height": 20}, "tiling.height: expected a positive multiple of 8, found 20"),
        ({"stride_width": 0}, "tiling.stride_width: expected a positive multiple of 8, found 0"),
        ({"width": 128}, "tiling.stride_width: expected at most the tile's width, 128, found 192"),
    ],
)
def test_bad_tile_sizes_are_refused(sizes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Tiling(**sizes)


def test_gradient_matches_diffusers(pairs):
    reference, vae = pairs["other"]
    video = random_video(9, 16, 8)
    video_torch = channels_first(video).requires_grad_()
    reference.decode(reference.encode(video_torch).latent_dist.mode()).sample.square().mean().backward()
    assert video_torch.grad is not None
    graph, state = nnx.split(vae)

    @quickly_compiled
    @jax.grad
    def gradient(video, state):
        vae = nnx.merge(graph, state)
        return jnp.mean(jnp.square(vae.decode(vae.encode(video))))

    assert relative_error(gradient(video, state), channels_last(video_torch.grad)) < 1e-4


def test_gradient_of_black_is_finite():
    norm = RMSNorm(4, 3)
    assert jnp.all(jnp.isfinite(jax.grad(lambda x: jnp.sum(norm(x)))(jnp.zeros((1, 1, 1, 1, 4)))))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 6, 16, 16, 3), "frames: expected 4k + 1, found 6; the nearest that works is 5"),
        ((1, 4, 16, 16, 3), "the nearest that works is 5"),
        ((1, 0, 16, 16, 3), "the nearest that works is 1"),
        ((1, 5, 30, 16, 3), "height: expected a multiple of 8, found 30; the nearest that works is 32"),
        ((1, 5, 16, 3, 3), "width: expected a multiple of 8, found 3; the nearest that works is 8"),
        ((1, 3, 5, 16, 16), "expected [batch, frames, height, width, 3]"),
    ],
)
def test_bad_video_sizes_are_refused(pairs, shape, message):
    with pytest.raises(InputError, match=re.escape(message)):
        pairs["wan"][1].encode(jnp.zeros(shape))


@pytest.mark.parametrize("name", CONFIGS)
def test_loading_a_folder_of_diffusers(pairs, name, tmp_path):
    reference, _ = pairs[name]
    reference.save_pretrained(tmp_path)
    vae = load_vae(tmp_path)
    assert vae.config == CONFIGS[name]
    expected = reference.state_dict()
    found = mirrored_tensors(vae)
    assert found.keys() == expected.keys()
    for tensor, value in found.items():
        np.testing.assert_array_equal(value, expected[tensor].numpy(), err_msg=tensor)
    assert load_vae(tmp_path, dtype=jnp.bfloat16).encoder.conv_in.kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_loads_a_saved_folder(pairs, name, tmp_path):
    reference, vae = pairs[name]
    save_vae(vae, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors", "hashes.json"]
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderKLWan"
    loaded, report = AutoencoderKLWan.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    for tensor, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[tensor], value), tensor
    for field, value in CONFIGS[name].to_json().items():
        assert field.startswith("_") or loaded.config[field] == value, field


def test_default_config_is_that_of_diffusers():
    fields = VaeConfig().to_json()
    with torch.device("meta"):
        reference = AutoencoderKLWan()
    assert {name: reference.config[name] for name in fields if not name.startswith("_")} == {
        name: value for name, value in fields.items() if not name.startswith("_")
    }
    params = nnx.state(nnx.eval_shape(lambda: WanVae(VaeConfig(), rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(
        parameter.numel() for parameter in reference.parameters()
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"z_dim": 8}, "z_dim = 8"),
        ({"patch_size": 2, "in_channels": 3}, "in_channels: expected 12"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial: expected 8"),
        ({"patch_size": 3}, "patch_size: expected null"),
        ({"is_residual": True, "dim_mult": [1, 2, 4, 3]}, "dim_mult.*no shortcut leads over level 3 of the encoder"),
        ({"is_residual": True, "dim_mult": [1, 3, 2, 2]}, "no shortcut leads over level 1 of the encoder"),
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"dim_mult": [1, 2, 4]}, "dim_mult"),
        ({"temporal_downsample": [False, True, True]}, "temporal_downsample"),
    ],
)
def test_config_of_another_architecture_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        VaeConfig.from_json(fields)


def test_bfloat16_tensors_are_read_back_unchanged(tmp_path):
    tensors = {"a": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3).T, "b": np.float32(2.5).reshape(())}
    write_tensors(tmp_path / "w.safetensors", tensors)
    found = read_tensors(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys() and found["a"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["a"], tensors["a"])
    np.testing.assert_array_equal(found["b"], tensors["b"], strict=True)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: b"", "empty"),
        (lambda data: data[:-7], "truncated"),
        (lambda data: data[:5], "truncated"),
        (lambda data: data + b"more", "damaged"),
        (lambda data: b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "HTML"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n", "git-LFS"),
    ],
)
def test_damaged_weights_are_refused(tmp_path, damage, message):
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    write_tensors(file, {"a": np.ones((3, 4), np.float32)})
    file.write_bytes(damage(file.read_bytes()))
    for path in (file, tmp_path):
        with pytest.raises(InputError, match=f"{file.name}.*{message}") as refusal:
            read_tensors(path)
        assert "\n" not in str(refusal.value)


def test_reading_shards_and_refusing_incomplete_ones(tmp_path):
    tensors = {name: np.full(2, i, np.float32) for i, name in enumerate("abc")}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}}))
    write_tensors(tmp_path / "1.safetensors", {"a": tensors["a"]})
    with pytest.raises(InputError, match=r"index\.json.*2\.safetensors"):
        read_tensors(tmp_path)
    write_tensors(tmp_path / "2.safetensors", {"b": tensors["b"]})
    with pytest.raises(InputError, match="no shard holds, such as c"):
        read_tensors(tmp_path)
    write_tensors(tmp_path / "2.safetensors", {"b": tensors["b"], "c": tensors["c"]})
    np.testing.assert_equal(read_tensors(tmp_path), tensors)
    index.write_text("{")
    with pytest.raises(InputError, match=r"index\.json"):
        read_tensors(tmp_path)


def test_folders_without_usable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        read_tensors(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        read_tensors(tmp_path)
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(InputError, match=r"config\.json: expected the config"):
        load_vae(tmp_path)
    for variant in ("w.safetensors", "w.fp16.safetensors"):
        write_tensors(tmp_path / variant, {"a": np.ones(1, np.float32)})
    with pytest.raises(InputError, match="holds a, which another file"):
        read_tensors(tmp_path)


def test_tensors_that_do_not_fit_are_listed_and_change_nothing(pairs):
    reference, vae = pairs["other"]
    tensors = {name: 0 * tensor.numpy() for name, tensor in reference.state_dict().items()}
    del tensors["quant_conv.bias"]
    tensors["decoder.extra"] = np.zeros((2, 3))
    tensors["encoder.conv_in.weight"] = np.zeros((6, 3, 1, 3, 3), np.float32)
    with pytest.raises(InputError) as refusal:
        load_mirrored(vae, tensors, source="vae/")
    for part in (
        "vae/: 3 tensors",
        "missing quant_conv.bias (6,)",
        "unexpected decoder.extra (2, 3)",
        "encoder.conv_in.weight should be (6, 3, 3, 3, 3), is (6, 3, 1, 3, 3)",
    ):
        assert part in str(refusal.value)
    np.testing.assert_array_equal(
        mirrored_tensors(vae)["quant_conv.weight"], reference.state_dict()["quant_conv.weight"]
    )
