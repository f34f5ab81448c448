"""The bake-off on a random model of two blocks: the whole table, run twice, and its errors by other ways."""

import json
import types

import numpy as np
import pytest

from jsurgery.ablate import attention_seconds as seconds_module
from jsurgery.ablate import family_errors as errors_module
from jsurgery.ablate import measures as measures_module
from jsurgery.ablate.attention_seconds import COSTS
from jsurgery.ablate.family_errors import CHOICE, REPORT, FamilyErrors
from jsurgery.ablate.learned_selection import BlendedError
from jsurgery.ablate.seed_run import SeedRun, velocity
from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.cli import main
from jsurgery.io.files import write_json
from jsurgery.load_config import load_config
from jsurgery.runtime.timing import alternate
from jsurgery.surgery.distillation.saved_maps import TRAINED, load_maps
from jsurgery.surgery.operate import operate
from jsurgery.surgery.plan import read_costs

SIZES = {
    "video.frames": 17, "video.height": 64, "video.width": 64, "sampler.steps": 2, "trace.prompts": 5,
    "trace.holdout": 3, "trace.keep_steps": 1, "trace.batch": 5, "distill.steps": 2, "distill.error_steps": 1,
    "hybrid.rates": '(4, "S25B16")', "hybrid.degree": 1, "hybrid.layers": 1, "plan.rates": "(1, 4)", "plan.budget": 0.9,
    "finetune.steps": 0, "finetune.batch": 2, "data.clips": 2, "evaluate.prompts": 3, "evaluate.validation_clips": 2,
    "log_every": 1,
}  # fmt: skip
STEPS = 3
MS = {1: 10.0, 4: 4.0, "S25B16": 7.0}


@pytest.fixture(scope="module")
def arguments(tiny_pipeline):
    return {**{field: str(value) for field, value in SIZES.items()}, "model.path": str(tiny_pipeline)}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture
def sampled(monkeypatch):
    """The names of the models that were sampled; the models are built, and samples and times are made up."""
    names = []

    def measure_models(config, pipeline, models, latents, folder, shares):
        for name, load in models.items():
            if not (folder / f"{name}.json").exists():
                names.append(name)
                assert load().config.num_layers == 2
                write_json(folder / f"{name}.json", {"latent_rmse": [len(name) / 100.0] * config.evaluate.prompts})
        return {}

    def turns(programs, rounds, label):
        once = np.array(alternate(programs, 1, label))
        assert once.shape == (len(MS), 1) and once.min() > 0
        return [[ms / 1e3] * rounds for ms in MS.values()]

    monkeypatch.setattr(measures_module, "measure_models", measure_models)
    monkeypatch.setattr(seconds_module, "alternate", turns)
    monkeypatch.setattr(errors_module, "STEPS", STEPS)
    return names


def test_the_command_makes_the_table_once(arguments, workdir, tmp_path, sampled, monkeypatch, capsys):
    document = tmp_path / "results.md"
    document.write_text("<!-- begin families -->\n<!-- end families -->\n")
    command = [f"--config.{field}={value}" for field, value in arguments.items()]
    command += ["ablate", "--table=families", "--seeds=1", "--config=tiny_families", f"--workdir={workdir}"]
    assert main([*command, f"--results={document}"]) == 0
    said = capsys.readouterr().err
    assert said.index("hours in all") < said.index("trace: 5/5") < said.index("single blocks, seed 0")
    table = json.loads((workdir / "families.json").read_text())
    assert read_costs(workdir / COSTS, 2).of([4, "S25B16"]) == 11.0
    rows, (found,) = table["rows"], table["per_seed"]
    assert table["more"][0]["rows"]["0.6: sparse + linear"]["plan"] == "not reached: all blocks cost 0.70"
    assert rows["0.6: sparse + linear"]["plan"] == "2S25B16"
    assert rows["0.8: hybrid"]["plan"] == "1R4" and rows["0.8: hybrid"]["attention_time"] == 0.7
    assert len(found["blocks"][CHOICE]) == 2 and len(found["arms"]["flops"]["0.8"]["hybrid"]["report"]) == 1
    assert "By attention FLOPs: at 0.9 the best single family is" in document.read_text()
    assert "not reached: all blocks cost 0.70" in (workdir / "families.html").read_text()
    assert len(sampled) == len(set(sampled)) > 3 and sampled[0] == "teacher"

    def fails(*_, **__):
        raise AssertionError("measured again")

    sampled.clear()
    for name in ("_errors", "_learn", "_maps"):
        monkeypatch.setattr(FamilyErrors, name, fails)
    monkeypatch.setattr(seconds_module, "alternate", fails)
    before = (workdir / "families.md").read_text()
    assert main(command) == 0
    assert not sampled and (workdir / "families.md").read_text() == before
    assert "hours" not in capsys.readouterr().err


def test_errors_of_plans_are_those_of_hybrid_models(arguments, workdir, sampled):
    seed = SeedRun(load_config("tiny_families", arguments), workdir, 0)
    errors, plan = FamilyErrors(seed), (4, "S25B16")
    assert list(errors.half(CHOICE)) == [0, 1] and list(errors.half(REPORT)) == [2]
    hybrid = HybridConfig.of(seed.config, plan)
    maps = load_maps(seed.distilled(seed.config) / TRAINED, plan, hybrid.feature_map)
    model = operate(seed.run.teacher, hybrid, maps)
    assert errors.of_model(types.SimpleNamespace(name="hybrid", load=lambda: model)) == pytest.approx(
        errors.plans([plan], REPORT)[plan].tolist(), rel=1e-3
    )
    batch = seed.held_out[2]
    expected, found = (np.asarray(velocity(each, batch), np.float64) for each in (seed.run.teacher, model))
    relative = np.sum((found - expected) ** 2) / np.sum(expected**2)
    assert errors.plans([plan], REPORT)[plan] == pytest.approx(relative, rel=1e-3)
    blocks = errors.blocks()
    assert {name: values.shape for name, values in blocks.items()} == {
        CHOICE: (2, 2, 2),
        REPORT: (1, 2, 2),
        "initial": (1, 2, 2),
    }
    alone = errors.plans([(1, "S25B16"), (4, 1)], REPORT)
    assert blocks[REPORT][0, 1, 1] == pytest.approx(alone[1, "S25B16"][0], rel=1e-3)
    assert blocks[REPORT][0, 0, 0] == pytest.approx(alone[4, 1][0], rel=1e-3)
    assert not np.allclose(blocks[REPORT], blocks["initial"], rtol=1e-3)

    maps = load_maps(seed.distilled(seed.config) / TRAINED, ["S25B16"] * 2, FeatureMapConfig.of(seed.config))
    inputs = seed.run.teacher, maps.projection, batch, seed.teacher_velocities[2]
    blended = BlendedError("S25B16", errors.spec)
    assert blended(np.array([1.0, 0.0]), inputs) == pytest.approx(alone[1, "S25B16"][0], rel=1e-3)
    assert blended(np.array([1.0, 1.0]), inputs) == pytest.approx(0, abs=1e-9)
    assert 0 < blended(np.array([1.0, 0.5]), inputs) < alone[1, "S25B16"][0]
