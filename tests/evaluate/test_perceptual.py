"""LPIPS and CLIP scores compared with torch and transformers, with random weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scipy import ndimage
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from jsurgery.errors import InputError
from jsurgery.evaluate import clip_model, lpips

CONVOLUTIONS = {
    "1.0": (64, 3, 11),
    "2.3": (192, 64, 5),
    "3.6": (384, 192, 3),
    "4.8": (256, 384, 3),
    "5.10": (256, 256, 3),
}


@pytest.fixture
def alexnet():
    """Tensors under the names of lpips.LPIPS(net="alex"), with random values."""
    rng, tensors = np.random.default_rng(0), {}
    for index, (name, (features, channels, size)) in enumerate(CONVOLUTIONS.items()):
        kernel = rng.normal(0, (channels * size**2) ** -0.5, (features, channels, size, size))
        tensors[f"net.slice{name}.weight"] = kernel.astype(np.float32)
        tensors[f"net.slice{name}.bias"] = rng.normal(0, 0.1, features).astype(np.float32)
        tensors[f"lin{index}.model.1.weight"] = rng.uniform(0, 1, (1, features, 1, 1)).astype(np.float32)
    return tensors


def videos(frames, height, width):
    rng = np.random.default_rng(1)
    smooth = 255 * ndimage.gaussian_filter(rng.uniform(size=(frames, height, width, 3)), (0, 2, 2, 0))
    other = np.clip(smooth + rng.normal(0, 9, smooth.shape), 0, 255)
    return smooth.astype(np.uint8), other.astype(np.uint8)


def torch_lpips(tensors, video, other):
    weights = {name: torch.from_numpy(value) for name, value in tensors.items()}
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def features(frames):
        x = ((torch.from_numpy(frames).float() / 255 * 2 - 1 - shift) / scale).permute(0, 3, 1, 2)
        for index, (name, (_, _, size)) in enumerate(CONVOLUTIONS.items()):
            if index in (1, 2):
                x = torch.nn.functional.max_pool2d(x, 3, 2)
            kernel, bias = weights[f"net.slice{name}.weight"], weights[f"net.slice{name}.bias"]
            x = torch.conv2d(
                x, kernel, bias, stride=4 if index == 0 else 1, padding=2 if index == 0 else size // 2
            ).relu()
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    parts = zip(features(video), features(other), strict=True)
    found = [
        torch.conv2d((a - b) ** 2, weights[f"lin{i}.model.1.weight"]).mean(dim=(1, 2, 3))
        for i, (a, b) in enumerate(parts)
    ]
    return sum(found).numpy()


@pytest.mark.parametrize("size", [(48, 64), (37, 53)])
def test_lpips_equals_torch(tmp_path, alexnet, size):
    save_file(alexnet, tmp_path / "lpips.safetensors")
    weights = lpips.load_lpips(tmp_path / "lpips.safetensors")
    video, other = videos(2, *size)
    expected = torch_lpips(alexnet, video, other)
    assert expected.min() > 0.01
    assert lpips.lpips(weights, video, other) == pytest.approx(expected, rel=1e-4)
    assert lpips.lpips(weights, video, video) == pytest.approx([0, 0], abs=1e-9)


def test_missing_weights_and_small_frames_are_refused(tmp_path, alexnet):
    file = tmp_path / "lpips.safetensors"
    shared = {name.replace("lin", "lins."): value for name, value in alexnet.items()}  # save_model may keep these names
    save_file(shared, file)
    weights = lpips.load_lpips(file)
    with pytest.raises(InputError, match="at least 31 pixels"):
        lpips.lpips(weights, *videos(1, 16, 48))
    del alexnet["lin3.model.1.weight"]
    save_file(alexnet, file)
    with pytest.raises(InputError, match=r"expected lin3.model.1.weight of shape \[1, 256, 1, 1\], found None"):
        lpips.load_lpips(file)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(folder, model, tokenizer) of a CLIP model with random weights and a vocabulary of bytes and a few merges."""
    folder = tmp_path_factory.mktemp("clip")
    characters = sorted(clip_model._BYTES.values())
    merges = [("a", "t</w>"), ("r", "e"), ("re", "d</w>"), ("c", "at</w>"), ("c", "i"), ("l", "e</w>"), ("é", "!</w>")]
    words = [*characters, *(c + "</w>" for c in characters), *map("".join, merges), clip_model.START, clip_model.END]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(dict.fromkeys(words))}, merges)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": 0}
    text = layers | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "initializer_range": 0.5}
    vision = layers | {"image_size": 32, "patch_size": 8, "initializer_range": 0.5}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(folder)
    return folder, model, tokenizer


PROMPTS = ("a red cat", "A  RED\ncircle's way: 12 (left_right)!", "Café — two cats", "x" * 40)


def test_clip_tokens_equal_transformers(reference):
    folder, _, tokenizer = reference
    ours = clip_model.load_clip_model(str(folder))
    for prompt in PROMPTS:
        assert ours.tokens(prompt) == tokenizer(prompt)["input_ids"][1:-1]
    assert len(ours.tokens("cat red")) == 2  # merges are used


def test_clip_scores_equal_transformers(reference):
    folder, model, tokenizer = reference
    ours = clip_model.load_clip_model(str(folder))
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    video = videos(3, 45, 70)[0]
    with torch.no_grad():
        pixels = CLIPImageProcessorPil(**size)([*video], return_tensors="pt")["pixel_values"]
        images = model.get_image_features(pixel_values=pixels).pooler_output.numpy()
        texts = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=24)["input_ids"]
            texts.append(model.get_text_features(input_ids=ids).pooler_output[0].numpy())
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    found = [ours.scores(video, prompt) for prompt in PROMPTS]
    for score, text in zip(found, texts, strict=True):
        assert score["clip_text"] == pytest.approx((images @ (text / np.linalg.norm(text))).mean(), abs=1e-4)
        assert score["clip_frames"] == pytest.approx((images[1:] * images[:-1]).sum(axis=1).mean(), abs=1e-4)
    assert np.ptp([score["clip_text"] for score in found]) > 0.01  # the prompts matter


def test_an_incomplete_clip_folder_is_refused(tmp_path, reference):
    with pytest.raises(InputError, match=r"config.json"):
        clip_model.load_clip_model(str(tmp_path))
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((reference[0] / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(InputError, match="no .safetensors file"):
        clip_model.load_clip_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_config": None}))
    with pytest.raises(InputError, match="of a CLIPModel of transformers"):
        clip_model.load_clip_model(str(tmp_path))
