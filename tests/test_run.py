"""The commands end to end, on a random model: every stage writes its files, and a second run skips all stages."""

import json
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from jsurgery.cli import main
from jsurgery.wan.checkpoint import load_transformer
from tests import documents
from tests.faults.fake_gcs import empty_bucket, served

SIZES = {
    "video.frames": 5, "video.height": 64, "video.width": 48, "sampler.steps": 3, "trace.prompts": 3,
    "trace.holdout": 1,
    "trace.keep_steps": 2, "trace.batch": 2, "hybrid.rates": '(2, "linear")', "plan.rates": '(2, "linear")',
    "plan.budget": "2R2", "distill.steps": 4, "finetune.steps": 2, "finetune.batch": 2, "data.clips": 4,
    "evaluate.prompts": 2, "evaluate.batch": 2, "evaluate.validation_clips": 8, "evaluate.videos": 1, "log_every": 1,
    "profile": 1,
}  # fmt: skip
ODD = "a b#c%20d?é'[1]:x"  # the name of a workdir, as people have them: no library may read more into it
STAGES = ("trace", "distill", "plan", "hybrid", "latents", "finetune", "evaluation", "report")


@pytest.fixture(scope="module")
def surgery(tiny_pipeline, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / ODD
    arguments = [f"--config.{field}={value}" for field, value in SIZES.items()]
    arguments += [f"--config.model.path={tiny_pipeline}", "--config=tiny", f"--workdir={workdir}"]
    assert main(["surgery", *arguments]) == 0
    return workdir, arguments


def test_every_stage_writes_its_files(surgery):
    workdir, _ = surgery
    assert all(json.loads((workdir / stage / "stage.json").read_text())["complete"] for stage in STAGES)
    errors = json.loads((workdir / "distill" / "errors.json").read_text())
    assert np.shape(errors["errors"]) == (2, 2) and np.isfinite(errors["errors"]).all()
    plan = json.loads((workdir / "plan" / "plan.json").read_text())
    assert len(plan["rates"]) == 2 and plan["cost_flops"] <= plan["budget_flops"]
    assert load_transformer(workdir / "model").config.rates == tuple(plan["rates"])
    evaluation = json.loads((workdir / "evaluation" / "evaluation.json").read_text())["models"]
    assert list(evaluation) == ["teacher", "not_distilled", "distilled", "finetuned"]
    assert evaluation["teacher"]["latent_rmse"] == [0, 0]
    assert all(min(evaluation[name]["latent_rmse"]) > 0 for name in list(evaluation)[1:])
    assert (workdir / "report.html").stat().st_size > 10_000
    with Image.open(workdir / "first_frame.png") as frame:
        assert frame.size == (48, 64) and frame.info["prompt"].startswith("a ")
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 2, "expected those of distill and finetune"


def test_plan_front_writes_the_pareto_front(surgery, capsys):
    workdir, arguments = surgery
    assert main(["plan", "--front", *arguments]) == 0
    found = json.loads((workdir / "plan" / "front.json").read_text())
    plan = json.loads((workdir / "plan" / "plan.json").read_text())
    assert found["chosen"]["rates"] == plan["rates"] and found["chosen"]["proven_optimal"]
    assert plan["rates"] in [one["rates"] for one in found["plans"]]
    out = capsys.readouterr().out
    assert "chosen" in out and "proven optimal" in out
    assert "The Pareto front" in (workdir / "plan" / "front.html").read_text()


def test_running_again_skips_all_stages(surgery, capsys):
    workdir, arguments = surgery
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != "config.json"}
    assert main(["surgery", *arguments]) == 0
    output = capsys.readouterr()
    assert output.err.count("skipped") == len(STAGES)
    assert output.out.strip() == str(workdir / "report.html")
    *_, done, look, then = output.err.splitlines()
    assert done.startswith("done: 2 of 2 attention layers rebuilt") and "score" in done
    assert str(workdir / "report.html") in look and f"sample --model={shlex.quote(str(workdir / 'model'))}" in then
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != "config.json"}
    assert {path for path in before if before[path] != after.get(path)} <= {workdir}


def test_another_config_is_refused_without_changes(surgery, capsys):
    workdir, arguments = surgery
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert main(["distill", *arguments, "--config.distill.steps=5"]) == 2
    message = capsys.readouterr().err
    assert "distill.steps was 4, is 5" in message and len(message.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_stage_before_its_inputs_is_refused(tiny_pipeline, tmp_path, capsys):
    arguments = [f"--config.{field}={value}" for field, value in SIZES.items()]
    assert main(["plan", *arguments, f"--config.model.path={tiny_pipeline}", f"--workdir={tmp_path / 'new'}"]) == 2
    assert "run that stage first" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_surgery_in_a_bucket_leaves_the_same_files(surgery, monkeypatch, capsys):
    workdir, arguments = surgery
    store, arguments = empty_bucket(monkeypatch), [*arguments, "--workdir=gs://bucket/run", "--config.profile=0"]
    with served(store):
        assert main(["surgery", *arguments]) == 0
        capsys.readouterr()
        assert main(["surgery", *arguments]) == 0
    assert capsys.readouterr().err.count("skipped") == len(STAGES)
    apart = {"tensorboard", "profile", "checkpoints", "config.json", "front.json", "front.html"}
    files = [path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()]
    files = {str(path): (workdir / path).read_bytes() for path in files if not apart & set(path.parts)}
    found = {name.removeprefix("bucket/run/"): content for name, content in store.objects.items()}
    assert {name for name in found if not apart & set(name.split("/"))} == set(files)
    for name in files:
        if name.endswith("/stage.json"):
            one, other = (json.loads(content) for content in (found[name], files[name]))
            assert one.pop("made_by")["seconds"] >= 0 and other.pop("made_by") and one == other, name
        elif "/speed/" not in name and name.endswith((".json", ".jsonl", ".safetensors", ".npy", ".array_record")):
            assert found[name] == files[name], name


def test_sample_writes_a_video(surgery, tmp_path):
    workdir, arguments = surgery
    config = [argument for argument in arguments if not argument.startswith("--workdir")]
    output = tmp_path / "clip.gif"
    prompt = "--prompt=a red circle moves left over a grey background"
    assert main(["sample", *config, f"--model={workdir / 'model'}", prompt, f"--output={output}"]) == 0
    assert output.read_bytes()[:3] == b"GIF"


@pytest.fixture(scope="module")
def beside_documents(surgery, tmp_path_factory):
    """A folder with the files that the commands of README.md and docs/ name; runs/demo and runs/wan are a copy of the
    run."""
    workdir, _ = surgery
    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(workdir, folder / "runs" / "demo")
    (folder / "runs" / "wan").symlink_to("demo")
    for copy, model in (("vbench/videos", "finetuned"), ("teacher/videos", "teacher")):
        shutil.copytree(workdir / "evaluation" / "videos" / model, folder / "runs" / copy)
    for name in ("prompts.txt", "all_dimension_aug_wanx.txt"):
        (folder / name).write_text("".join(f"a red circle moves left, take {i}\n" for i in range(600)))
    (folder / "few_prompts.txt").write_text("a red circle moves left\n")
    suite = [{"prompt_en": f"prompt {i}", "dimension": ["color"]} for i in range(600)]
    (folder / "VBench_full_info.json").write_text(json.dumps(suite))
    for page, file in (("your_plan", "costs.json"), ("your_videos", "clips.jsonl")):
        blocks = documents.BLOCK.findall((documents.ROOT / "docs" / "guides" / f"{page}.md").read_text())
        (folder / file).write_text(dict(blocks)["json"])
    for name in ("clips/0001.mp4", "clips/0001.txt", "cats/0001.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("a cat")
    return folder


@pytest.mark.parametrize("line", documents.here(), ids=str)
def test_a_documented_command_runs(line, beside_documents, tiny_pipeline, monkeypatch, capsys):
    """On the run of this file, in the order of the pages; commands for real weights as dry runs."""
    monkeypatch.chdir(beside_documents)
    if line.words[0] == "mkdir":
        subprocess.run(
            " ".join(word if word == "&&" else shlex.quote(word) for word in line.words), shell=True, check=True
        )
        return
    if documents.way(line) == "dry run":
        assert main(documents.dry(line.arguments)) == 0
        assert json.loads((beside_documents / "dry.json").read_text())["phases"]
        return
    fields = [f"--config.{field}={value}" for field, value in SIZES.items()]
    assert main(documents.small(line.arguments, fields, tiny_pipeline)) == 0
    skipped = capsys.readouterr().err.count("up to date, skipped")
    assert skipped == (2 if "--config.plan.budget=0.6" in line.words else 1 if "--front" in line.words else 0)
    for word in line.words:
        flag, _, path = word.partition("=")
        if flag in ("--workdir", "--output", "--figure"):
            assert (
                any((beside_documents / path).iterdir()) if flag == "--workdir" else (beside_documents / path).exists()
            )
