"""The mobile forms of the text encoder and of the VAE decoder, compared with our JAX models."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from jsurgery.errors import InputError
from jsurgery.export.mobile_text_encoder import load_text_encoder
from jsurgery.export.mobile_vae import load_vae_decoder
from jsurgery.wan import checkpoint, text_encoder
from jsurgery.wan.tokenizer import Tokenizer


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def ranks(module, *arguments):
    graph = torch.export.export(module, arguments).graph
    return {node.meta["val"].ndim for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}


def test_text_encoder_equals_jax(tiny_pipeline):
    token_ids, mask = Tokenizer(tiny_pipeline / "tokenizer")(["a red circle moves left"], 11)
    encoder = checkpoint.load_text_encoder(tiny_pipeline / "text_encoder")
    expected = text_encoder.encode_prompts(encoder, token_ids, mask)
    module = load_text_encoder(tiny_pipeline / "text_encoder", 11)
    arguments = torch.tensor(token_ids), torch.tensor(mask, dtype=torch.float32)
    with torch.no_grad():
        embeddings = module(*arguments)
    assert embeddings.shape == expected.shape and relative_error(embeddings, expected) < 1e-5
    assert mask.sum() < 11 and not embeddings[0, mask.sum() :].any()
    assert max(ranks(module, *arguments)) <= 4


@pytest.mark.parametrize("frames", [1, 3])
def test_vae_decoder_equals_jax(tiny_pipeline, frames):
    latents = np.random.default_rng(0).normal(size=(frames, 3, 2, 4)).astype(np.float32)
    graph, state = nnx.split(checkpoint.load_vae(tiny_pipeline / "vae"))
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(lambda state, latents: nnx.merge(graph, state).decode(latents))(state, latents[None])[0]
    module = load_vae_decoder(tiny_pipeline / "vae")
    with torch.no_grad():
        video = module(torch.tensor(latents))
    assert video.shape == (4 * frames - 3, 24, 16, 3) == expected.shape
    assert np.abs(np.asarray(expected)).max() <= 1 and relative_error(video, expected) < 1e-5
    assert max(ranks(module, torch.tensor(latents))) <= 4


def test_a_missing_tensor_is_named(tiny_pipeline, tmp_path):
    from safetensors.numpy import load_file, save_file

    (file,) = (tiny_pipeline / "vae").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["decoder.up_blocks.1.resnets.0.conv1.bias"]
    save_file(tensors, tmp_path / file.name)
    (tmp_path / "config.json").write_text((tiny_pipeline / "vae" / "config.json").read_text())
    with pytest.raises(InputError, match=r"missing decoder.up_blocks.1.resnets.0.conv1.bias"):
        load_vae_decoder(tmp_path)
