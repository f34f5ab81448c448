"""Text to video and image to video of Wan2.2 TI2V 5B's kind, against diffusers' pipelines with `expand_timesteps`."""

import json

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from jsurgery.cli import main
from jsurgery.data.image_reader import read_image
from jsurgery.data.video_writer import read_settings
from jsurgery.diffusion import initial_noise
from jsurgery.load_config import load_config
from jsurgery.wan.pipeline import load_pipeline

PROMPT, NEGATIVE = "a red circle moves left over a grey background", "a blue square"
FRAMES, HEIGHT, WIDTH = 9, 64, 96


def settings(**sampler):
    fields = {"video.frames": FRAMES, "video.height": HEIGHT, "video.width": WIDTH, "trace.keep_steps": 1}
    fields |= {"sampler.solver": "unipc", "sampler.negative_prompt": NEGATIVE, "text_length": 24}
    fields |= {f"sampler.{name}": value for name, value in sampler.items()}
    return load_config("tiny", {name: str(value) for name, value in fields.items()})


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture(scope="module")
def ours(tiny_pipeline_2_2):
    return load_pipeline(str(tiny_pipeline_2_2))


@pytest.fixture(scope="module")
def theirs(tiny_pipeline_2_2):
    pipelines = {}
    for name, kind in (("text", WanPipeline), ("image", WanImageToVideoPipeline)):
        pipelines[name] = kind.from_pretrained(tiny_pipeline_2_2)
        pipelines[name].set_progress_bar_config(disable=True)
        assert pipelines[name].config.expand_timesteps
    return pipelines


def reference(pipeline, config, noise, **inputs):
    latents = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=config.sampler.steps,
        guidance_scale=config.sampler.guidance,
        latents=torch.tensor(np.asarray(noise)).permute(0, 4, 1, 2, 3),
        output_type="latent",
        max_sequence_length=config.text_length,
        **inputs,
    ).frames
    return latents.permute(0, 2, 3, 4, 1).numpy()


def distance(found, expected):
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_20_steps_equal_diffusers(ours, theirs, image):
    config = settings(steps=20, guidance=5.0)
    noise = initial_noise(7, [0], ours.latent_shape(FRAMES, HEIGHT, WIDTH))
    assert noise.shape == (1, 3, 4, 6, 48)
    given = ours.encode(image[None, None] / np.float32(127.5) - 1)
    expected = {
        "text": reference(theirs["text"], config, noise),
        "image": reference(theirs["image"], config, noise, image=Image.fromarray(image)),
    }
    found = {
        "text": ours.sample([PROMPT], config, seed=7)[0],
        "image": ours.sample([PROMPT], config, seed=7, given=given)[0],
    }
    for task in ("text", "image"):
        assert distance(found[task], expected[task]) < 1e-3, task
    assert distance(found["image"], expected["text"]) > 1e-1  # a control: the image changes every frame
    assert distance(found["image"][:, 1:], expected["text"][:, 1:]) > 1e-2
    np.testing.assert_allclose(found["image"][:, :1], given, rtol=1e-6)

    # Decoded as diffusers does; other first latents do not.
    vae = theirs["image"].vae
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{name}")) for name in ("mean", "std"))
    with torch.no_grad():
        z = (torch.tensor(expected["image"]) * std + mean).permute(0, 4, 1, 2, 3)
        decoded = (vae.decode(z, return_dict=False)[0][0].permute(1, 2, 3, 0).clamp(-1, 1).numpy() + 1) * 127.5
    video = ours.decode(found["image"])[0]
    assert video.shape == (FRAMES, HEIGHT, WIDTH, 3) and np.abs(video - decoded).max() <= 1
    assert np.abs(ours.decode(found["text"])[0] - decoded).max() > 1


def test_guidance_in_two_passes_is_the_same(ours, image):
    given = np.repeat(ours.encode(image[None, None] / np.float32(127.5) - 1), 2, axis=0)
    end = lambda batched: ours.sample([PROMPT, NEGATIVE], settings(steps=2, guidance_batched=batched), given=given)[0]
    np.testing.assert_allclose(end(False), end(True), atol=2e-4)


def test_the_command(tmp_path, tiny_pipeline_2_2, image, capsys):
    """An image of another aspect is cropped with a note, and its hash stands in the video's metadata."""
    wide = np.concatenate([np.zeros_like(image[:, :16]), image, np.zeros_like(image[:, :16])], axis=1)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    size = [f"--frames={FRAMES}", f"--height={HEIGHT}", f"--width={WIDTH}", "--steps=2"]
    command = ["sample", f"--model={tiny_pipeline_2_2}", "--prompt=x", f"--output={tmp_path / 'a.mp4'}", *size]
    assert main([*command, f"--image={tmp_path / 'wide.png'}"]) == 0
    assert "cropped from 128x64 to 96x64, the aspect of a 96x64 video" in capsys.readouterr().err
    assert read_settings(tmp_path / "a.mp4")["image"] == read_image(str(tmp_path / "wide.png"), 64, 96).sha256
    np.testing.assert_array_equal(read_image(str(tmp_path / "wide.png"), HEIGHT, WIDTH).pixels, image)
    assert json.loads((tiny_pipeline_2_2 / "model_index.json").read_text())["expand_timesteps"]


def test_images_are_turned_upright_and_made_rgb(tmp_path, image):
    turned = Image.fromarray(image).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(str(tmp_path / "turned.png"), HEIGHT, WIDTH).pixels, image)
    Image.fromarray(image).convert("RGBA").save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "alpha.png"), HEIGHT, WIDTH).pixels, image)
