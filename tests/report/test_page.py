import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from importlib.metadata import version

import av
import numpy as np
import pytest
from PIL import Image

from jsurgery.config import base, flat
from jsurgery.cost import core_flops
from jsurgery.data import sprites
from jsurgery.evaluate.sprites_score import DIMENSIONS, summarize
from jsurgery.evaluate.video_file import write_video
from jsurgery.report import clips
from jsurgery.report.charts import line_chart, linear_ticks, log_ticks, running_mean
from jsurgery.report.page import write_report
from jsurgery.surgery.plan import workload
from jsurgery.wan.transformer import WanConfig

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


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "teacher")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    write_run(folder / "run", tiny_config(folder / "teacher"))
    return folder / "run"


@pytest.fixture
def workdir(tmp_path, finished_run):
    return shutil.copytree(finished_run, tmp_path / "run")


def write_run(folder, config, prompts=5, videos=2, hostile=True, size=(9, 96, 80)):
    """What the stages leave, with made-up numbers and clips of blocky noise over sprites."""
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
    """The elements of a page, its text, and its numbers as (value, shown text)."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.numbers, self.sections, self.text = [], [], [], set(), ""
        self.value, self.scripts = None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        loading = ("src", "href", "srcset", "poster", "data", "action")
        self.addresses += [attributes[name] for name in loading if name in attributes]
        self.addresses += re.findall(r"url\(([^)]*)\)", attributes.get("style") or "")
        if tag == "section":
            self.sections.add(attributes["id"])
        if tag == "data":
            self.value = float(attributes["value"])

    def handle_data(self, data):
        if self.value is not None:
            self.numbers.append((self.value, data))
            self.value = None
        if self.tags and self.tags[-1] == "style" and "{" in data:
            self.addresses += re.findall(r"(?:url\(|@import)([^);]*)", data)
        elif self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts.append(data)
        else:
            self.text += data

    @property
    def values(self):
        return [value for value, _ in self.numbers]

    def external(self):
        return [address for address in self.addresses if not address.startswith(("data:", "#"))]


def report(config, workdir):
    write_report(config, workdir)
    return Page((workdir / "report.html").read_text())


def read(path):
    return json.loads(path.read_text())


def test_nothing_is_loaded_from_anywhere(config, workdir):
    page = report(config, workdir)
    assert len([a for a in page.addresses if a.startswith("data:video/mp4;base64,")]) == 2 * len(MODELS)
    assert page.external() == []
    assert not {"img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.tags.count("link") == 1  # the empty icon, so that browsers do not ask for one


@pytest.mark.parametrize(
    "text",
    [
        '<img src="//cdn.example/x.png">',
        '<a href="https://cdn.example">',
        "<style>a { background: url(http://x) }</style>",
        '<style>@import "http://x"; a { color: red }</style>',
    ],
)
def test_what_is_loaded_would_be_found(text):
    assert Page(text).external()


def test_the_policy_allows_the_script_of_the_page_and_no_other(config, workdir):
    page = report(config, workdir)
    assert len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)', (workdir / "report.html").read_text())[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("script-src") == f"'sha256-{digest}'"
    assert rules == {
        "default-src": "'none'",
        "media-src": "data:",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
    }


def test_prompts_are_text(config, workdir):
    config.sampler.negative_prompt = "<b>bold</b>"
    page = report(config, workdir)
    assert HOSTILE in page.text and "<b>bold</b>" in page.text
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert page.tags.count("b") == len(PLAN)  # the plan's cells alone


def test_clips_are_those_of_the_workdir_row_by_row(config, workdir):
    page = report(config, workdir)
    found = [base64.b64decode(a.partition(",")[2]) for a in page.addresses if a.startswith("data:video")]
    videos = workdir / "evaluation" / "videos"
    assert found == [(videos / name / f"{i:04d}.mp4").read_bytes() for i in range(2) for name in MODELS]


def test_the_teacher_lies_above_the_final_model_in_the_grid(config, workdir):
    report(config, workdir)
    videos = workdir / "evaluation" / "videos"
    count, height, width, _ = clips.read_frames((videos / "teacher" / "0000.mp4").read_bytes(), 192).shape
    with Image.open(workdir / "comparison.gif") as grid:
        assert grid.size == (2 * width, 2 * height) and grid.n_frames == count
        grid.seek(3)
        shown = np.asarray(grid.convert("RGB"), float)
    for row, name in enumerate(("teacher", "finetuned")):
        for column in range(2):
            tile = shown[row * height : (row + 1) * height, column * width : (column + 1) * width]
            frames = {n: clips.read_frames((videos / n / f"{column:04d}.mp4").read_bytes(), 192)[3] for n in MODELS}
            distance = {n: np.abs(tile - clip).mean() for n, clip in frames.items()}
            assert min(distance, key=distance.__getitem__) == name and distance[name] < 10

    assert clips.side_by_side(workdir / "no" / "videos", ["teacher"], 2) is None


def test_numbers_are_those_of_the_files(config, workdir):
    page = report(config, workdir)
    errors = read(workdir / "distill" / "errors.json")
    plan = read(workdir / "plan" / "plan.json")
    models = read(workdir / "evaluation" / "evaluation.json")["models"]
    expected = [plan["error"], plan["error_bound"], *np.ravel(errors["errors"]), *np.ravel(errors["softmax_share"])]
    expected += [*np.ravel(errors["teacher_softmax_share"]), *np.mean(errors["errors"], axis=0)]
    expected += [*np.mean(errors["initial_errors"], axis=0)]
    for model in models.values():
        expected += [model["validation_loss"], np.mean(model["latent_rmse"]), *model["latent_rmse"][:2]]
        expected += [summary[key] for summary in model["score"].values() for key in ("mean", "upper", "chance")]
        expected += [np.mean([values[i] for values in model["per_clip"].values()]) for i in range(2)]
    shown = np.sort(page.values)
    for value in expected:
        assert np.min(np.abs(shown - value)) < 1e-9, value
    for value, text in page.numbers:
        digits = len(text.partition(".")[2])
        assert digits and abs(float(text) - value) <= 0.5001 * 10**-digits
    for summary in models["finetuned"]["score"].values():
        assert f"{summary['low']:.3f} to {summary['high']:.3f}" in page.text
    assert f"4 of 6 attention layers rebuilt, {100 * (1 - plan['share_of_teacher']):.1f}% less" in page.text


@pytest.mark.parametrize(
    "rates, sentence",
    [  # published figures of 15R2 and of 20R8 in 30 blocks, 480 x 832, 81 frames
        ([1, 2] * 3, "less attention work on Wan2.1 1.3B23.8%Computed, not measured"),
        ([8, 8, 1] * 2, "81 frames. Of the whole model: 39.4% less."),
    ],
)
def test_savings_at_full_size(config, workdir, rates, sentence):
    plan = read(workdir / "plan" / "plan.json")
    write(workdir / "plan" / "plan.json", plan | {"rates": rates})
    text = report(config, workdir).text
    assert sentence in re.sub(r"\s*\n\s*", "", text)


def test_chosen_cells_are_the_plan(config, workdir):
    write_report(config, workdir)
    text = (workdir / "report.html").read_text()
    table = text[text.index('<table class="heat">') : text.index("<tfoot>")]
    columns = [1, *RATES]
    rows = [re.findall(r"<td( class=.chosen.)?", row) for row in table.split("<tr>")[2:]]
    assert [[columns[i] for i, mark in enumerate(row) if mark] for row in rows] == [[rate] for rate in PLAN]


ALL = {"clips", "scores", "plan", "errors", "training", "flops", "config"}


@pytest.mark.parametrize(
    "missing, left_out",
    [
        ((), set()),
        (("evaluation",), {"clips", "scores"}),
        (("evaluation/videos",), {"clips"}),
        (("plan",), {"plan", "flops"}),
        (("distill/errors.json",), {"errors"}),
        (("distill", "finetune"), {"errors", "training"}),
        (("finetune",), set()),
        (("evaluation", "plan", "distill", "finetune"), ALL - {"config"}),
    ],
)
def test_what_a_stage_has_not_left_is_left_out(config, workdir, missing, left_out):
    for name in missing:
        shutil.rmtree(workdir / name) if (workdir / name).is_dir() else (workdir / name).unlink()
    page = report(config, workdir)
    assert page.sections == ALL - left_out
    assert {a[1:] for a in page.addresses if a.startswith("#")} == page.sections


def test_a_tiny_model_is_called_one_wherever_results_are(config, workdir):
    text = report(config, workdir).text
    assert "not results of Wan2.1 1.3B" in text.replace("\n", "")
    assert text.count("tiny model, procedural clips") == 4


def test_wan_itself_at_full_size(config, workdir, tmp_path):
    """No label, no second table, no score on prompts in which nothing can be measured."""
    write(tmp_path / "teacher" / "config.json", WanConfig().to_json())
    config.prompts = "prompts.txt"
    config.video.frames, config.video.height, config.video.width = 81, 480, 832
    evaluation = read(workdir / "evaluation" / "evaluation.json")
    evaluation["models"] = {name: {"latent_rmse": model["latent_rmse"]} for name, model in evaluation["models"].items()}
    write(workdir / "evaluation" / "evaluation.json", evaluation)
    page = report(config, workdir)
    assert page.sections == ALL
    assert "tiny" not in page.text and "not measured" not in page.text and "Real clips" not in page.text
    assert "Attention surgery on Wan2.1 1.3B" in page.text


def test_the_control_is_not_called_a_hybrid(config, workdir):
    assert "Teacher, fine-tuned" not in report(config, workdir).text
    config.finetune.subject = "teacher"
    assert "Teacher, fine-tuned" in report(config, workdir).text


def test_every_field_and_version_is_there(config, workdir):
    text = report(config, workdir).text
    for field, value in flat(config):
        assert f"{field}{value}" in text.replace("\n", "")
    assert f"jax {version('jax')}" in text and f"flax {version('flax')}" in text


def test_a_second_report_replaces_the_first(config, workdir):
    (workdir / "report.html").write_text("old")
    assert "Made with" in report(config, workdir).text
    assert not list(workdir.glob("*.tmp"))


def test_large_clips_are_made_to_fit(config, workdir, monkeypatch):
    rng = np.random.default_rng(0)
    folder = workdir / "evaluation" / "videos"
    for name in MODELS:
        for i in range(3):
            write_video(folder / name / f"{i:04d}.mp4", rng.integers(0, 256, (9, 64, 96, 3), np.uint8), fps=8)
    full = sum(file.stat().st_size for file in folder.rglob("*.mp4"))
    monkeypatch.setattr(clips, "PAGE_BYTES", full // 4)
    monkeypatch.setattr(clips, "CLIP_BYTES", full // 40)
    page = report(config, workdir)
    embedded = [base64.b64decode(a.partition(",")[2]) for a in page.addresses if a.startswith("data:video")]
    assert len(embedded) == 2 * len(MODELS)  # the third prompt would have left too little for each
    assert sum(map(len, embedded)) < 1.2 * (full // 4)
    assert "2 of 5 evaluated prompts are shown" in page.text
    with av.open(io.BytesIO(embedded[0])) as container:
        assert len(list(container.decode(video=0))) == 9
        assert container.streams.video[0].average_rate == 8


def test_a_page_stays_under_its_bound(config, workdir):
    assert 1.2 * 4 / 3 * clips.PAGE_BYTES < 14e6  # a rate limit is met within 20 %; base64 adds a third
    write_report(config, workdir)
    size = (workdir / "report.html").stat().st_size
    assert size - 4 / 3 * sum(file.stat().st_size for file in workdir.rglob("*.mp4")) < 300_000


def test_line_chart():
    rows = [{"step": step, "a": 10.0 ** (step / 100), "b": np.nan if step == 50 else 1.0} for step in range(0, 101, 50)]
    chart = line_chart("t", rows, {"a": "A", "b": "B"})
    assert chart.log
    a, b = chart.lines
    points = [tuple(map(float, point.split())) for point in a.raw[1:].split("L")]
    assert [x for x, _ in points] == [0, 50, 100]
    heights = [y for _, y in points]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2]) and 0 < heights[2] < heights[0] < 100
    assert [x for x, _ in (tuple(map(float, p.split())) for p in b.raw[1:].split("L"))] == [0, 100]
    assert (heights[0], "1") in [(pytest.approx(at, abs=0.01), text) for at, text in chart.y_ticks]
    assert line_chart("t", rows[:1], {"a": "A"}) is None
    assert line_chart("t", rows, {"c": "C"}) is None and line_chart("t", rows, {}) is None
    flat_chart = line_chart("t", [{"step": 1, "a": 0.0}, {"step": 2, "a": 0.0}], {"a": "A"})
    assert not flat_chart.log and flat_chart.y_ticks


def test_long_lines_are_thinned():
    chart = line_chart("t", [{"step": i, "a": np.sin(i)} for i in range(100_000)], {"a": "A"})
    assert len(chart.lines[0].raw) < 5000 and chart.lines[0].raw.endswith(f"100.00 {chart.lines[0].raw.split()[-1]}")


def test_running_mean():
    values = np.random.default_rng(0).uniform(size=100)
    values[40] = np.nan
    width = 2 * (100 // 24) + 1
    found = running_mean(values)
    for i in (0, 3, 39, 41, 99):
        window = values[max(0, i - width // 2) : i + width // 2 + 1]
        assert found[i] == pytest.approx(np.nanmean(window))
    assert np.isnan(found[40])


def test_ticks():
    assert linear_ticks(3, 98) == [50.0]
    assert linear_ticks(10, 400) == [100.0, 200.0, 300.0, 400.0]
    assert linear_ticks(-0.11, 0.32) == [0.0, 0.2]
    assert log_ticks(0.03, 0.9) == [0.05, 0.1, 0.2, 0.5]
    assert log_ticks(1e-6, 10) == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]
