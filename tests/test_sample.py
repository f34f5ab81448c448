"""`jsurgery sample`: files and the settings stored in them, resuming, defaults, and bad arguments."""

import json
import shutil

import av
import numpy as np
import pytest

from jsurgery import sample
from jsurgery.cli import main, parse
from jsurgery.data.video_writer import read_settings, write_video
from jsurgery.errors import InputError
from jsurgery.load_config import load_config
from jsurgery.sample import sampling_config
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_folder import model_path

PROMPTS = ("a red circle", "a blue square", "a green triangle")
SIZE = ["--frames=5", "--height=32", "--width=48", "--steps=2"]


@pytest.fixture
def prompts_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n")
    return file


def frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


def nearly_equal(one, other):
    """Allows for x264, which does not always encode equal frames equally."""
    return np.abs(one - other).mean() < 3


def test_sampling_a_file_of_prompts_and_resuming(tmp_path, tiny_pipeline, prompts_file, capsys):
    videos = tmp_path / "videos"
    command = ["sample", f"--model={tiny_pipeline}", f"--prompts_file={prompts_file}", f"--output={videos}", *SIZE]
    assert main(command) == 0
    files = [videos / f"000{number}.mp4" for number in range(3)]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    first = [frames(file) for file in files]
    assert first[0].shape == (5, 32, 48, 3) and np.abs(first[0] - first[1]).mean() > 20
    stored = [read_settings(file) for file in files]
    assert [(s["prompt"], s["number"], s["seed"]) for s in stored] == [(p, n, 0) for n, p in enumerate(PROMPTS)]
    assert (stored[0]["steps"], stored[0]["solver"], stored[0]["shift"], stored[0]["width"]) == (2, "unipc", 3.0, 48)

    files[1].unlink()
    (videos / ".0001.mp4.mp4").write_bytes(b"left by a run that was killed")
    written = {number: files[number].stat().st_mtime_ns for number in (0, 2)}
    assert main(command) == 0
    output = capsys.readouterr()
    assert output.out.split() == [str(files[1])] and "2 of 3" in output.err and "sample 2/3: 2/2" in output.err
    assert written == {number: files[number].stat().st_mtime_ns for number in (0, 2)}
    assert nearly_equal(frames(files[1]), first[1])
    assert sorted(videos.iterdir()) == files

    assert main([*command, "--seed=1"]) == 2
    message = capsys.readouterr().err
    assert "0000.mp4" in message and "seed was 0, is 1" in message

    alone = tmp_path / "alone.mp4"
    assert main(["sample", f"--model={tiny_pipeline}", f"--prompt={PROMPTS[0]}", f"--output={alone}", *SIZE]) == 0
    assert nearly_equal(frames(alone), first[0])


@pytest.mark.parametrize(
    "name",
    [
        "12:30.mp4",
        'a b\'s "c".gif',
        "100%d.mp4",
        "-x.mp4",
        "зима 冬.mp4",
        "file:a.mp4",
        "~.png",
        "n" * 251 + ".mp4",
    ],
)
def test_files_of_any_name_are_written(tmp_path, monkeypatch, name):
    video = np.random.default_rng(0).integers(0, 255, (2, 32, 48, 3), np.uint8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "unfinished", lambda config, requests, again: requests)

    def make_videos(config, requests):
        (request,) = requests
        write_video(request.file, video, 16, {"prompt": "x"})
        yield request.file

    monkeypatch.setattr(sample, "make_videos", make_videos)
    assert main(["sample", "--prompt=x", f"--output={name}"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == [name] and read_settings(name) == {"prompt": "x"}


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, tiny_pipeline):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("x\n")
    given = ["sample", "--model=~/model", "--prompts_file=~/p.txt", "--output", "~/o"]
    options, overrides = parse([*given, "--config.data.path=~/d", "--negative_prompt=~/n"])
    assert overrides == {"data.path": f"{tmp_path}/d"} and options.negative_prompt == "~/n"
    expected = tuple(f"{tmp_path}/{name}" for name in ("model", "o", "p.txt"))
    assert (options.model, options.output, options.prompts_file) == expected
    lines = ["def get_config():", "    c = base()", "    c.model.path = '~/m'", "    return c", ""]
    (tmp_path / "mine.py").write_text("\n".join(["from jsurgery.config import base", "", *lines]))
    assert load_config("mine.py").model.path == f"{tmp_path}/m"
    (tmp_path / "tiny").symlink_to(tiny_pipeline)
    assert model_path("~/tiny") == tmp_path / "tiny"


def test_the_model_is_not_loaded_if_all_videos_exist(tmp_path, tiny_pipeline, prompts_file, monkeypatch, capsys):
    prompts_file.write_text(PROMPTS[0])
    command = ["sample", f"--model={tiny_pipeline}", f"--prompts_file={prompts_file}", *SIZE, f"--output={tmp_path}"]
    assert main(command) == 0
    monkeypatch.setattr(sample, "configured_pipeline", None)
    assert main(command) == 0
    assert "1 of 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--frames=16"], ["config.video.frames", "4k + 1", "13 and 17"]),
        (["--frames=many"], ["config.video.frames", "int", "'many'"]),
        (["--height=100"], ["config.video.height", "96 and 112"]),
        (["--width=100"], ["config.video.width"]),
        (["--width=32000"], ["width axis", "2000", "1024"]),
        (["--solver=heun"], ["config.sampler.solver", "unipc", "'heun'"]),
        (["--steps=0"], ["config.sampler.steps", "positive"]),
        (["--shift=-1"], ["config.sampler.shift", "positive"]),
        (["--guidance=nan"], ["config.sampler.guidance"]),
        (["--seed=-1"], ["config.seed"]),
        ([f"--seed={2**32}"], ["config.seed", "2^32"]),
        (["--model=no/such/model"], ["no/such/model", "no such folder"]),
        (["--prompt= "], ["--prompt", "empty"]),
        (["--prompts_file=prompts.txt"], ["--prompts_file", "not allowed with"]),
        (["--output=out.webm"], ["--output=out.webm", ".mp4"]),
        (["--output=."], ["--output=.", ".mp4"]),
    ],
)
def test_bad_arguments_are_refused_early(tmp_path, tiny_pipeline, monkeypatch, capsys, arguments, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "configured_pipeline", None)
    assert main(["sample", f"--model={tiny_pipeline}", "--prompt=a red circle", *arguments]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and all(part in message for part in parts), message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "output", "parts"),
    [
        (None, "videos", ["prompts.txt", "No such file"]),
        (b"", "videos", ["prompts.txt", "one prompt a line", "none"]),
        (b"\n  \n", "videos", ["prompts.txt", "none"]),
        (b"\xff\xfe\xff", "videos", ["prompts.txt", "UTF-8"]),
        (b"a red circle", "out.mp4", ["--output=out.mp4", "folder"]),
        (b"a red circle", "prompts.txt", ["--output=prompts.txt", "exists"]),
        (b"a red circle", "prompts.txt/videos", ["--output=prompts.txt/videos", "directory"]),
    ],
)
def test_bad_files_of_prompts_are_refused_early(tmp_path, tiny_pipeline, monkeypatch, capsys, content, output, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "configured_pipeline", None)
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    before = sorted(tmp_path.iterdir())
    assert main(["sample", f"--model={tiny_pipeline}", "--prompts_file=prompts.txt", f"--output={output}"]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and all(part in message for part in parts), message
    assert sorted(tmp_path.iterdir()) == before


def wan_folder(folder, config, scheduler):
    for part in ("transformer", "vae", "scheduler"):
        (folder / part).mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(config.to_json()))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return {"model.path": str(folder)}


UNIPC = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 5.0}


@pytest.mark.parametrize(
    ("scheduler", "solver", "shift", "remarks"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 5.0}, "unipc", 5.0, ["DPMSolverMultistep"]),
        ({"_class_name": "DDIMScheduler"}, "unipc", 3.0, ["'DDIMScheduler'"]),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 8}, "euler", 8.0, ["FlowMatchHeun"]),
        (UNIPC | {"solver_order": 3}, "unipc", 5.0, ["solver_order 3"]),
        (UNIPC | {"flow_shift": None}, "unipc", 3.0, ["shift None"]),
        (UNIPC | {"shift_terminal": 0.02}, "unipc", 5.0, ["shift_terminal 0.02"]),
        (UNIPC | {"final_sigmas_type": "sigma_min"}, "unipc", 5.0, ["final_sigmas_type 'sigma_min'"]),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True},
            "euler",
            3.0,
            ["use_dynamic_shifting True"],
        ),
        (UNIPC | {"use_flow_sigmas": True, "solver_order": None, "shift_terminal": None}, "unipc", 5.0, None),
    ],
)
def test_what_a_scheduler_says_and_ours_replaces(tmp_path, capsys, scheduler, solver, shift, remarks):
    model = wan_folder(tmp_path, WanConfig(), scheduler)
    config = sampling_config(None, model)
    assert (config.sampler.solver, config.sampler.shift) == (solver, shift)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (remarks is not None)
    if remarks:
        expected = [*remarks, "scheduler_config.json", f"replaced by solver {solver} with shift {shift:g}"]
        assert all(part in lines[0] for part in expected), lines
    sampling_config(None, model | {"sampler.solver": "unipc", "sampler.shift": "3"})
    assert not capsys.readouterr().err  # the user chose both


def test_a_field_that_a_newer_version_added_is_ignored_with_a_note(tmp_path, tiny_pipeline, monkeypatch, capsys):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    fields = json.loads((model / "vae" / "config.json").read_text())
    (model / "vae" / "config.json").write_text(json.dumps(fields | {"clip_output": False, "_name_or_path": "x"}))
    (model / "vae" / "hashes.json").unlink()
    monkeypatch.setattr(sample, "make_videos", lambda *_: iter(()))
    assert main(["sample", f"--model={model}", "--prompt=x", f"--output={tmp_path}/o.mp4", *SIZE]) == 0
    line, done = capsys.readouterr().err.splitlines()
    assert done.startswith("done: ")
    assert line == f"{model}/vae/config.json: clip_output = False: ignored, since jsurgery knows no such field"


def test_settings_follow_from_a_published_model(tmp_path, capsys):
    unipc = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0}
    model = wan_folder(tmp_path / "1.3b", WanConfig(), unipc)
    config = sampling_config(None, model)
    assert (config.video.frames, config.video.height, config.video.width, config.text_length) == (81, 480, 832, 512)
    assert (config.sampler.solver, config.sampler.shift, config.sampler.steps) == ("unipc", 5.0, 50)
    config = sampling_config(None, model | {"sampler.shift": "3", "sampler.solver": "euler", "sampler.steps": "4"})
    assert (config.sampler.solver, config.sampler.shift, config.sampler.steps) == ("euler", 3.0, 4)
    config = sampling_config("wan_1_3b_lowres", model)
    assert (config.video.height, config.sampler.shift) == (320, 3.0)

    large = WanConfig(num_attention_heads=40, num_layers=40)
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}
    config = sampling_config(None, wan_folder(tmp_path / "14b", large, euler))
    assert (config.text_length, config.sampler.solver, config.sampler.shift) == (512, "euler", 7.0)
    assert not capsys.readouterr().err
    with pytest.raises(InputError, match=r"scheduler_config.json: expected the config of a diffusers scheduler"):
        sampling_config(None, wan_folder(tmp_path / "broken", large, []))


def test_the_bundled_model_is_the_default(tiny_pipeline, tmp_path):
    config = sampling_config(None, {})
    assert (config.model.path, config.text_length, config.sampler.solver) == ("tiny_wan", 16, "unipc")
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    assert sampling_config(None, {"model.path": str(model)}).sampler.shift == 3.0
    shutil.rmtree(model / "scheduler")
    bare = sampling_config("tiny_evidence", {"model.path": str(model)})
    assert bare.sampler.solver == "euler" and sampling_config(None, {"model.path": str(model)}).sampler.steps == 8
