"""Embeddings computed layer by layer equal those of the whole encoder, and no more than a few layers are in memory."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from jsurgery.data import sprites
from jsurgery.errors import InputError
from jsurgery.io.safetensors import read_tensors, write_tensors
from jsurgery.wan import prompt_embedder
from jsurgery.wan.checkpoint import load_text_encoder, save_text_encoder
from jsurgery.wan.model_config import TextEncoderConfig
from jsurgery.wan.prompt_embedder import BATCH, PromptEmbedder, batched_by_length
from jsurgery.wan.text_encoder import TextEncoder, encode_prompts
from jsurgery.wan.tokenizer import train_tokenizer
from tests.conftest import random_module

CONFIG = TextEncoderConfig(vocab_size=128, d_model=24, d_kv=8, d_ff=40, num_heads=3, num_layers=6)
SENTENCE = "a red circle moves left over a grey background"
PROMPTS = [SENTENCE, "", "x", " and ".join([SENTENCE] * 9), SENTENCE, *sprites.all_captions()[:11]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline folder with no other parts than a tokenizer and a random text encoder of six layers."""
    folder = tmp_path_factory.mktemp("base")
    train_tokenizer(sprites.all_captions(), folder / "tokenizer", vocab_size=CONFIG.vocab_size)
    encoder = random_module(lambda: TextEncoder(CONFIG, rngs=nnx.Rngs(0)), np.random.default_rng(0))
    save_text_encoder(encoder, folder / "text_encoder")
    return folder


def by_the_whole_encoder(base, prompts, length):
    tokens = PromptEmbedder(base).tokenizer(prompts, length)
    return np.asarray(jax.jit(encode_prompts)(load_text_encoder(base / "text_encoder"), *tokens))


@pytest.mark.parametrize("length", [7, 64, 100, 300])
def test_embeddings_are_those_of_the_whole_encoder(base, length):
    expected = by_the_whole_encoder(base, PROMPTS, length)
    found = PromptEmbedder(base)(PROMPTS, length)
    assert found.shape == (len(PROMPTS), length, CONFIG.d_model)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(found[0] - expected[2]).max() > 0.1, "control: another prompt"


def test_prompts_that_are_cut_are_counted_once_in_a_run(base, capsys):
    embedder = PromptEmbedder(base)
    length = 1 + int(embedder.tokenizer([SENTENCE], 99)[1].sum())
    embedder.unpadded([SENTENCE, "x"], length)
    assert not capsys.readouterr().err  # one token more than the sentence and its end
    long = " and ".join([SENTENCE] * 3)
    embedder.unpadded(["x", long, f"{SENTENCE} twice {SENTENCE}"], length)
    embedder.unpadded([f"again {long}"], length)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"text: 2 of 2 prompts are cut at config.text_length = {length} tokens: prompt 1 ends with ")
    assert "grey background" in line


def test_every_tensor_is_read_once_for_batches_of_several_lengths(base):
    embedder, reads = PromptEmbedder(base), collections.Counter()

    def counted(name, tensor):
        return dataclasses.replace(tensor, fetch=lambda: reads.update([name]) or tensor.fetch())

    embedder.tensors = {name: counted(name, tensor) for name, tensor in embedder.tensors.items()}
    embedder([SENTENCE, "a", f"{SENTENCE} " * 20], 300)
    assert reads == dict.fromkeys(embedder.tensors, 1)


def test_bfloat16_is_as_close_as_transformers(base):
    expected = by_the_whole_encoder(base, PROMPTS, 64)
    embedder = PromptEmbedder(base, jnp.bfloat16)
    found = embedder(PROMPTS, 64)
    assert found.dtype == jnp.bfloat16
    tokens = [torch.asarray(array) for array in embedder.tokenizer(PROMPTS, 64)]
    reference = transformers.UMT5EncoderModel.from_pretrained(base / "text_encoder", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        theirs = (reference(*tokens).last_hidden_state * tokens[1][:, :, None]).float().numpy()

    def distance(embeddings):
        return np.linalg.norm(embeddings.astype(np.float32) - expected) / np.linalg.norm(expected)

    assert 1e-3 < distance(found) < 1.2 * distance(theirs) < 0.1


def test_prompts_that_were_embedded_before_cost_nothing(base, monkeypatch):
    embedder = PromptEmbedder(base)
    first = embedder(PROMPTS, 64)
    monkeypatch.setattr(embedder, "_encode", lambda *_: pytest.fail("the layers are read again"))
    np.testing.assert_array_equal(embedder(PROMPTS[::-1], 64), first[::-1])
    with pytest.raises(pytest.fail.Exception):
        embedder(PROMPTS, 63)


def test_embeddings_are_kept_up_to_a_limit(base, monkeypatch):
    monkeypatch.setattr(prompt_embedder, "KEPT", 3)
    monkeypatch.setattr(prompt_embedder, "PASS", 4)
    embedder = PromptEmbedder(base)
    np.testing.assert_allclose(embedder(PROMPTS, 64), by_the_whole_encoder(base, PROMPTS, 64), atol=2e-5)
    assert len(embedder._kept) == 3


def test_few_layers_are_in_memory_at_once(base, monkeypatch):
    """As many bytes as two layers have and the activations: one layer runs while the next is read."""
    layer = sum(leaf.nbytes for name, leaf in read_tensors(base / "text_encoder").items() if ".block.0." in name)
    before = sum(array.nbytes for array in jax.live_arrays())
    peaks, run = [], prompt_embedder.run_layer

    def watched(*arguments):
        y = run(*arguments)
        peaks.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        return y

    monkeypatch.setattr(prompt_embedder, "run_layer", watched)
    PromptEmbedder(base)([SENTENCE], 64)
    activations = 3 * 64 * CONFIG.d_model * 4
    assert len(peaks) == CONFIG.num_layers and max(peaks) < 2 * layer + activations
    assert 2 * layer + activations < CONFIG.num_layers * layer, "control: the whole encoder would be noticed"


def test_batches_hold_every_prompt_once_in_few_shapes():
    lengths = np.random.default_rng(0).integers(0, 513, 1001).tolist()
    batches = list(batched_by_length(lengths, 512))
    assert sorted(number for numbers, _ in batches for number in numbers) == list(range(1001))
    assert all(lengths[number] <= size for numbers, size in batches for number in numbers)
    assert {size for _, size in batches} == {64, 128, 256, 512}
    assert {len(numbers) for numbers, _ in batches} <= {1, 2, 4, BATCH}
    padding = sum(len(numbers) * size for numbers, size in batches) / sum(lengths)
    assert padding < 1.6
    assert {size for _, size in batched_by_length([1, 70, 100], 100)} == {64, 100}


def test_a_tensor_that_is_missing_is_named_before_any_work(base, tmp_path):
    (tmp_path / "tokenizer").symlink_to(base / "tokenizer")
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text((base / "text_encoder" / "config.json").read_text())
    tensors = read_tensors(base / "text_encoder")
    del tensors["encoder.block.3.layer.0.SelfAttention.k.weight"]
    write_tensors(tmp_path / "text_encoder" / "model.safetensors", tensors)
    with pytest.raises(InputError, match=r"missing encoder\.block\.3\.layer\.0\.SelfAttention\.k\.weight"):
        PromptEmbedder(tmp_path)
