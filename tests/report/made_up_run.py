"""A finished run with made-up numbers, and a parser of its report."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np

from jsurgery.config import base, flatten
from jsurgery.data import sprites
from jsurgery.data.video_writer import write_video
from jsurgery.evaluate.sprites_score import DIMENSIONS, summarize
from jsurgery.report import video_player
from jsurgery.wan.cost import core_flops, workload
from jsurgery.wan.model_config import WanConfig

MODELS = ("teacher", "not_distilled", "distilled", "finetuned")
RATES = (2, 4, 8, "linear")
PLAN = [1, 8, 4, 8, "linear", 1]
MODEL = WanConfig(
    num_attention_heads=4, attention_head_dim=32, in_channels=8, out_channels=8, text_dim=64, ffn_dim=512, num_layers=6
)
HOSTILE = 'a <script>alert("x")</script> & <img src=http://evil.example/x.png> moves left'


def tiny_config(teacher):
    write(teacher / "config.json", MODEL.to_json())
    c = base()
    c.prompts, c.model.path, c.text_length = "sprites", str(teacher), 32
    c.video.frames, c.video.height, c.video.width, c.video.fps = 17, 192, 160, 8
    c.plan.rates = (1, *RATES)
    return c


def write_run(folder, config, prompts=5, videos=2, hostile=True, size=(9, 96, 80), model=MODEL, plan=PLAN, seed=0):
    """Writes the files of all stages, with made-up numbers and with clips of sprites under blocky noise."""
    rng = np.random.default_rng(seed)
    write(folder / "config.json", dict(flatten(config)))
    blocks = model.num_layers
    errors = np.sort(rng.uniform(0.02, 0.4, (blocks, 4)), axis=1)
    share = np.array([0.62, 0.41, 0.25, 0.0]) + rng.uniform(-0.05, 0.05, (blocks, 4)) * [1, 1, 1, 0]
    write(
        folder / "distill" / "errors.json",
        {
            "rates": list(RATES),
            "errors": errors.tolist(),
            "initial_errors": (2.3 * errors).tolist(),
            "velocity_errors": (errors[::-1] / 3).tolist(),
            "velocity_samples": 8,
            "softmax_share": share.tolist(),
            "teacher_softmax_share": (0.9 * share).tolist(),
            "samples": 24,
        },
    )
    write_metrics(folder / "distill", 400, **{f"loss_{rate}": 0.05 + 0.05 * i for i, rate in enumerate(RATES)})
    write_metrics(folder / "finetune", 300, loss=0.21, gradient_norm=1.4)

    teacher = blocks * core_flops(workload(config, model), 1)
    cost = sum(core_flops(workload(config, model), rate) for rate in plan)
    write(
        folder / "plan" / "plan.json",
        {
            "rates": plan,
            "selection": "heterogeneous",
            "errors": "velocity",
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
    frames, height, width = size
    real = [sprites.render(scene, *size) for scene in scenes[:videos]]
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
            noise = rng.standard_normal((frames, height // 16, width // 16, 3))
            noisy = np.clip(clip + 90 * distance * noise.repeat(16, axis=1).repeat(16, axis=2), 0, 255).astype(np.uint8)
            write_video(folder / "evaluation" / "videos" / name / f"{number:04d}.mp4", noisy, config.video.fps)
    write(folder / "evaluation" / "evaluation.json", {"prompts": captions, "models": models})


def write_made_by(folder, machine="AMD EPYC, 2 threads"):
    """Adds what a real run leaves of how it was made: commands and times of its stages, seconds of a sampling step."""
    for number, stage in enumerate(("trace", "distill", "plan", "hybrid", "latents", "finetune", "evaluation")):
        made_by = {"command": "jsurgery surgery --config=tiny", "machine": machine, "resumed": stage == "finetune"}
        made_by |= {"ended": f"2026-11-29T17:2{number}:10+00:00", "seconds": 10.0 + 60 * number}
        write(folder / stage / "stage.json", {"complete": True, "made_by": made_by})
    for number, name in enumerate(MODELS):
        quartiles = {"low": 1.5 + number, "seconds": 2.0 + number, "high": 2.25 + number}
        write(
            folder / "evaluation" / "speed" / f"{name}.json", quartiles | {"steps": 14, "clips": 4, "machine": machine}
        )


def write_fidelity(folder, durations=(9, 17)):
    """Writes the files of `evaluate fidelity`: a hybrid equal to its teacher, a model unlike it, and a control."""
    rng = np.random.default_rng(3)

    def numbers(frames, ssim, psnr, **more):
        levels = {"flicker": 2.5, "motion": 1.25, "teacher_flicker": 2.25, "teacher_motion": 1.5}
        ssims = [1.0] * frames if psnr is None else (ssim + rng.uniform(-0.05, 0.05, frames)).tolist()
        psnrs = [psnr] * frames
        return (
            {"psnr": psnr, "ssim": ssim, "drift": 0.5, "psnr_per_frame": psnrs, "ssim_per_frame": ssims} | levels | more
        )

    def velocities(error):
        return {"velocity_error": error, "velocity_error_per_step": [error, 2 * error, 3 * error]}

    def models(frames):
        return {
            "runs/x/hybrid": numbers(frames, 1.0, None, **velocities(0.0)),
            "runs/x/model": numbers(frames, 0.8125, 23.4375, **velocities(0.21875)),
            "teacher, other noise": numbers(frames, 0.5, 14.0625),
        }

    found = [{"frames": frames, "seconds": frames / 8, "models": models(frames)} for frames in durations]
    write(
        folder / "fidelity" / "fidelity.json",
        {"prompts": ["a", "b"], "timesteps": [999.0, 600.0, 50.0], "durations": found},
    )


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


class Page(HTMLParser):
    """A parsed page: its elements, addresses, text, and numbers as (value, shown text)."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.numbers, self.sections, self.text = [], [], [], set(), ""
        self.value, self.scripts, self.data, self.kind = None, [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        loading = ("src", "href", "srcset", "poster", "data", "action")
        self.addresses += [attributes[name] for name in loading if name in attributes]
        self.addresses += re.findall(r"url\(([^)]*)\)", attributes.get("style") or "")
        if tag == "section":
            self.sections.add(attributes["id"])
        if tag == "script":
            self.kind = attributes.get("id")
        if tag == "data":
            self.value = float(attributes["value"])

    def handle_data(self, data):
        if self.value is not None:
            self.numbers.append((self.value, data))
            self.value = None
        if self.tags and self.tags[-1] == "style" and "{" in data:
            self.addresses += re.findall(r"(?:url\(|@import)([^);]*)", data)
        elif self.tags and self.tags[-1] == "script" and data.strip():
            if self.kind:  # a script element with data
                self.data[self.kind] = data
            else:
                self.scripts.append(data)
        else:
            self.text += data

    @property
    def videos(self):
        """For every prompt the clips of all models side by side, uint8 [F, h, w, 3]."""
        found = [data for name, data in self.data.items() if name.startswith("video-")]
        return [video_player.decode(base64.b64decode(video))[0] for video in found]

    @property
    def rows(self):
        return json.loads(self.data["clips-data"])

    @property
    def values(self):
        return [value for value, _ in self.numbers]

    def external(self):
        return [address for address in self.addresses if not address.startswith(("data:", "#"))]
