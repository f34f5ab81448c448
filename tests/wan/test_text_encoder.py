import dataclasses
import json
import math

import diffusers
import flax.nnx as nnx
import jax
import numpy as np
import pytest
import torch
import transformers

from jsurgery.errors import InputError
from jsurgery.wan.checkpoint import load_text_encoder, save_text_encoder
from jsurgery.wan.model_config import TextEncoderConfig
from jsurgery.wan.text_encoder import TextEncoder, encode_prompts, position_buckets
from jsurgery.wan.tokenizer import train_tokenizer
from jsurgery.wan.torch_layout import load_mirrored, mirrored_tensors

CONFIGS = [
    TextEncoderConfig(vocab_size=61, d_model=24, d_kv=8, d_ff=40, num_heads=3, num_layers=2),
    TextEncoderConfig(
        vocab_size=97,
        d_model=32,
        d_kv=5,
        d_ff=28,
        num_heads=4,
        num_layers=2,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=20,
        layer_norm_epsilon=1e-3,
    ),
]

embed = nnx.jit(lambda encoder, token_ids, mask: encoder(token_ids, mask))


def random_reference(config: TextEncoderConfig, seed: int = 0) -> transformers.UMT5EncoderModel:
    """The encoder of transformers with random tensors, large enough to affect the result."""
    torch.manual_seed(seed)
    reference = transformers.UMT5EncoderModel(
        transformers.UMT5Config(**dataclasses.asdict(config), feed_forward_proj="gated-gelu")
    ).eval()
    with torch.no_grad():
        for name, tensor in reference.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in name or "shared" in name:
                tensor.normal_()
            else:
                tensor.normal_(std=tensor.shape[1] ** -0.5)
    return reference


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return nnx.jit(lambda: TextEncoder(CONFIGS[0], rngs=nnx.Rngs(0)))()


def batch(config: TextEncoderConfig, lengths: list[int], padded_to: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = (np.arange(padded_to) < np.array(lengths)[:, None]).astype(np.int32)
    return rng.integers(2, config.vocab_size, mask.shape, dtype=np.int32) * mask, mask


def reference_embeddings(reference: transformers.UMT5EncoderModel, token_ids, mask) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor(token_ids), torch.tensor(mask)).last_hidden_state.numpy()


def relative_error(actual, expected) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("lengths", "padded_to"), [([1, 6, 13], 13), ([150, 37], 151)])
def test_embeddings_equal_transformers(tmp_path, config, lengths, padded_to):
    reference = random_reference(config)
    reference.save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path)
    assert encoder.config == config
    token_ids, mask = batch(config, lengths, padded_to)
    expected = reference_embeddings(reference, token_ids, mask)
    assert relative_error(embed(encoder, token_ids, mask), expected) < 1e-5
    # A control: without the mask the result differs.
    assert relative_error(embed(encoder, token_ids, np.ones_like(mask)), expected) > 1e-2


def test_control_every_tensor_affects_the_embeddings(tmp_path):
    reference = random_reference(CONFIGS[0])
    reference.save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path)
    token_ids, mask = batch(CONFIGS[0], [9, 40], 41)
    expected = reference_embeddings(reference, token_ids, mask)
    tensors = mirrored_tensors(encoder)
    for name, tensor in tensors.items():
        load_mirrored(encoder, tensors | {name: tensor * 1.05})
        assert relative_error(embed(encoder, token_ids, mask), expected) > 1e-4, name


def test_encode_prompts_ignores_padding_and_sets_it_to_zero(encoder):
    token_ids, mask = batch(CONFIGS[0], [3, 7], 9)
    embeddings = nnx.jit(encode_prompts)(encoder, token_ids, mask)
    assert not embeddings[0, 3:].any() and not embeddings[1, 7:].any()
    np.testing.assert_array_equal(embeddings[1, :7], embed(encoder, token_ids, mask)[1, :7])
    other_ids = np.where(mask, token_ids, 5)
    np.testing.assert_array_equal(nnx.jit(encode_prompts)(encoder, other_ids, mask), embeddings)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (12, 20), (8, 64), (64, 300)])
def test_position_buckets_equal_transformers(num_buckets, max_distance):
    attention = transformers.models.umt5.modeling_umt5.UMT5Attention(
        transformers.UMT5Config(
            relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance
        )
    )
    offset = torch.arange(700)[None, :] - torch.arange(700)[:, None]
    expected = attention._relative_position_bucket(offset).numpy()
    buckets = position_buckets(700, num_buckets, max_distance)
    np.testing.assert_array_equal(buckets, expected)
    assert buckets[0, max_distance:].min() == num_buckets - 1
    assert buckets[max_distance:, 0].min() == num_buckets // 2 - 1


def test_saved_folder_loads_in_transformers_and_here(encoder, tmp_path):
    save_text_encoder(encoder, tmp_path)
    token_ids, mask = batch(CONFIGS[0], [4, 11], 11)
    embeddings = embed(encoder, token_ids, mask)

    reference, loading = transformers.UMT5EncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert relative_error(embeddings, reference_embeddings(reference.eval(), token_ids, mask)) < 1e-5
    np.testing.assert_array_equal(embed(load_text_encoder(tmp_path), token_ids, mask), embeddings)


def test_prompt_to_embeddings_equals_diffusers(encoder, tmp_path):
    prompts = ["a red circle moves left", "a  blue &amp; red square", ""]
    tokenizer = train_tokenizer(prompts, tmp_path / "tokenizer")
    save_text_encoder(encoder, tmp_path / "text_encoder")
    pipeline = diffusers.WanPipeline(
        tokenizer=transformers.T5TokenizerFast.from_pretrained(tmp_path / "tokenizer"),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(tmp_path / "text_encoder"),
        vae=None,
        scheduler=None,
    )
    with torch.no_grad():
        expected = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=9).numpy()
    embeddings = nnx.jit(encode_prompts)(encoder, *tokenizer(prompts, 9))
    assert relative_error(embeddings, expected) < 1e-5


def test_loading_a_folder_of_shards(tmp_path):
    reference = random_reference(CONFIGS[0])
    reference.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    token_ids, mask = batch(CONFIGS[0], [4, 7], 7)
    embeddings = embed(load_text_encoder(tmp_path), token_ids, mask)
    assert relative_error(embeddings, reference_embeddings(reference, token_ids, mask)) < 1e-5


def test_only_tokens_inside_the_mask_have_gradients(encoder):
    token_ids = np.arange(2, 11, dtype=np.int32)[None]
    mask = (np.arange(9) < 5).astype(np.int32)[None]

    def loss(encoder):
        return encode_prompts(encoder, token_ids, mask).mean(axis=1).std()

    embedding_grads = nnx.jit(nnx.grad(loss))(encoder).shared.embedding[...]
    assert not embedding_grads[7:].any()
    assert (np.abs(embedding_grads[2:7]).max(axis=1) > 0).all()


def test_xxl_has_the_published_size():
    encoder = nnx.eval_shape(lambda: TextEncoder(TextEncoderConfig(), rngs=nnx.Rngs(0)))
    tensors = jax.tree.leaves(nnx.state(encoder, nnx.Param))
    assert len(tensors) == 242
    assert sum(math.prod(tensor.shape) for tensor in tensors) == 5_680_910_336
    reference_config = transformers.UMT5Config(**TextEncoderConfig().to_json())
    with torch.device("meta"):
        reference = transformers.UMT5EncoderModel(reference_config)
    assert reference.num_parameters() == 5_680_910_336


def test_standard_deviations_of_initial_tensors_equal_transformers(encoder):
    torch.manual_seed(0)
    reference = transformers.UMT5EncoderModel(transformers.UMT5Config(**CONFIGS[0].to_json()))
    expected = {name: float(tensor.detach().std()) for name, tensor in reference.named_parameters()}
    ours = {name: float(np.std(tensor)) for name, tensor in mirrored_tensors(encoder).items()}
    assert ours == pytest.approx(expected, rel=0.25, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type must be 'umt5', found 't5'"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj must be 'gated-gelu', found 'relu'"),
        ({"d_kv": None}, "missing d_kv"),
    ],
)
def test_config_of_another_encoder_is_refused(tmp_path, change, message):
    fields = {name: value for name, value in (CONFIGS[0].to_json() | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=message):
        load_text_encoder(tmp_path)


def test_missing_or_damaged_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.json: not found"):
        load_text_encoder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(InputError, match="expected JSON"):
        load_text_encoder(tmp_path)
