"""The control without attention between frames: its attention, and its table from known scores."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from jsurgery.ablate import framewise_control
from jsurgery.ablate.framewise_control import framewise, temporal_control
from jsurgery.ablate.write_table import markdown
from jsurgery.wan.model_config import WanConfig

SIZES = WanConfig(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=48,
    num_layers=2,
)  # fmt: skip
RNG = np.random.default_rng(0)
LATENTS, TEXT = (RNG.normal(size=shape).astype(np.float32) for shape in ((2, 3, 4, 6, 4), (2, 5, 16)))
TIMESTEPS = np.array([900.0, 250.0], np.float32)


@pytest.fixture(scope="module")
def teacher(random_transformer):
    return random_transformer(SIZES)


def masked_attention(q, k, v, _):
    """Softmax attention with the scores between frames masked. A frame has 2 x 3 tokens."""
    frame = jnp.arange(18) // 6
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(12)
    scores = jnp.where((frame[:, None] == frame[None])[None, None], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return jnp.einsum("bhnm,bmhd->bnhd", weights / weights.sum(axis=-1, keepdims=True), v), None


def test_framewise_attention_equals_masked_attention(teacher):
    expected = teacher.apply_blocks(LATENTS, TIMESTEPS, TEXT, masked_attention, None, order=None)[0]
    found = framewise(teacher)(LATENTS, TIMESTEPS, TEXT)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(teacher(LATENTS, TIMESTEPS, TEXT), expected, atol=1e-2)


def test_a_change_of_one_frame_does_not_affect_others(teacher):
    changed = LATENTS.copy()
    changed[:, 2] += 1
    model = framewise(teacher)
    first, second = (np.asarray(model(latents, TIMESTEPS, TEXT)) for latents in (LATENTS, changed))
    np.testing.assert_allclose(first[:, :2], second[:, :2], rtol=1e-5, atol=1e-5)
    assert not np.allclose(first[:, 2], second[:, 2], atol=1e-2)
    whole = [np.asarray(teacher(latents, TIMESTEPS, TEXT)) for latents in (LATENTS, changed)]
    assert not np.allclose(whole[0][:, :2], whole[1][:, :2], atol=1e-2)


def scores(seed, models):
    (control,) = models
    whole = {"direction": [1.0, 0.5, 1.0], "motion": [1.0, 1.0, 1.0], "total": [0.75, 0.5, 0.75]}
    apart = {"direction": [0.0, -0.25, 0.25], "motion": [0.5, 0.5, 0.5 * seed.number], "total": [0.25, 0.25, 0.25]}
    return {"teacher": whole, control.name: apart}


def test_the_table_compares_with_the_teacher(monkeypatch):
    monkeypatch.setattr(framewise_control, "samples", scores)
    config = types.SimpleNamespace(evaluate=types.SimpleNamespace(prompts=3))
    found = temporal_control([types.SimpleNamespace(number=number, config=config) for number in (0, 1)])
    assert list(found["rows"]) == ["teacher", "within each latent frame"]
    assert found["rows"]["within each latent frame"]["direction"] == (0, 0)
    (differences,) = found["contrasts"].values()
    assert list(differences) == ["direction", "motion", "total"]
    assert differences["direction"]["difference"] == pytest.approx(-2.5 / 3)
    assert differences["direction"]["high"] < 0 and differences["direction"]["items"] == 6
    text = markdown({"table": "temporal", "subject": "tiny model", **found})
    assert "2 seeds, 3 prompts each" in text and "| within each latent frame − teacher |" in text
