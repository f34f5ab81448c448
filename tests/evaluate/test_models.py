"""The models that a run evaluates: one sampler is compiled for all hybrids; stopped work goes on after a batch."""

import json
import logging
import os
import signal

import jax
import pytest
from etils import epath

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import Terminated
from jsurgery.evaluate.sprites_score import DIMENSIONS
from jsurgery.evaluate.surgery_models import evaluate
from jsurgery.load_config import load_config
from jsurgery.run import Run
from jsurgery.runtime.mesh import make_mesh
from jsurgery.surgery.distillation.saved_maps import load_maps, save_maps
from jsurgery.surgery.distillation.update import initial_maps
from jsurgery.surgery.operate import operate, save_model
from jsurgery.wan.checkpoint import load_transformer
from jsurgery.wan.pipeline import Pipeline

FIELDS = {
    "video.frames": "5", "video.height": "64", "video.width": "48", "sampler.steps": "2", "trace.keep_steps": "1",
    "hybrid.rates": "(2,)", "plan.rates": "(1, 2)", "plan.budget": "1R2",
}  # fmt: skip


class CompileLog(logging.Handler):
    """Collects the names of the programs that JAX compiles."""

    def __init__(self):
        super().__init__()
        self.programs: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (message := record.getMessage()).startswith("Compiling "):
            self.programs.append(message.split()[1])


@pytest.fixture
def compiled():
    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), CompileLog()
    logger.addHandler(handler)
    with jax.log_compiles():
        yield handler.programs
    logger.removeHandler(handler)


def test_one_sampler_is_compiled_for_all_hybrids(tiny_pipeline, tmp_path, compiled):
    config = load_config("tiny", FIELDS | {"model.path": str(tiny_pipeline)})
    run = Run(config, str(tmp_path / "run"))
    run.teacher.shard(make_mesh(config.mesh))  # as training leaves it
    save_maps(tmp_path / "maps.safetensors", initial_maps(config, run.teacher), (2,), range(2))
    hybrid = HybridConfig.of(config, (2, 1))
    operated = operate(run.teacher, hybrid, load_maps(tmp_path / "maps.safetensors", (2, 1), hybrid.feature_map))
    save_model(operated, run.workdir / "model", str(tiny_pipeline))
    compiled.clear()
    for model in (operated, load_transformer(run.workdir / "model")):
        pipeline = run.pipeline.with_transformer(run.put_on_mesh(model))
        for first in range(2):
            pipeline.sample(["a red circle"], config, seed=0, first=first)
    assert compiled.count("jit(sampling_step)") == 1


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def evaluation(tiny_pipeline, tmp_path, monkeypatch):
    """(start, sampled, decoded): a function that evaluates two models on six prompts, two at once, into a folder;
    the batches that it has sampled, as (name, first prompt), and the number of clips that it has decoded."""
    fields = {"evaluate.prompts": "6", "evaluate.batch": "2", "evaluate.videos": "2", "model.path": str(tiny_pipeline)}
    sampled, decoded = [], []
    sample, decode = Pipeline.sample, Pipeline.decode

    def start(folder, stop_at=None, how=None, decoding_stops_at=None, **more):
        config = load_config("tiny", FIELDS | fields | more)
        run = Run(config, str(tmp_path / "run"))
        hybrid = HybridConfig.of(config, (2, 1))
        save_maps(tmp_path / "maps.safetensors", initial_maps(config, run.teacher), (2,), range(2))
        maps = load_maps(tmp_path / "maps.safetensors", (2, 1), hybrid.feature_map)
        models = {"teacher": lambda: run.teacher, "hybrid": lambda: operate(run.teacher, hybrid, maps)}

        def counted(self, prompts, config, *, first, **options):
            name = "teacher" if self.transformer.config.hybrid is None else "hybrid"
            if how is not None and (name, first) == stop_at:
                how()
            sampled.append((name, first))
            return sample(self, prompts, config, first=first, **options)

        def counted_too(self, latents):
            decoded.append(len(latents))
            if len(decoded) == decoding_stops_at:
                raise Killed
            return decode(self, latents)

        monkeypatch.setattr(Pipeline, "sample", counted)
        monkeypatch.setattr(Pipeline, "decode", counted_too)
        folder.mkdir(exist_ok=True)
        # Bounds of the score, which would take a while to measure.
        bounds = [dict.fromkeys(DIMENSIONS, 1.0), dict.fromkeys(DIMENSIONS, 0.0)]
        (folder / "reference.json").write_text(json.dumps(bounds))
        evaluate(config, run.pipeline, models, None, epath.Path(folder))

    return start, sampled, decoded


def test_a_stopped_evaluation_goes_on_after_its_last_batch(evaluation, tmp_path):
    start, sampled, decoded = evaluation
    start(tmp_path / "whole")
    every = [(name, first) for name in ("teacher", "hybrid") for first in (0, 2, 4)]
    assert sampled == every
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.json")}
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "evaluation.json", "hybrid.json", "reference.json", "speed", "teacher.json", "teacher.npy", "videos"
    ]  # fmt: skip
    steps = int(FIELDS["sampler.steps"])
    for name in ("teacher", "hybrid"):
        speed = json.loads((tmp_path / "whole" / "speed" / f"{name}.json").read_text())
        assert (speed["clips"], speed["steps"]) == (2, 3 * (steps - 1)), "of three batches, without the first steps"
        assert 0 < speed["low"] <= speed["seconds"] <= speed["high"] and speed["machine"]

    def kill():
        raise Killed

    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
    for folder, stop_at, how, error, before in (
        ("killed", ("hybrid", 2), kill, Killed, 4),
        ("stopped", ("teacher", 2), terminate, Terminated, 2),
    ):
        sampled.clear()
        with pytest.raises(error):
            start(tmp_path / folder, stop_at, how)
        assert sampled == every[:before], "a signal lets the open batch end"
        start(tmp_path / folder)
        assert sampled == every, "nothing is sampled twice"
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.json")} == expected
        assert not list((tmp_path / folder).glob("unfinished*"))
        assert len(list((tmp_path / folder / "videos" / "hybrid").iterdir())) == 2

    sampled.clear()
    decoded.clear()
    with pytest.raises(Killed):
        start(tmp_path / "undecoded", decoding_stops_at=5)
    start(tmp_path / "undecoded")
    assert sampled == every and len(decoded) == 6 + 1, "the open batch alone is decoded twice"
    assert (tmp_path / "undecoded" / "hybrid.json").read_bytes() == expected["hybrid.json"]


def test_only_what_is_shown_or_scored_is_decoded(evaluation, tmp_path):
    start, _, decoded = evaluation
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {number}" for number in range(40)))
    start(tmp_path / "shown", prompts=str(tmp_path / "prompts.txt"), **{"evaluate.videos": "3"})
    assert decoded == [2, 1] * 2, "the first three clips of both models"
    results = json.loads((tmp_path / "shown" / "evaluation.json").read_text())["models"]
    assert [list(result) for result in results.values()] == [["latent_rmse"]] * 2
    assert [len(list(each.iterdir())) for each in (tmp_path / "shown" / "videos").iterdir()] == [3, 3]
