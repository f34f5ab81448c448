"""`evaluate vbench`: names, prompts, noise, shards and resuming, checked with the loaders of vbench and vbench2."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from jsurgery import sample
from jsurgery.cli import main
from jsurgery.data.video_writer import read_settings
from jsurgery.errors import InputError
from jsurgery.evaluate import vbench
from jsurgery.runtime import processes
from jsurgery.sample import sampling_config

SIZE = ["--frames=5", "--height=32", "--width=48", "--steps=1"]
PACKAGES = {"vbench": "0.1.5", "vbench2": "0.1.1"}
# Runs the loader of the package in another process. Imports that only its models need are mocked.
LOADER = """
import importlib.machinery, json, pathlib, sys
from unittest.mock import MagicMock
class Mock:
    def __init__(self, mocked):
        self.mocked = mocked
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if self.mocked(name.partition(".")[0]) else None
    def create_module(self, spec):
        return MagicMock(__path__=[])
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Mock(lambda name: name == "torch"))
sys.meta_path.append(Mock(lambda name: name != sys.argv[2]))
import torch.distributed
torch.distributed.is_initialized.return_value = False  # or no process would print warnings
sys.path.insert(0, sys.argv[1])
package = importlib.import_module(sys.argv[2])
loader = getattr(package, "VBench2" if sys.argv[2] == "vbench2" else "VBench")("cpu", sys.argv[3], sys.argv[4])
for folder, dimensions in json.loads(sys.argv[5]).items():
    path = loader.build_full_info_json(folder, "run", dimensions)
    names = [file.name for file in pathlib.Path(folder).iterdir()]
    prompts = {name: package.get_prompt_from_filename(name) for name in names}
    print(json.dumps({"entries": json.load(open(path)), "prompts": prompts}))
"""


@pytest.fixture(scope="module", params=PACKAGES)
def package(request):
    """(name, folder) of a released package, unpacked but not installed, as it pins an old numpy."""
    name, folder = request.param, request.config.cache.mkdir("vbench")
    if not (folder / name).exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += [f"--dest={folder}", f"{name}=={PACKAGES[name]}"]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(folder.glob(f"{name}-*.whl"))
        if done.returncode or not wheels:
            pytest.skip(f"NOT CHECKED against {name}'s own code, which pip cannot download here: {done.stderr[-300:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = wheel.namelist()
            wheel.extractall(folder, [n for n in names if re.fullmatch(rf"{name}/(cli/)?\w+\.(py|json)", n)])
    return name, folder


def load(package, info, scratch, folders):
    """What the package's loader finds in each folder of videos for the folder's dimensions, and its warnings."""
    name, path = package
    dimensions = json.dumps({str(folder): names for folder, names in folders.items()})
    command = [sys.executable, "-c", LOADER, path, name, info, scratch, dimensions]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return found, [line for line in lines if line.startswith("WARNING")]


def full_info(package):
    name, folder = package
    return folder / name / ("VBench2_full_info.json" if name == "vbench2" else "VBench_full_info.json")


def config(**fields):
    return sampling_config("tiny", {name.replace("__", "."): str(value) for name, value in fields.items()})


def plan(prompts, *, seeds=None, rule="video", seed=0, **read):
    suite, found = vbench.read_suite(str(prompts), **read)
    return suite, vbench.plan_videos(config(seed=seed), suite, found, pathlib.Path("v"), rule=rule, seeds=seeds)


def test_the_package_finds_every_video_that_it_looks_for(package, tmp_path):
    """With the whole suite as empty files, none is missing. Only temporal flickering has more, to choose from."""
    info = full_info(package)
    suite, jobs = plan(info)
    assert suite.package == package[0] and len({job.file for job in jobs}) == len(jobs)
    for job in jobs:
        file = tmp_path / job.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    _, prompts = vbench.read_suite(str(info))
    dimensions = list(dict.fromkeys(name for prompt in prompts for name in prompt.dimensions))
    videos = tmp_path / "v"
    folders = {videos / name: [name] for name in dimensions} if suite.folders else {videos: dimensions}
    found, warnings = load(package, info, tmp_path / "scratch", folders)
    assert warnings == [] and len(found) == len(folders)
    for folder, result in zip(folders, found, strict=True):
        used = {pathlib.Path(video).name for entry in result["entries"] for video in entry["video_list"]}
        names = {file.name for file in folder.iterdir()}
        unused = [result["prompts"][name] for name in names - used]
        still = {prompt.text for prompt in prompts if "temporal_flickering" in prompt.dimensions}
        assert used <= names and set(unused) == still and len(unused) == 20 * len(still)
    if not suite.folders:  # vbench2 cuts off long prompts
        assert set(result["prompts"].values()) == {prompt.text for prompt in prompts}
    missing = next(iter(used))
    (folder / missing).unlink()
    assert missing in load(package, info, tmp_path / "scratch", {folder: folders[folder]})[1][0]  # control


def info_file(path, count=20):
    named = [["human_action"], ["overall_consistency", "aesthetic_quality"], ["temporal_flickering"], ["color"]]
    entries = [
        {"prompt_en": f"a {word} thing, no. {i}.", "dimension": named[i % 4], "auxiliary_info": {"i": i}}
        for i, word in enumerate(["red", "blue"] * (count // 2))
    ]
    path.write_text(json.dumps(entries))
    return path, entries


def test_a_killed_run_resumes_with_the_missing_videos(tmp_path, tiny_pipeline, capsys):
    """20 prompts of 2 videos each. A process is killed in between; the next run makes the missing videos."""
    info, entries = info_file(tmp_path / "full_info.json")
    output = tmp_path / "out"
    arguments = ["evaluate", "vbench", f"--model={tiny_pipeline}", f"--prompts={info}", f"--output={output}"]
    arguments += ["--seeds=2", *SIZE]
    videos = output / "videos"
    process = subprocess.Popen(
        [sys.executable, "-m", "jsurgery", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while len(list(videos.glob("[!.]*.mp4"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {file: file.stat().st_mtime_ns for file in videos.glob("[!.]*.mp4")}
    assert 3 <= len(kept) < 40

    assert main(arguments) == 0
    printed = capsys.readouterr()
    made = [line for line in printed.out.splitlines() if line.endswith(".mp4")]
    assert len(made) == 40 - len(kept) and f"{len(kept)} of 40 videos are finished already" in printed.err
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())
    assert sorted(os.listdir(videos)) == sorted(f"{e['prompt_en']}-{i}.mp4" for e in entries for i in range(2))
    assert json.loads((output / "full_info.json").read_text()) == entries
    noise = {(s["seed"], s["number"]) for s in map(read_settings, videos.iterdir())}
    assert len(noise) == 40  # each video has different noise
    commands = printed.out.splitlines()[len(made) :]
    assert commands[0].startswith(f"vbench evaluate --output_path {output}/results --full_json_dir {output}/full_info")
    assert commands[0].endswith("--dimension 'human_action overall_consistency aesthetic_quality color'")
    assert commands[1] == f"vbench static_filter --videos_path {videos} --result_path {output}/still"
    assert commands[2].endswith(f"--videos_path {output}/still/filtered_videos --dimension temporal_flickering")

    assert main([*arguments, "--seed_rule=index"]) == 2
    assert "seed was" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["vbench"], indirect=True)
def test_vbench_loads_a_list_of_ours_with_fewer_videos(package, tmp_path):
    """A list of ours with two videos a prompt: the loader finds both and warns that three are missing."""
    info, entries = info_file(tmp_path / "full_info.json")
    _, jobs = plan(info, seeds=2)
    for job in jobs:
        (tmp_path / job.file).parent.mkdir(exist_ok=True)
        (tmp_path / job.file).touch()
    names = sorted({name for entry in entries for name in entry["dimension"]})
    (found,), warnings = load(package, info, tmp_path / "scratch", {tmp_path / "v": names})
    assert [entry["prompt_en"] for entry in found["entries"]] == [entry["prompt_en"] for entry in entries]
    assert all(len(entry["video_list"]) == 2 for entry in found["entries"]) and len(warnings) == 3 * 20
    assert set(found["prompts"].values()) == {entry["prompt_en"] for entry in entries}


def test_shards_divide_the_videos(tmp_path, tiny_pipeline, monkeypatch, capsys):
    info, _ = info_file(tmp_path / "full_info.json", count=4)
    output = tmp_path / "out"
    made = []

    def make(config, jobs):
        for job in jobs:
            job.file.touch()
            made.append(job.file.name)
            yield job.file

    monkeypatch.setattr(vbench, "make_videos", make)
    command = ["evaluate", "vbench", f"--model={tiny_pipeline}", f"--prompts={info}", f"--output={output}", *SIZE]
    assert main([*command, "--shard=1/3"]) == 0
    assert "left to other shards" in capsys.readouterr().err and not (output / "full_info.json").exists()
    assert main([*command, "--shard=0/3"]) == 0
    assert main([*command, "--shard=2/3"]) == 0
    assert "static_filter" in capsys.readouterr().out
    assert len(made) == len(set(made)) == len(list((output / "videos").iterdir())) == 3 * 5 + 25
    assert main([*command, "--shard=3/3"]) == 2 and main([*command, "--shard=3"]) == 2


def test_each_process_makes_one_shard(tmp_path, tiny_pipeline, monkeypatch, capsys):
    """Three processes, run one by one: each makes the shard of its index, and only process 0 goes on to the scores."""
    info, _ = info_file(tmp_path / "full_info.json", count=4)
    output, made, joined = tmp_path / "out", [], []

    def make(config, jobs):
        for job in jobs:
            job.file.touch()
            made.append(job.file.name)
            yield job.file

    monkeypatch.setattr(vbench, "make_videos", make)
    monkeypatch.setattr(processes, "join", lambda *flags: joined.append(flags))
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "on_all", lambda work: work())
    monkeypatch.setattr(vbench.jax, "process_count", lambda: 3)
    command = ["evaluate", "vbench", f"--model={tiny_pipeline}", f"--prompts={info}", f"--output={output}", *SIZE]
    for index in (2, 1, 0):
        monkeypatch.setattr(vbench.jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(processes, "is_first", lambda index=index: index == 0)
        flags = ["--coordinator=host:1234", "--num_processes=3", f"--process_id={index}"]
        assert main([*command, *flags]) == 0
        assert ("static_filter" in capsys.readouterr().out) == (index == 0)
    assert joined == [("host:1234", 3, index) for index in (2, 1, 0)]
    assert len(made) == len(set(made)) == len(list((output / "videos").iterdir())) == 3 * 5 + 25
    assert main([*command, *flags, "--shard=0/3"]) == 2
    assert "--shard: expected none with --coordinator" in capsys.readouterr().err


def test_an_installed_package_scores_the_videos(tmp_path, tiny_pipeline, monkeypatch, capsys):
    info, _ = info_file(tmp_path / "full_info.json", count=2)
    output, ran = tmp_path / "out", []

    def run(line):
        ran.append(line)
        if line[1] == "evaluate":
            results = {name: [0.5, []] for name in line[-1].split()}
            (output / "results").mkdir(exist_ok=True)
            (output / "results" / f"{len(ran)}_eval_results.json").write_text(json.dumps(results))
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(vbench, "make_videos", lambda config, jobs: [job.file.touch() or job.file for job in jobs])
    monkeypatch.setattr(vbench.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(vbench.subprocess, "run", run)
    command = ["evaluate", "vbench", f"--model={tiny_pipeline}", f"--prompts={info}", f"--output={output}", *SIZE]
    assert main(command) == 0
    assert "| human action | 50.00 |" in capsys.readouterr().out and len(ran) == 1
    monkeypatch.setattr(sample, "has_matching_video", lambda file, wanted: True)
    monkeypatch.setattr(vbench.subprocess, "run", lambda line: subprocess.CompletedProcess(line, 1))
    assert main(command) == 2
    assert "failed" in capsys.readouterr().err


def test_augmented_prompts_do_not_change_names_and_noise(tmp_path):
    info, entries = info_file(tmp_path / "full_info.json")
    lines = tmp_path / "lines.txt"
    order = [entries[i]["prompt_en"] for i in (3, 0, 9)]
    lines.write_text("\n".join([*order, order[0]]) + "\n")
    augmented = tmp_path / "augmented.txt"
    augmented.write_text("a long story\nof a thing\nwith\tmuch detail\nanother story\n")
    _, jobs = plan(lines, info=str(info), augmented=str(augmented), seeds=1)
    found = {job.file.name: job.prompt for job in jobs}
    expected = zip(order, ("a long story", "of a thing", "with\tmuch detail"), strict=True)
    assert found == {f"{text}-0.mp4": prompt for text, prompt in expected}
    not_augmented = plan(lines, info=str(info), seeds=1)[1]
    assert [(j.file, j.seed, j.number) for j in jobs] == [(j.file, j.seed, j.number) for j in not_augmented]

    augmented.write_text("one line\n")
    with pytest.raises(InputError, match="augmented.txt: expected a line for each of 4 prompts, found 1"):
        plan(lines, augmented=str(augmented))
    lines.write_text("a prompt of nobody\n")
    with pytest.raises(InputError, match="expected all prompts of .*lines.txt, found no 'a prompt of nobody'"):
        plan(lines, info=str(info))


def test_a_text_file_is_a_dimension_by_its_name_or_custom_input(tmp_path):
    flicker = tmp_path / "temporal_flickering.txt"
    flicker.write_text("a bowl, frozen in time\n\na still fork\n")
    suite, jobs = plan(flicker)
    assert suite.package == "vbench" and len(jobs) == 50
    anatomy = tmp_path / "Human_Anatomy.txt"
    anatomy.write_text("a person dances\n")
    suite, jobs = plan(anatomy)
    assert suite.package == "vbench2"
    assert [str(job.file) for job in jobs] == [f"v/Human_Anatomy/a person dances-{i}.mp4" for i in range(3)]
    mine = tmp_path / "mine.txt"
    mine.write_text("a cat\na dog\na cat\n")
    suite, prompts = vbench.read_suite(str(mine))
    assert len(plan(mine)[1]) == 10
    (line,) = vbench.commands(suite, prompts, "out dir")
    assert "custom_input" in line and "'out dir/results'" in line and "color" not in line[-1].split()


def test_a_list_with_more_entries_than_augmented_prompts_names_the_way_out(tmp_path):
    """As in VBench-2.0: an entry for each dimension of a prompt, while the augmented lines follow the text list."""
    given = (("a", "Mechanics"), ("b", "Material"), ("a", "Thermotics"))
    entries = [{"prompt_en": text, "dimension": [name]} for text, name in given]
    info, text, augmented = (str(tmp_path / name) for name in ("VBench2_full_info.json", "text.txt", "aug.txt"))
    pathlib.Path(info).write_text(json.dumps(entries))
    pathlib.Path(text).write_text("b\na\n")
    pathlib.Path(augmented).write_text("a long b\na long a\n")
    with pytest.raises(InputError, match="each of 3 prompts, found 2; give the suite's text list, .* as --info"):
        vbench.read_suite(info, augmented=augmented)
    _, prompts = vbench.read_suite(text, info, augmented)
    assert [(prompt.text, prompt.model_prompt) for prompt in prompts] == [
        ("a", "a long a"), ("b", "a long b"), ("a", "a long a"),
    ]  # fmt: skip
    pathlib.Path(augmented).write_text("one\n")
    with pytest.raises(InputError, match="each of 3 prompts, found 1$"):
        vbench.read_suite(info, augmented=augmented)


def test_seed_rules(tmp_path):
    info, _ = info_file(tmp_path / "full_info.json", count=4)
    noise = {job.file.name: (job.seed, job.number) for job in plan(info, seeds=3)[1]}
    assert len(set(noise.values())) == 12
    fewer = {job.file.name: (job.seed, job.number) for job in plan(info, seeds=3, subset=2)[1]}
    assert fewer.items() <= noise.items()  # the noise of a video does not depend on the subset
    other = {job.file.name: (job.seed, job.number) for job in plan(info, seeds=3, seed=1)[1]}
    assert all(other[name] != found for name, found in noise.items())
    by_index = plan(info, seeds=3, rule="index", seed=7)[1]
    assert [(job.seed, job.number) for job in by_index] == [(7, 0), (8, 0), (9, 0)] * 4


def test_subset_takes_every_fifth_prompt_of_every_dimension(tmp_path):
    info, entries = info_file(tmp_path / "full_info.json", count=40)
    _, kept = vbench.read_suite(str(info), subset=5)
    assert [prompt.entry for prompt in kept] == [entries[i] for i in (0, 1, 2, 3, 20, 21, 22, 23)]


def test_a_prompt_of_two_dimensions_is_sampled_once(tmp_path):
    info = tmp_path / "full_info.json"
    text = "The bund Shanghai, oil painting"
    info.write_text(json.dumps([{"prompt_en": text, "dimension": [d]} for d in ("color", "temporal_flickering")]))
    _, jobs = plan(info)
    assert [job.file.name for job in jobs] == [f"{text}-{i}.mp4" for i in range(25)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{", "as JSON"),
        ("[]", "expected a list of prompts"),
        ('{"a": {"caption": "a", "dimension": ["Mechanics"]}}', "as in .*VBench2_full_info.json, found dict"),
        ('[{"prompt_en": " "}]', "'prompt_en'"),
        ('[{"prompt_en": "a", "dimension": "color"}]', "expected a list 'dimension' of names in the entry 'a'"),
        ('[{"prompt_en": "a", "dimension": ["colour"]}]', "found colour"),
        ('[{"prompt_en": "a", "dimension": ["color", "Diversity"]}]', "some of both"),
        ('[{"prompt_en": "a/b", "dimension": ["color"]}]', "no slash"),
        (json.dumps([{"prompt_en": "é" * 123, "dimension": ["color"]}]), "at most 245 bytes"),
        (
            json.dumps([{"prompt_en": "x" * 180 + end, "dimension": ["Mechanics"]} for end in "ab"]),
            "would name the same videos",
        ),
    ],
)
def test_a_bad_list_of_prompts_is_refused(tmp_path, entries, message):
    info = tmp_path / "full_info.json"
    info.write_text(entries)
    with pytest.raises(InputError, match=message):
        plan(info)
