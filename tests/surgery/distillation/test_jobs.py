"""Distillation by independent jobs: their names, missing blocks, merged results, and the commands that merge."""

import json

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from jsurgery.cli import main
from jsurgery.config import block_numbers
from jsurgery.errors import InputError
from jsurgery.io.results import format_ranges
from jsurgery.io.safetensors import read_tensors, write_tensors
from jsurgery.load_config import load_config
from jsurgery.run import Run
from jsurgery.runtime.metrics import Metrics, read_metrics
from jsurgery.surgery.distillation.jobs import job_name, merge
from jsurgery.surgery.stages import job_folder

RATES = (2, "linear")
FIELDS = {
    "video.frames": "5", "video.height": "64", "video.width": "48", "sampler.steps": "3", "trace.prompts": "3",
    "trace.holdout": "1", "trace.keep_steps": "2", "hybrid.rates": '(2, "linear")', "plan.rates": '(2, "linear")',
    "plan.budget": "2R2", "data.clips": "4",
}  # fmt: skip


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 40), min_size=1))
def test_formatted_blocks_are_parsed_to_the_same_blocks(blocks):
    assert block_numbers(format_ranges(blocks)) == tuple(sorted(blocks))


def test_blocks_are_formatted_as_ranges():
    assert format_ranges([5, 0, 1, 2]) == "0-2,5" and format_ranges([3]) == "3"
    assert block_numbers("2, 0-1,1") == (0, 1, 2) and block_numbers("") is None
    assert job_name((0, 1, 2, 5)) == "blocks_0-2,5"


def value(block: int, rate: object) -> float:
    return block + 0.1 * RATES.index(rate)


def write_job(folder: epath.Path, blocks: list[int], steps: int = 3) -> epath.Path:
    """Writes the files of a job that distilled these blocks, with different numbers for each."""
    rows = [[value(block, rate) for rate in RATES] for block in blocks]
    shares = dict.fromkeys(("initial_errors", "softmax_share", "teacher_softmax_share", "velocity_errors"), rows)
    report = {"blocks": blocks, "rates": list(RATES), "errors": rows, **shares, "samples": 2}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "errors.json").write_text(json.dumps(report))
    for name, sign in (("initial", -1), ("feature_maps", 1)):
        tensors = {
            f"blocks.{block}.rate_{rate}.phi_q.log_scale": np.float32([sign * value(block, rate)])
            for block in blocks
            for rate in RATES
        }
        write_tensors(folder / f"{name}.safetensors", tensors)
    metrics = Metrics(folder)
    for step in range(1, steps + 1):
        metrics.log(step, loss_2=np.mean([value(block, 2) for block in blocks]) / step)
    metrics.flush()
    return folder


def test_jobs_are_merged_by_block(tmp_path):
    """Jobs of different sizes, out of order; two share a block, and one logged one step more than the others."""
    folder = epath.Path(tmp_path)
    jobs = [write_job(folder / "b", [4, 1]), write_job(folder / "a", [0, 2, 3]), write_job(folder / "c", [0], steps=4)]
    merge(load_config("tiny", FIELDS), jobs, 5, folder)
    found = json.loads((folder / "errors.json").read_text())
    expected = [[value(block, rate) for rate in RATES] for block in range(5)]
    assert found["errors"] == found["softmax_share"] == found["velocity_errors"] == expected and found[
        "blocks"
    ] == list(range(5))
    assert found["rates"] == list(RATES) and found["samples"] == 2
    for name, sign in (("initial", -1), ("feature_maps", 1)):
        tensors = read_tensors(folder / f"{name}.safetensors")
        assert len(tensors) == 10
        for block in range(5):
            for rate in RATES:
                tensor = tensors[f"blocks.{block}.rate_{rate}.phi_q.log_scale"]
                assert tensor == np.float32([sign * value(block, rate)])
    jobs = [write_job(folder / "a", [0, 2, 3]), write_job(folder / "b", [4, 1], steps=2)]
    merge(load_config("tiny", FIELDS), jobs, 5, folder / "again")
    assert read_metrics(folder / "again") == [{"step": 1, "loss_2": 2.0}, {"step": 2, "loss_2": 1.0}]


def test_missing_blocks_are_named(tmp_path):
    folder = epath.Path(tmp_path)
    job = write_job(folder / "a", [0, 4])
    with pytest.raises(InputError, match=r"of 6 blocks no job has finished 1-3,5; .*--config.distill.blocks=1-3,5`"):
        merge(load_config("tiny", FIELDS), [job], 6, folder / "merged")
    assert not (folder / "merged").exists()


def test_plan_merges_the_jobs_of_its_workdir(tiny_pipeline, tmp_path, capsys):
    fields = FIELDS | {"model.path": str(tiny_pipeline)}
    workdir = tmp_path / "run"
    command = [f"--workdir={workdir}", *(f"--config.{name}={text}" for name, text in fields.items())]
    run = Run(load_config("tiny", fields), str(workdir))

    def job(name: str, blocks: list[int], finished: bool = True) -> None:
        stage = job_folder(run.config, name, run.stages)
        stage.begin()
        write_job(stage.folder, blocks)
        if finished:
            stage.end()

    run.stages["trace"].begin()
    run.stages["trace"].end()
    job("blocks_0", [0])
    job("blocks_1", [1], finished=False)
    for name in ("plan", "distill"):
        assert main([name, *command]) == 2
        message = capsys.readouterr().err
        assert "of 2 blocks no job has finished 1" in message and len(message.splitlines()) == 1
    assert not (workdir / "distill" / "errors.json").exists() and not (workdir / "plan").exists()
    job("blocks_1", [1])
    assert main(["plan", *command]) == 0
    assert json.loads((workdir / "distill" / "errors.json").read_text())["errors"] == [[0, 0.1], [1, 1.1]]
    assert json.loads((workdir / "plan" / "plan.json").read_text())["rates"] == [2, 2]
    assert run.stages["distill"].done()
    # Another number of steps is another distillation; a choice of blocks is not.
    assert main(["plan", *command, "--config.distill.blocks=1"]) == 0
    assert main(["plan", *command, "--config.distill.steps=7"]) == 2
    assert "distill.steps" in capsys.readouterr().err
    assert main(["distill", *command, "--config.distill.blocks=0-2"]) == 2
    assert "the model has blocks 0 to 1, found 2" in capsys.readouterr().err
