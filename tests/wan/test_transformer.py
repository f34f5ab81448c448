"""The transformer against diffusers' WanTransformer3DModel, with random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

from jsurgery.errors import InputError
from jsurgery.io.safetensors import read_tensors
from jsurgery.wan import checkpoint_layouts
from jsurgery.wan.checkpoint import load_transformer, save_transformer
from jsurgery.wan.given_tokens import GivenTokens
from jsurgery.wan.transformer import full_attention

SIZES = {
    "small": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 24,
        "freq_dim": 32, "ffn_dim": 48, "num_layers": 3, "cross_attn_norm": True,
    },
    "odd": {
        "num_attention_heads": 3, "attention_head_dim": 20, "in_channels": 5, "out_channels": 6, "text_dim": 17,
        "freq_dim": 64, "ffn_dim": 37, "num_layers": 2, "cross_attn_norm": False, "patch_size": (1, 2, 2), "eps": 1e-5,
    },
}  # fmt: skip


def random_reference(size: str) -> WanTransformer3DModel:
    torch.manual_seed(0)
    reference = WanTransformer3DModel(**SIZES[size]).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and "weight" in name else 0.2 * noise)
    return reference


def inputs(size: str, shape=(3, 6, 10)):
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(2, *shape, SIZES[size]["in_channels"])).astype(np.float32)
    text = rng.normal(size=(2, 7, SIZES[size]["text_dim"])).astype(np.float32)
    return latents, np.array([987.0, 13.5], np.float32), text


def reference_velocity(reference, latents, timesteps, text):
    with torch.no_grad():
        velocity = reference(
            torch.tensor(latents).permute(0, 4, 1, 2, 3), torch.tensor(timesteps), torch.tensor(text), return_dict=False
        )[0]
    return velocity.permute(0, 2, 3, 4, 1).numpy()


@functools.partial(jax.jit, static_argnums=(0, 5))
def run(graph, params, latents, timesteps, text, given_frames=0):
    return nnx.merge(graph, params)(latents, timesteps, text, given_frames)


def velocity(model, *arguments):
    return np.asarray(run(*nnx.split(model), *arguments))


@pytest.mark.parametrize("size", SIZES)
def test_velocity_equals_diffusers(size, tmp_path):
    reference = random_reference(size)
    reference.save_pretrained(tmp_path)
    latents, timesteps, text = inputs(size)
    expected = reference_velocity(reference, latents, timesteps, text)
    model = load_transformer(tmp_path)
    assert np.abs(velocity(model, latents, timesteps, text) - expected).max() < 1e-5 * np.abs(expected).max()

    save_transformer(model, tmp_path / "back")
    back = WanTransformer3DModel.from_pretrained(tmp_path / "back").eval()
    assert np.array_equal(reference_velocity(back, latents, timesteps, text), expected)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    reference = random_reference("small")
    reference.save_pretrained(folder)
    return reference, load_transformer(folder)


def test_velocity_with_a_given_first_frame_equals_diffusers(pair):
    """Diffusers takes a timestep for every token, as its pipelines of Wan2.2 TI2V 5B give them."""
    reference, model = pair
    latents, timesteps, text = inputs("small")
    per_token = np.repeat(timesteps[:, None], 3 * 3 * 5, axis=1)
    expected = {0: reference_velocity(reference, latents, per_token, text)}
    per_token[:, :15] = 0
    expected[1] = reference_velocity(reference, latents, per_token, text)
    for given_frames in (0, 1):
        found = velocity(model, latents, timesteps, text, given_frames)
        assert np.abs(found - expected[given_frames]).max() < 1e-5 * np.abs(expected[given_frames]).max()
        assert np.abs(found - expected[1 - given_frames]).max() > 1e-2 * np.abs(expected[given_frames]).max()


@pytest.mark.parametrize("given_tokens", [0, 5])
def test_a_block_equals_that_of_diffusers(pair, given_tokens):
    reference, model = pair
    tokens, dim = 11, model.config.dim
    rng = np.random.default_rng(2)
    x, text = (rng.normal(size=(2, count, dim)).astype(np.float32) for count in (tokens, 7))
    modulation, of_given = (rng.normal(size=(count, 6, dim)).astype(np.float32) for count in (2, 1))
    angles = rng.uniform(-3, 3, (tokens, model.config.attention_head_dim // 2))
    cos, sin = (function(angles).astype(np.float32) for function in (np.cos, np.sin))
    mask_1xNx1 = np.isin(np.arange(tokens), rng.permutation(tokens)[:given_tokens])[None, :, None]

    per_token = np.where(mask_1xNx1[..., None], of_given[:, None], modulation[:, None])
    pairs = [torch.tensor(np.repeat(t, 2, axis=-1))[None, :, None] for t in (cos, sin)]
    given = GivenTokens(jnp.asarray(mask_1xNx1), jnp.zeros((1, dim)), jnp.asarray(of_given)) if given_tokens else None

    @jax.jit
    def ours(state, given):
        block = nnx.merge(nnx.graphdef(model.blocks), jax.tree.map(lambda leaf: leaf[1], state))
        return block(x, text, modulation, (cos, sin), full_attention, given=given)

    for control in (False, True):
        wrong = modulation[:, None] if control and given_tokens else per_token + (0.01 if control else 0)
        with torch.no_grad():
            expected = reference.blocks[1](torch.tensor(x), torch.tensor(text), torch.tensor(wrong), pairs).numpy()
        error = np.abs(ours(nnx.state(model.blocks), given) - expected).max() / np.abs(expected).max()
        assert error > 1e-3 if control else error < 1e-6


def test_weights_for_inference_take_half_the_memory_and_give_the_same_bits(tmp_path):
    random_reference("small").save_pretrained(tmp_path)
    trained, small = (load_transformer(tmp_path, jnp.bfloat16, inference=inference) for inference in (False, True))
    arguments = inputs("small")
    expected = velocity(trained, *arguments)
    np.testing.assert_array_equal(velocity(small, *arguments), expected)
    full = velocity(load_transformer(tmp_path), *arguments)
    assert np.abs(expected - full).max() > 1e-4, "control: matmuls are in bfloat16"
    types = {str(path): param.get_value().dtype for path, param in nnx.to_flat_state(nnx.state(small))}
    in_float32 = [path for path, dtype in types.items() if dtype == jnp.float32]
    assert {dtype.name for dtype in types.values()} == {"bfloat16", "float32"}
    kept = ("norm", "time_in", "time_out", "time_proj", "scale_shift_table")
    assert all(any(name in path for name in kept) for path in in_float32) and len(in_float32) == 14
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(trained))} == {"float32"}


def test_control_every_tensor_affects_the_velocity(tmp_path):
    reference = random_reference("small")
    reference.save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path)
    model = load_transformer(tmp_path)
    arguments = inputs("small")
    expected = velocity(model, *arguments)
    for name in tensors:
        # Even a bias of keys has an effect, as norm and RoPE come after it.
        changed = tensors | {name: tensors[name] + 0.5 * np.sign(tensors[name])}
        checkpoint_layouts.load_transformer_tensors(model, changed)
        assert np.abs(velocity(model, *arguments) - expected).max() > 1e-4, name


def test_tensors_that_do_not_fit_are_named(tmp_path):
    reference = random_reference("small")
    reference.save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path)
    model = load_transformer(tmp_path)
    del tensors["blocks.1.attn1.to_q.weight"]
    tensors["extra"] = np.zeros(3)
    tensors["proj_out.bias"] = np.zeros(5)
    with pytest.raises(InputError) as error:
        checkpoint_layouts.load_transformer_tensors(model, tensors)
    message = str(error.value)
    assert "missing blocks.1.attn1.to_q.weight" in message and "unexpected extra (3,)" in message
    assert "proj_out.bias should be (16,), is (5,)" in message and "\n" not in message


def test_sizes_that_the_patch_size_does_not_divide_are_refused(tmp_path):
    random_reference("small").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="height is 5"):
        load_transformer(tmp_path)(jnp.zeros((1, 3, 5, 10, 4)), jnp.zeros(1), jnp.zeros((1, 7, 24)))
