import base64
import json
import re
from html.parser import HTMLParser
from importlib.metadata import version

import numpy as np
import pytest

from jsurgery.config import base, flat
from jsurgery.cost import Workload, core_flops, model_flops, num_tokens
from jsurgery.data import sprites
from jsurgery.evaluate.sprites_score import DIMENSIONS, summarize
from jsurgery.evaluate.video_file import write_video
from jsurgery.report import clips as clips_module
from jsurgery.report.charts import linear_ticks, line_chart, log_ticks, running_mean
from jsurgery.report.page import write_report
from jsurgery.surgery.plan import workload
from jsurgery.wan.transformer import WanConfig

MODELS = ("teacher", "not_distilled", "distilled", "finetuned")
RATES = (2, 4, 8, "linear")
PLAN = [1, 8, 4, 8, "linear", 1]
MODEL = WanConfig(num_attention_heads=4, attention_head_dim=32, in_channels=8, out_channels=8, text_dim=64, ffn_dim=512, num_layers=6)
HOSTILE = 'a <script>alert("x")</script> & <img src=http://evil.example/x.png> moves left'


@pytest.fixture
def config(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(MODEL.to_json()))
    c = base()
    c.prompts, c.model.path, c.text_length = "sprites", str(tmp_path / "teacher"), 32
    c.video.frames, c.video.height, c.video.width, c.video.fps = 17, 192, 160, 8
    c.plan.rates = (1, *RATES)
    return c


@pytest.fixture
def workdir(tmp_path, config):
    folder = tmp_path / "run"
    write_run(folder, config)
    return folder


def write_run(folder, config, prompts=5, videos=2, hostile=True):
    """What the stages leave, with made-up numbers."""
    rng = np.random.default_rng(0)
    write(folder / "config.json", dict(flat(config)))
    errors = np.sort(rng.uniform(0.02, 0.4, (6, 4)), axis=1)
    share = np.array([0.62, 0.41, 0.25, 0.0]) + rng.uniform(-0.05, 0.05, (6, 4)) * [1, 1, 1, 0]
    write(
        folder / "distill" / "errors.json",
        {
            "rates": list(RATES),
            "errors": errors.tolist(),
            "initial_errors": (2.3 * errors).tolist(),
            "softmax_share": share.tolist(),
            "teacher_softmax_share": (0.9 * share).tolist(),
            "samples": 24,
        },
    )
    write_metrics(folder / "distill", 400, **{f"loss_{rate}": 0.05 + 0.05 * i for i, rate in enumerate(RATES)})
    write_metrics(folder / "finetune", 300, loss=0.21, gradient_norm=1.4)

    teacher = 6 * core_flops(workload(config, MODEL), 1)
    cost = sum(core_flops(workload(config, MODEL), rate) for rate in PLAN)
    write(
        folder / "plan" / "plan.json",
        {
            "rates": PLAN,
            "selection": "heterogeneous",
            "budget": "5R8",
            "budget_flops": 1.01 * cost,
            "cost_flops": cost,
            "teacher_flops": teacher,
            "share_of_teacher": cost / teacher,
            "error": 0.61234,
            "error_bound": 0.59876,
        },
    )

    scenes = [sprites.scene_at(7, i, two_sprites=0.25) for i in range(prompts)]
    captions = [scene.caption for scene in scenes]
    if hostile:
        captions[0] = HOSTILE
    real = [sprites.render(scene, config.video.frames, config.video.height, config.video.width) for scene in scenes[:videos]]
    models, upper, chance = {}, dict.fromkeys(DIMENSIONS, 0.95), dict.fromkeys(DIMENSIONS, 0.3)
    for name, level, distance in zip(MODELS, (0.88, 0.42, 0.74, 0.86), (0.0, 0.91, 0.38, 0.21), strict=True):
        per_clip = {dimension: np.clip(level + 0.12 * rng.standard_normal(prompts), 0, 1) for dimension in DIMENSIONS}
        models[name] = {
            "validation_loss": 0.4 - 0.2 * level,
            "latent_rmse": (distance * rng.uniform(0.7, 1.3, prompts)).tolist(),
            "per_clip": {dimension: values.tolist() for dimension, values in per_clip.items()},
            "score": summarize(per_clip, upper, chance, rng),
        }
        for number, clip in enumerate(real):
            noise = 90 * distance * rng.standard_normal((len(clip), 12, 10, 3)).repeat(16, axis=1).repeat(16, axis=2)
            noisy = np.clip(clip + noise[:, : clip.shape[1], : clip.shape[2]], 0, 255).astype(np.uint8)
            write_video(folder / "evaluation" / "videos" / name / f"{number:04d}.mp4", noisy, config.video.fps)
    write(folder / "evaluation" / "evaluation.json", {"prompts": captions, "models": models})


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_metrics(folder, steps, **levels):
    rng = np.random.default_rng(1)
    rows = []
    for step in range(10, steps + 1, 10):
        values = {name: level * (1 + 3 * np.exp(-step / 60)) * rng.uniform(0.8, 1.2) for name, level in levels.items()}
        rows.append(json.dumps({"step": step, **values}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
