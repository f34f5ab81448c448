"""The whole surgery of a model of the kind of Wan2.2 TI2V 5B, and image to video with what comes out."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from jsurgery.cli import main
from jsurgery.wan.checkpoint import load_transformer

# Frames of 4 x 3 tokens: each is 32 x 32 pixels.
SIZES = {
    "video.frames": 5, "video.height": 128, "video.width": 96, "sampler.steps": 2, "trace.prompts": 2,
    "trace.holdout": 1, "trace.keep_steps": 2, "trace.batch": 2, "hybrid.lattice": "staggered_rows",
    "hybrid.rates": '(2, "linear")', "plan.rates": '(2, "linear")', "plan.budget": "2R2", "distill.steps": 2,
    "finetune.steps": 1, "finetune.batch": 2, "evaluate.prompts": 1,
    "evaluate.batch": 1, "evaluate.videos": 1, "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tiny_pipeline_2_2, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("surgery_2_2")
    (workdir / "prompts.txt").write_text("a red circle\na blue square\na green star\n")
    sizes = SIZES | {"prompts": workdir / "prompts.txt", "data.path": ""}
    fields = [f"--config.{field}={value}" for field, value in sizes.items()]
    model = f"--config.model.path={tiny_pipeline_2_2}"
    assert main(["surgery", "--config=tiny", model, f"--workdir={workdir / 'run'}", *fields]) == 0
    return workdir


def test_every_block_is_converted_and_differs_from_the_teacher(workdir):
    model = load_transformer(workdir / "run" / "model")
    assert model.config.in_channels == 48 and set(model.config.rates) <= {2, "linear"}
    assert model.config.hybrid.lattice == "staggered_rows"
    evaluation = json.loads((workdir / "run" / "evaluation" / "evaluation.json").read_text())["models"]
    assert evaluation["teacher"]["latent_rmse"] == [0]
    assert all(0 < evaluation[name]["latent_rmse"][0] < 10 for name in ("not_distilled", "distilled", "finetuned"))


def test_image_to_video_with_the_operated_model(workdir):
    rng, frames = np.random.default_rng(0), {}
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (128, 96, 3), dtype=np.uint8)).save(workdir / f"{name}.png")
        clip = workdir / f"{name}.mp4"
        command = ["sample", f"--model={workdir / 'run' / 'model'}", "--prompt=x", f"--output={clip}"]
        assert main([*command, "--frames=5", "--height=128", "--width=96", f"--image={workdir / f'{name}.png'}"]) == 0
        with av.open(str(clip)) as container:
            frames[name] = np.stack(
                [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], dtype=int
            )
    assert frames["a"].shape == (5, 128, 96, 3)
    assert all(np.abs(frames["a"] - frames["b"]).mean(axis=(1, 2, 3)) > 1), "the image reaches every frame"
