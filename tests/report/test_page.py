import base64
import hashlib
import io
import json
import re
import shlex
import shutil
from importlib.metadata import version
from itertools import chain

import numpy as np
import pytest
from etils import epath
from PIL import Image

from jsurgery.cli import main
from jsurgery.config import flatten
from jsurgery.data.video_writer import write_video
from jsurgery.errors import InputError
from jsurgery.report import comparison_gif, pareto_slider, video_player
from jsurgery.report.attention_diagram import attention_diagram
from jsurgery.report.charts import line_chart, linear_ticks, log_ticks, running_mean
from jsurgery.report.first_frame import write_first_frame
from jsurgery.report.page import PROJECT, parity, write_report
from jsurgery.report.run_files import read_run
from jsurgery.report.scores import compared
from jsurgery.report.summary import result_lines
from jsurgery.surgery.knapsack import solve
from jsurgery.surgery.plan import block_costs
from jsurgery.wan.model_config import WanConfig
from tests.report.made_up_run import (
    HOSTILE,
    MODEL,
    MODELS,
    PLAN,
    RATES,
    Page,
    tiny_config,
    write,
    write_fidelity,
    write_made_by,
    write_run,
)


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


def report(config, workdir):
    write_report(config, workdir)
    return Page((workdir / "report.html").read_text())


def read(path):
    return json.loads(path.read_text())


def test_the_page_loads_nothing_external(config, workdir):
    page = report(config, workdir)
    assert len(page.videos) == 2
    assert page.external() == [PROJECT]  # a link, which loads nothing until it is followed
    assert not {"img", "iframe", "object", "embed", "base", "form", "video"} & set(page.tags)
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
def test_control_external_addresses_are_found(text):
    assert Page(text).external()


def test_the_policy_allows_only_the_script_of_the_page(config, workdir):
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


def test_prompts_and_config_values_are_escaped(config, workdir):
    config.sampler.negative_prompt = "<b>bold</b>"
    page = report(config, workdir)
    assert HOSTILE in page.text and "<b>bold</b>" in page.text and page.rows[0]["prompt"] == HOSTILE
    assert page.tags.count("script") == 1 + len(page.data) and "img" not in page.tags
    assert page.tags.count("b") == len(PLAN)  # only the cells of the plan


def test_the_page_shows_the_clips_of_all_models(config, workdir):
    page = report(config, workdir)
    for number, (video, row) in enumerate(zip(page.videos, page.rows, strict=True)):
        assert row["models"] == list(MODELS) and (row["height"], row["width"], row["frames"]) == (96, 80, 9)
        for place, name in enumerate(MODELS):
            left = place * row["offset"]
            shown = video[:, : row["height"], left : left + row["width"]].astype(float)
            clips = {
                n: video_player.read_clip(workdir / "evaluation" / "videos" / n / f"{number:04d}.mp4", 192)[0]
                for n in MODELS
            }
            distance = {n: np.abs(shown - clip).mean() for n, clip in clips.items()}
            assert min(distance, key=distance.__getitem__) == name and distance[name] < 8


def test_comparison_gif_shows_labelled_clips_of_each_prompt(config, workdir):
    report(config, workdir)
    videos, names = workdir / "evaluation" / "videos", ("teacher", "not_distilled", "finetuned")
    count, height, width, _ = video_player.read_clip(videos / "teacher" / "0000.mp4", 192)[0].shape
    layout = comparison_gif.Layout.of(2, len(names), width, height)
    with Image.open(workdir / "comparison.gif") as picture:
        assert picture.size == layout.size and picture.n_frames == count
        picture.seek(3)
        shown = np.asarray(picture.convert("RGB"), float)
    assert (workdir / "comparison.gif").stat().st_size <= comparison_gif.BYTES
    for number, places in enumerate(layout.clips):
        clips = {n: video_player.read_clip(videos / n / f"{number:04d}.mp4", 192)[0][3] for n in names}
        for name, (left, top) in zip(names, places, strict=True):
            tile = shown[top : top + height, left : left + width]
            distance = {n: np.abs(tile - clip).mean() for n, clip in clips.items()}
            assert min(distance, key=distance.__getitem__) == name and distance[name] < 20
            label = shown[top - comparison_gif.LINE - 2 : top - 2, left : left + width]
            assert label.min() < 150 and (label.min(axis=(1, 2)) > 200).any(), "a line of type on paper"
        gutter = shown[places[0][1] : places[0][1] + height, places[0][0] + width + 2 : places[1][0] - 2]
        assert gutter.size and gutter.min() > 240

    shutil.rmtree(videos / "finetuned")
    shutil.rmtree(videos / "not_distilled")
    (workdir / "comparison.gif").unlink()
    write_report(config, workdir)
    assert not (workdir / "comparison.gif").exists(), "nothing to compare"


def test_the_picture_has_prompts_that_the_teacher_does_well_over_various_backgrounds():
    prompts = [
        "a red circle moves left over a grey background",
        "a red circle moves right over a grey background",
        "a blue square moves up over a black background",
        "a green circle stays still over a white background",
        "a pink triangle moves down over a brown background",
        "a cyan square moves down over a white background",
    ]
    scores = [0.995, 0.99, 0.99, 1.0, 0.5, 0.993]
    evaluation = {"models": {"teacher": {"per_clip": {"shape": scores}}}}
    chosen = comparison_gif.choose_prompts(prompts, range(6), evaluation)
    assert len(chosen) == 4 and {0, 2, 5} <= set(chosen)  # one of each background that the teacher does well
    assert 4 not in chosen
    assert comparison_gif.choose_prompts(["any prompt"] * 9, range(3, 9), None) == [3, 4, 5, 6]


def test_the_page_shows_the_numbers_of_the_files(config, workdir):
    page = report(config, workdir)
    errors = read(workdir / "distill" / "errors.json")
    plan = read(workdir / "plan" / "plan.json")
    models = read(workdir / "evaluation" / "evaluation.json")["models"]
    expected = [plan["error"], plan["error_bound"], *np.ravel(errors["errors"]), *np.ravel(errors["softmax_share"])]
    expected += [*np.ravel(errors["teacher_softmax_share"]), *np.mean(errors["errors"], axis=0)]
    expected += [*np.mean(errors["initial_errors"], axis=0)]
    of_velocity = np.sqrt(errors["velocity_errors"])
    expected += [*np.ravel(of_velocity), *np.mean(of_velocity, axis=0)]
    for model in models.values():
        expected += [model["validation_loss"], np.mean(model["latent_rmse"])]
        expected += [summary["normalized"] for summary in model["score"].values()]
    shown = np.sort(page.values)
    for value in expected:
        assert np.min(np.abs(shown - value)) < 1e-9, value
    for number, row in enumerate(page.rows):
        for name, note in row["notes"].items():
            assert note["distance"] == models[name]["latent_rmse"][number]
            total, measured = models[name]["score"]["total"], [v[number] for v in models[name]["per_clip"].values()]
            scale = total["upper"] - total["chance"]
            assert note["score"] == pytest.approx((np.mean(measured) - total["chance"]) / scale)
    for value, text in page.numbers:
        digits = len(text.partition(".")[2])
        assert digits and abs(float(text) - value) <= 0.5001 * 10**-digits
    for summary in models["finetuned"]["score"].values():
        scale = summary["upper"] - summary["chance"]
        low, high = ((summary[end] - summary["chance"]) / scale for end in ("low", "high"))
        assert f"{low:.3f} to {high:.3f}" in page.text
    assert f"4 of 6 attention layers rebuilt, {100 * (1 - plan['share_of_teacher']):.1f}% less" in page.text


def test_a_change_within_the_noise_is_called_so(config, workdir):
    """By the interval of the mean of paired differences, against that of the normal distribution."""
    path = workdir / "evaluation" / "evaluation.json"
    evaluation, rng = read(path), np.random.default_rng(5)
    evaluation["models"] = {name: evaluation["models"][name] for name in ("distilled", "finetuned")}
    before = rng.uniform(0.2, 0.8, 40)
    for shift, noise in ((0.01, True), (0.1, False)):
        change = shift + 0.1 * rng.standard_normal(40)
        for name, values in (("distilled", before), ("finetuned", before + change)):
            evaluation["models"][name]["per_clip"] = {"shape": values.tolist()}
        (found,) = compared(evaluation, [("distilled", "finetuned")])
        total = evaluation["models"]["finetuned"]["score"]["total"]
        scale, error = total["upper"] - total["chance"], change.std(ddof=1) / 40**0.5
        assert found["measure"] == "score" and found["noise"] == noise
        assert found["difference"] == pytest.approx(change.mean() / scale)
        for end, sign in (("low", -1), ("high", 1)):
            assert found[end] == pytest.approx((change.mean() + sign * 1.96 * error) / scale, abs=0.25 * error / scale)
        write(path, evaluation | {"prompts": evaluation["prompts"] * 8})
        evaluation_page = report(config, workdir).text
        assert ("that is within the noise" in evaluation_page) == noise

    for model in evaluation["models"].values():
        model.pop("per_clip"), model.pop("score")
    (found,) = compared(evaluation, [("distilled", "finetuned")])
    apart = np.subtract(*(evaluation["models"][name]["latent_rmse"] for name in ("finetuned", "distilled")))
    assert found["measure"] == "distance" and found["difference"] == pytest.approx(apart.mean())
    assert compared({"models": {"teacher": {}}}, [("teacher", "finetuned")]) == []


def test_the_page_tells_how_it_was_made_and_what_a_step_took(config, workdir):
    assert "The stages took" not in report(config, workdir).text
    write_made_by(workdir)
    text = report(config, workdir).text
    assert "jsurgery surgery --config=tiny" in text and "On AMD EPYC, 2 threads. The stages took 22m10s" in text
    assert "ended on 2026-11-29, 17:26 UTC" in text and "5m10s, since it was resumed" in text
    assert "150.0%" in text and "1.250 s a clip, the teacher 0.500 s" in text and "scatter of what" not in text
    write(workdir / "plan" / "stage.json", {"complete": True, "made_by": {"command": 1}})
    other = read(workdir / "evaluation" / "speed" / "teacher.json")
    write(workdir / "evaluation" / "speed" / "teacher.json", other | {"high": 5.0})
    text = report(config, workdir).text
    assert "The stages took 20m00s" in text and "within the scatter of what was measured" in text
    write(workdir / "evaluation" / "speed" / "teacher.json", other)
    write(workdir / "evaluation" / "speed" / "distilled.json", other | {"seconds": 8.0})  # computes like the last model
    assert "within the scatter of what was measured" in report(config, workdir).text
    write(workdir / "evaluation" / "speed" / "teacher.json", other | {"machine": "another"})
    assert "a clip, the teacher" not in report(config, workdir).text, "times of two machines are not compared"


@pytest.mark.parametrize("rates, rate, kept", [(PLAN, 8, 75), (["linear", "linear", 2, 1, 1, 1], "linear", 0)])
def test_the_diagram_draws_the_tokens_that_keep_softmax(config, rates, rate, kept):
    found = attention_diagram(config, MODEL, rates)
    assert (found["rate"], found["tokens"], found["kept"]) == (rate, 600, kept)
    kinds = re.findall(r'class="(\w+)"', found["frame"])
    expected = [kept > 0 and token % 8 == 0 for token in range(120)]  # the first frame: 12 x 10 tokens
    assert [kind == "kept" for kind in kinds] == expected
    (width,) = re.findall(r'class="kept" x="0" y="0" width="([\d.]+)"', found["hybrid"])
    assert float(width) == pytest.approx(120 * kept / 600)
    assert attention_diagram(config, MODEL, [1] * 6) is None


def test_the_diagram_of_chunks_draws_what_each_chunk_sees(config):
    """Five frames in chunks of two: side 120, 24 for each frame."""
    found = attention_diagram(config, MODEL, ["C2O1", "C2O1", 8, 1, 1, 1])
    assert (found["rate"], found["frame"], found["kept"]) == ("C2O1", None, 600 * (2 * 2 + 2 * 3 + 1 * 2) // 25)
    box = r'class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"'
    boxes = {(kind, *(float(side) / 24 for side in sides)) for kind, *sides in re.findall(box, found["hybrid"])}
    kept = {("kept", 0, 0, 2, 2), ("kept", 1, 2, 3, 2), ("kept", 3, 4, 2, 1)}
    assert boxes == kept | {("summed", 0, 2, 1, 2), ("summed", 0, 4, 3, 1)}


@pytest.mark.parametrize(
    "rates, sentence",
    [  # the published savings of 15R2 and 20R8, for 30 blocks at 480 x 832, 81 frames
        ([1, 2] * 3, "less attention work on Wan2.1 1.3B23.8%Computed, not measured"),
        ([8, 8, 1] * 2, "81 frames. Of the whole model: 39.4% less."),
    ],
)
def test_savings_on_the_full_model_are_those_published(config, workdir, rates, sentence):
    plan = read(workdir / "plan" / "plan.json")
    write(workdir / "plan" / "plan.json", plan | {"rates": rates})
    text = report(config, workdir).text
    assert sentence in re.sub(r"\s*\n\s*", "", text)


def test_marked_cells_are_the_plan(config, workdir):
    write_report(config, workdir)
    text = (workdir / "report.html").read_text()
    table = text[text.index('<table class="heat">') : text.index("</table>", text.index('<table class="heat">'))]
    rows = [re.findall(r"<td( class=.chosen.)? style", row) for row in table.split("<tr>")[2:]]
    chosen = {
        block: rate for rate, row in zip([1, *RATES], rows, strict=True) for block, mark in enumerate(row) if mark
    }
    assert [chosen[block] for block in range(6)] == PLAN and sum(map(bool, chain.from_iterable(rows))) == 6


def test_tooltips_of_cells_show_all_measurements(config, workdir):
    write_report(config, workdir)
    found = read(workdir / "distill" / "errors.json")
    tips = re.findall(r'data-tip="(Block \d+, [^"]*)"', (workdir / "report.html").read_text().replace("&#10;", "\n"))
    tip = next(tip for tip in tips if tip.startswith("Block 3, R8, chosen\n"))
    numbers = [found[name][3][2] for name in ("errors", "initial_errors", "softmax_share", "teacher_softmax_share")]
    shown = [float(value) for value in re.findall(r"\d\.\d+", tip)]
    assert shown == [round(numbers[0], 4), round(numbers[1], 4), round(numbers[2], 3), round(numbers[3], 3)]


ALL = {"clips", "scores", "plan", "errors", "training", "flops", "config"}


@pytest.mark.parametrize(
    "missing, left_out, messages",
    [
        ((), set(), []),
        (("evaluation",), {"clips", "scores"}, ["evaluation.json is not there; `jsurgery evaluate` has not begun"]),
        (
            ("evaluation/evaluation.json",),
            {"scores"},
            ["Scores and distances: evaluation/evaluation.json is not there"],
        ),
        (("evaluation/videos",), {"clips"}, ["The clips: no file in evaluation/videos can be read."]),
        (("evaluation/videos/distilled/0001.mp4",), set(), ["missing or cannot be read: distilled/0001.mp4."]),
        (("plan",), {"plan", "flops"}, ["The plan and what it saves: plan/plan.json is not there"]),
        (("distill/errors.json",), {"errors"}, ["The errors of the blocks and the trade-off with cost"]),
        (
            ("distill", "finetune"),
            {"errors", "training"},
            ["The curves of the distillation", "The curves of the fine-"],
        ),
        (("finetune",), set(), ["`jsurgery finetune` has not begun"]),
        (("config.json", "evaluation", "plan", "distill", "finetune"), ALL - {"config"}, ["The plan", "Scores"]),
    ],
)
def test_missing_files_are_named_and_the_other_sections_shown(config, workdir, missing, left_out, messages):
    for name in missing:
        shutil.rmtree(workdir / name) if (workdir / name).is_dir() else (workdir / name).unlink()
    page = report(config, workdir)
    assert page.sections == ALL - left_out
    assert {a[1:] for a in page.addresses if a.startswith("#")} == page.sections
    assert ("What this page lacks" in page.text) == bool(missing)
    assert [text for text in messages if text not in page.text] == []


def test_unfinished_stages_and_damaged_files_are_named(config, workdir):
    (workdir / "evaluation" / "evaluation.json").write_text('{"prompts": ["a')
    (workdir / "plan" / "plan.json").unlink()
    write(workdir / "plan" / "stage.json", {"complete": False})
    (workdir / "evaluation" / "videos" / "finetuned" / "0000.mp4").write_bytes(b"no video")
    with (workdir / "finetune" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 310, "lo')  # as while a run writes it
    page = report(config, workdir)
    assert page.sections == {"clips", "errors", "training", "config"}
    assert "`jsurgery plan` has not ended" in page.text and "evaluation/evaluation.json cannot be read" in page.text
    assert "finetuned/0000.mp4" in page.text
    assert [row["models"] for row in page.rows] == [list(MODELS[:3]), list(MODELS)]
    assert page.rows[0]["prompt"].startswith("a ")  # from the config, as there is no evaluation


def test_an_unfinished_run_shows_its_remaining_commands_and_first_frame(config, workdir):
    prompt, frame = "a red ‹circle› & more", np.random.default_rng(0).integers(0, 256, (32, 24, 3), np.uint8)
    write_first_frame(epath.Path(workdir), frame, prompt)
    finished = write_report(config, workdir).read_text()
    assert prompt not in finished and 'http-equiv="refresh"' not in finished
    (workdir / "comparison.gif").unlink()
    write_report(config, workdir, coming=("finetune", "evaluate", "report"))
    page = Page((workdir / "report.html").read_text())
    assert page.sections == ALL - {"clips"} and "What this page lacks" not in page.text
    assert "Still to come" in page.text and prompt in page.text
    assert not (workdir / "comparison.gif").exists(), "only the final page makes clips"
    html = (workdir / "report.html").read_text()
    assert 'http-equiv="refresh"' in html
    (picture,) = re.findall(r"data:image/png;base64,([^\"]+)", html)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))), frame)
    last = write_report(config, workdir).read_text()
    assert 'http-equiv="refresh"' not in last and Page(last).text == Page(finished).text, "differs from finished"


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_a_damaged_first_frame_is_left_out(config, workdir, content):
    (workdir / "first_frame.png").write_bytes(content)
    write_report(config, workdir, coming=("evaluate", "report"))
    assert "<img" not in (workdir / "report.html").read_text()


def test_summary_lines_of_a_surgery(config, workdir):
    (workdir / "model").mkdir()
    write(workdir / "model" / "config.json", MODEL.to_json())
    run = read_run(workdir, config)
    run.evaluation["prompts"][0] = "a man’s 'hat'"
    done, look, then = result_lines(run, "jsurgery")
    share, models = 1 - run.plan["share_of_teacher"], run.evaluation["models"]
    assert done.startswith(f"done: 4 of 6 attention layers rebuilt, {share:.0%} less attention work; score ")
    for name in ("teacher", "finetuned", "not_distilled"):
        assert f"{models[name]['score']['total']['normalized']:.2f}" in done
    assert str(workdir / "report.html") in look
    assert shlex.split(then.removeprefix("next: "))[1:4] == [
        "sample", f"--model={workdir / 'model'}", f"--prompt={run.prompts[0]}"
    ]  # fmt: skip

    for model in models.values():
        model.pop("score")
    assert "validation loss" in result_lines(run, "jsurgery")[0]
    run.plan = run.evaluation = None
    assert [line.partition(":")[0] for line in result_lines(run, "jsurgery")] == ["look", "next"]


def test_files_with_wrong_content_are_named(config, workdir):
    write(workdir / "plan" / "plan.json", {"rates": [1, "fast"]})
    write(workdir / "distill" / "errors.json", ["errors"])
    page = report(config, workdir)
    assert page.sections == ALL - {"plan", "errors", "flops"}
    assert "plan/plan.json cannot be read" in page.text and "'fast'" in page.text
    assert "distill/errors.json cannot be read" in page.text


def test_an_empty_folder_and_a_config_of_another_version(workdir, config, tmp_path):
    (tmp_path / "empty").mkdir()
    page = report(None, tmp_path / "empty")
    assert page.sections == {"config"} and "config.json is not there" in page.text and "no plan yet" in page.text
    with pytest.raises(InputError, match="expected the folder of a run"):
        write_report(None, tmp_path / "nowhere")

    write(workdir / "config.json", read(workdir / "config.json") | {"model.remat": False, "gone": 1})
    page = report(None, workdir)
    assert page.sections == ALL and "model.remat: False is of another version" in page.text
    assert read_run(workdir).config.hybrid.rates == config.hybrid.rates


def test_a_missing_model_leaves_out_flops(workdir, config, tmp_path):
    shutil.rmtree(tmp_path / "teacher")
    page = report(config, workdir)
    assert page.sections == ALL - {"flops"} and "Counted FLOPs need the sizes of the model" in page.text
    write(workdir / "model" / "config.json", MODEL.to_json())
    assert report(config, workdir).sections == ALL


def test_the_command_takes_the_config_of_the_run(workdir, tmp_path, capsys):
    shutil.rmtree(workdir / "evaluation")
    assert main(["report", f"--workdir={workdir}"]) == 0
    assert capsys.readouterr().out.strip() == str(workdir / "report.html")
    assert "17 frames" in (workdir / "report.html").read_text()
    for arguments in ([], [f"--workdir={tmp_path / 'no'}"], [f"--workdir={workdir}", "--output=x.html"]):
        assert main(["report", *arguments]) == 2


def test_parity_of_exports(config, workdir):
    rows = [
        {"part": part, "format": format, "precision": precision, "relative_error": error, "max_error": 1.0}
        | {"bound": 1e-3, "passed": error is not None and error <= 1e-3}
        for format, precision in (("tflite", "fp16"), ("onnx", "float32"))
        for part, error in (("text_encoder", 2e-4), ("block_0", 7e-4), ("all", 9e-4))
    ]
    rows[4] |= {"relative_error": None, "passed": False}
    write(workdir / "export" / "parity.json", rows)
    found = parity(rows)
    assert [(row["format"], row["part"], row["parts"], row["over"]) for row in found] == [
        ("onnx", "block_0", 2, 1),
        ("onnx", "all", 1, 0),
        ("tflite", "block_0", 2, 0),
        ("tflite", "all", 1, 0),
    ]
    page = report(config, workdir)
    assert page.sections == ALL | {"exports"}
    assert "1 over the bound" in page.text and "7.0e−04" in page.text


def test_fidelity_to_the_teacher(config, workdir):
    (workdir / "fidelity").mkdir()  # as when the command has begun
    page = report(config, workdir)
    assert page.sections == ALL and "`jsurgery evaluate fidelity` has not ended" in page.text
    write_fidelity(workdir)
    page = report(config, workdir)
    assert page.sections == ALL | {"fidelity"} and "What this page lacks" not in page.text
    text = re.sub(r"\s+", " ", page.text[page.text.index("How close the clips") : page.text.index("The plan:")])
    assert "9 frames, 1.1 s" in text and "17 frames, 2.1 s" in text and "LPIPS" not in text
    for row in ("Distilled∞1.00000.00000.502.501.25", "Fine-tuned23.440.81250.21880.502.501.25",
                "Teacher, other noise14.060.5000–0.502.501.25", "Teacher––––2.251.50"):  # fmt: skip
        assert text.count(row) == 2, row
    assert "SSIM by frame, clips of 17" in text and "SSIM over the frames of a clip" in text
    for value in (23.4375, 0.21875, 14.0625):
        assert value in page.values

    write_fidelity(workdir, durations=(9,))
    assert "SSIM over the frames" not in report(config, workdir).text


def test_the_slider_has_the_optimal_plan_of_every_budget(config, workdir):
    write_report(config, workdir)
    run = read_run(workdir, config)
    data, chart = pareto_slider.trade_off(run)
    assert data["whole"] and {line.label for line in chart.lines} >= {"the front", "the chosen plan", "R8 alone"}
    rates = [*config.plan.rates]
    costs = block_costs(config, MODEL)
    errors = np.insert(np.array(run.errors["velocity_errors"]), 0, 0.0, axis=1)
    of_rates = np.stack([costs.at(rate) for rate in rates], axis=1)
    for budget in np.linspace(data["shares"][0], 1, 23):
        best = solve(errors, of_rates, budget * costs.teacher * (1 + 1e-12))
        index = np.searchsorted(data["shares"], budget * (1 + 1e-9), side="right") - 1
        assert data["errors"][index] == pytest.approx(best.error, rel=1e-9)
        assert [data["rates"][i] for i in data["plans"][index]] == [
            {1: "softmax", "linear": "linear"}.get(rates[i], f"R{rates[i]}") for i in best.indices
        ]


def test_a_front_that_is_too_large_is_replaced_by_plans_for_some_budgets(config, workdir, monkeypatch):
    run = read_run(workdir, config)
    whole, _ = pareto_slider.trade_off(run)

    def too_large(errors, costs):
        raise InputError("more than 1000000 partial plans")

    monkeypatch.setattr(pareto_slider, "pareto_front", too_large)
    monkeypatch.setattr(pareto_slider, "BUDGETS", 7)
    thin, _ = pareto_slider.trade_off(run)
    assert not thin["whole"] and len(thin["plans"]) == 7
    for share, error in zip(thin["shares"], thin["errors"], strict=True):
        assert whole["errors"][np.searchsorted(whole["shares"], share * (1 - 1e-9))] == pytest.approx(error)
    monkeypatch.undo()
    monkeypatch.setattr(pareto_slider, "PLANS", 5)
    thin, _ = pareto_slider.trade_off(run)
    assert not thin["whole"] and len(thin["plans"]) == 5 and thin["shares"][-1] == whole["shares"][-1]


def test_every_result_of_a_tiny_model_is_labelled(config, workdir):
    text = report(config, workdir).text
    assert "not results of Wan2.1 1.3B" in text.replace("\n", "")
    assert text.count("tiny model, procedural clips") == 4


def test_a_run_on_wan_at_full_size(config, workdir, tmp_path):
    """The report has no label "tiny", no table of computed savings, and no scores, as the prompts are not sprites."""
    write(tmp_path / "teacher" / "config.json", WanConfig().to_json())
    config.prompts = "prompts.txt"
    config.video.frames, config.video.height, config.video.width = 81, 480, 832
    evaluation = read(workdir / "evaluation" / "evaluation.json")
    evaluation["models"] = {name: {"latent_rmse": model["latent_rmse"]} for name, model in evaluation["models"].items()}
    write(workdir / "evaluation" / "evaluation.json", evaluation)
    page = report(config, workdir)
    assert page.sections == ALL
    assert "tiny" not in page.text and "not measured" not in page.text and "real clips" not in page.text
    assert "Attention surgery on Wan2.1 1.3B" in page.text


def test_a_fine_tuned_teacher_is_called_so(config, workdir):
    assert "Teacher, fine-tuned" not in report(config, workdir).text
    config.finetune.subject = "teacher"
    assert "Teacher, fine-tuned" in report(config, workdir).text


def test_the_page_shows_all_config_fields_and_versions(config, workdir):
    text = report(config, workdir).text
    for field, value in flatten(config):
        assert f"{field}{value}" in text.replace("\n", "")
    assert f"jax {version('jax')}" in text and f"flax {version('flax')}" in text


def test_a_second_report_replaces_the_first(config, workdir):
    (workdir / "report.html").write_text("old")
    assert "Made with" in report(config, workdir).text
    assert not list(workdir.glob("*.tmp"))


def test_large_clips_are_compressed_or_left_out(config, workdir, monkeypatch):
    rng = np.random.default_rng(0)
    folder = workdir / "evaluation" / "videos"
    for name in MODELS:
        for i in range(3):
            write_video(folder / name / f"{i:04d}.mp4", rng.integers(0, 256, (9, 64, 96, 3), np.uint8), fps=8)
    full = sum(file.stat().st_size for file in folder.rglob("*.mp4"))
    monkeypatch.setattr(video_player, "PAGE_BYTES", full // 4)
    monkeypatch.setattr(video_player, "PROMPT_BYTES", full // 10)
    page = report(config, workdir)
    sizes = [len(video) for name, video in page.data.items() if name.startswith("video-")]
    assert len(sizes) == 2  # three prompts would leave too few bytes for each
    assert sum(sizes) <= 4 / 3 * (full // 4) + 8
    assert "2 of 5 prompts are shown" in page.text
    assert [len(video) for video in page.videos] == [9, 9] and page.rows[0]["fps"] == 8


def test_the_size_of_a_page_is_bounded(config, workdir):
    assert 4 / 3 * video_player.PAGE_BYTES < 14e6  # base64 adds a third
    write_report(config, workdir)
    assert (workdir / "report.html").stat().st_size < 400_000


def test_line_chart_of_exponential_growth_is_logarithmic():
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


def test_running_mean_ignores_nan():
    values = np.random.default_rng(0).uniform(size=100)
    values[40] = np.nan
    width = 2 * (100 // 24) + 1
    found = running_mean(values)
    for i in (0, 3, 39, 41, 99):
        window = values[max(0, i - width // 2) : i + width // 2 + 1]
        assert found[i] == pytest.approx(np.nanmean(window))
    assert np.isnan(found[40])


def test_ticks_are_round_numbers():
    assert linear_ticks(3, 98) == [20.0, 40.0, 60.0, 80.0]
    assert linear_ticks(10, 400) == [100.0, 200.0, 300.0, 400.0]
    assert linear_ticks(-0.11, 0.32) == [-0.1, 0.0, 0.1, 0.2, 0.3]
    assert linear_ticks(0, 4.1) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert log_ticks(0.03, 0.9) == [0.05, 0.1, 0.2, 0.5]
    assert log_ticks(1e-6, 10) == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]
