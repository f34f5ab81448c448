"""RoPE and a single block against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from flax import nnx

from jsurgery.attention.rope import apply_rope, rope_tables
from jsurgery.errors import InputError
from jsurgery.wan.checkpoint import load_transformer
from pallas_kernels.api import hybrid_attention


@pytest.mark.parametrize(("head_dim", "grid"), [(128, (21, 30, 52)), (32, (5, 12, 10)), (20, (3, 7, 1))])
def test_angles_equal_diffusers_bit_for_bit(head_dim, grid):
    reference = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
    time, height, width = grid
    cos_NxD, sin_NxD = (
        table[0, :, 0].numpy() for table in reference(torch.zeros(1, 1, time, 2 * height, 2 * width))
    )  # diffusers has each angle twice
    cos_NxE, sin_NxE = rope_tables(grid, head_dim)
    np.testing.assert_array_equal(cos_NxE, cos_NxD[:, ::2])
    np.testing.assert_array_equal(sin_NxE, sin_NxD[:, ::2])
    transposed_NxE = rope_tables((time, width, height), head_dim)[1]
    assert not np.array_equal(transposed_NxE, sin_NxE)  # a control: swapped axes differ


def test_rope_equals_multiplication_of_complex_numbers():
    cos_NxE, sin_NxE = rope_tables((2, 3, 5), 16)
    x = np.random.default_rng(0).normal(size=(2, 30, 3, 16)).astype(np.float32)
    rotated = (x[..., ::2] + 1j * x[..., 1::2]) * (cos_NxE + 1j * sin_NxE)[None, :, None]
    y = apply_rope(jnp.asarray(x), jnp.asarray(cos_NxE), jnp.asarray(sin_NxE))
    np.testing.assert_allclose(y[..., ::2], rotated.real, atol=1e-6)
    np.testing.assert_allclose(y[..., 1::2], rotated.imag, atol=1e-6)


def test_a_grid_beyond_the_table_is_refused():
    with pytest.raises(InputError, match="the width axis has 1025 positions"):
        rope_tables((1, 1, 1025), 16)


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=20, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=72, num_layers=2, cross_attn_norm=True,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and "weight" in name else 0.1 * noise)
    return model


@pytest.mark.parametrize("index", [0, 1])
def test_one_block_equals_diffusers(reference, index, tmp_path):
    rng, grid = np.random.default_rng(index), (3, 5, 4)
    x = rng.normal(size=(2, 60, 60)).astype(np.float32)
    text = rng.normal(size=(2, 7, 60)).astype(np.float32)
    modulation = rng.normal(size=(2, 6, 60)).astype(np.float32)
    with torch.no_grad():
        angles = reference.rope(torch.zeros(1, 4, 3, 10, 8))
        arguments = (torch.tensor(array) for array in (x, text, modulation))
        expected = reference.blocks[index](*arguments, angles).numpy()

    reference.save_pretrained(tmp_path)
    graph, stacked = nnx.split(load_transformer(tmp_path).blocks)
    rope = tuple(map(jnp.asarray, rope_tables(grid, 20)))
    full = lambda q, k, v: hybrid_attention(q, k, v, None, None, num_softmax=60)

    @jax.jit
    def block(state):
        return nnx.merge(graph, state)(jnp.asarray(x), jnp.asarray(text), jnp.asarray(modulation), rope, full)

    relative = lambda y: float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
    state = jax.tree.map(lambda leaf: leaf[index], stacked)
    assert relative(block(state)) < 1e-6
    for path, leaf in nnx.to_flat_state(state):
        changed = jax.tree.map(lambda other, leaf=leaf: other * 1.1 if other is leaf[...] else other, state)
        assert relative(block(changed)) > 1e-5, path
