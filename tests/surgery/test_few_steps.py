"""Surgery of a model that was distilled to few steps: its own timesteps, no guidance, and its sampler in the folder."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.cli import main
from jsurgery.diffusion import schedule
from jsurgery.errors import InputError
from jsurgery.run import Run
from jsurgery.sample import sampling_config
from jsurgery.surgery.finetune import noised_batch, own_timesteps
from jsurgery.surgery.operate import save_model
from jsurgery.surgery.trace import TraceSteps
from jsurgery.wan.checkpoint import read_config
from jsurgery.wan.tell_model import tell_model, with_own_sampler

SMALL = {
    "video.frames": "5", "video.height": "64", "video.width": "48", "hybrid.rates": "(2, 8)", "plan.rates": "(1, 2, 8)",
    "plan.budget": "1R8", "trace.prompts": "3", "trace.holdout": "1", "evaluate.prompts": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def few_steps(tmp_path_factory, tiny_pipeline):
    """The tiny pipeline with the scheduler of a consistency model."""
    folder = shutil.copytree(tiny_pipeline, tmp_path_factory.mktemp("few") / "model")
    scheduler = {"_class_name": "FlowMatchLCMScheduler", "shift": 5.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "hashes.json").unlink(missing_ok=True)
    return folder


def test_it_is_traced_at_its_own_timesteps_with_the_prompt_alone(tmp_path, few_steps, capsys):
    flags = [f"--config.{name}={value.replace(' ', '')}" for name, value in SMALL.items()]
    run = tmp_path / "run"
    command = ["trace", f"--workdir={run}", f"--config.model.path={few_steps}", *flags]
    assert main(command) == 0
    assert "consistency by its scheduler, with its own sampler" in capsys.readouterr().err
    steps = TraceSteps(run / "trace")
    own = schedule("lcm", 4, 5.0).timestep
    assert steps.steps_per_prompt == 4 and len(steps) == 3 * 4
    np.testing.assert_allclose([steps[i]["timestep"] for i in range(4)], own, rtol=1e-6)
    teacher = schedule("unipc", 8, 3.0).timestep
    assert not np.isin(np.round(own[1:]), np.round(teacher)).any(), "the control"
    assert all(steps.steps[i]["conditional"] for i in range(len(steps)))


def test_its_sampler_stays_in_the_operated_folder(tmp_path, few_steps, tiny_pipeline, random_transformer):
    overrides = SMALL | {"model.path": str(few_steps)}
    config = with_own_sampler("tiny", overrides)
    sampler = config.sampler
    assert (sampler.solver, sampler.steps, sampler.guidance, config.trace.keep_steps) == ("lcm", 4, 1.0, 4)
    assert (config.trace.solver, config.finetune.teacher_weight, config.video.fps) == ("lcm", 1.0, 8)
    given = with_own_sampler("tiny", overrides | {"sampler.steps": "6", "finetune.teacher_weight": "0.5"})
    assert (given.sampler.steps, given.trace.keep_steps, given.finetune.teacher_weight) == (6, 6, 0.5)
    plain = with_own_sampler("tiny", SMALL | {"model.path": str(tiny_pipeline), "finetune.teacher_weight": "0"})
    assert (plain.sampler.solver, plain.sampler.guidance, plain.finetune.teacher_weight) == ("unipc", 5.0, 0.0)
    assert "sampler" not in Run(plain, str(tmp_path / "plain")).notes

    run = Run(config, str(tmp_path / "run"))
    network = read_config(few_steps / "transformer")
    hybrid = dataclasses.replace(network, hybrid=HybridConfig.of(config, (2, *(1,) * (network.num_layers - 1))))
    save_model(random_transformer(hybrid), tmp_path / "hybrid", str(tiny_pipeline), run.notes)
    told = tell_model(str(tmp_path / "hybrid"))
    assert told.model.few_steps and told.by == "its config.json"
    kept = sampling_config(None, {"model.path": str(tmp_path / "hybrid")}).sampler
    assert kept.to_dict() == sampler.to_dict()
    for fields in ([1], {"solvers": "lcm"}):
        file = tmp_path / "hybrid" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"sampler": fields}))
        with pytest.raises(InputError, match=r"config.json: sampler: expected some of solver"):
            tell_model(str(tmp_path / "hybrid"))


def test_convert_keeps_the_sampler_of_a_kind(tmp_path, tiny_pipeline, capsys):
    convert = lambda *flags: main(["convert", f"--model={tiny_pipeline}", *flags])
    for name, flags in (("few", ["--kind=consistency"]), ("plain", [])):
        shutil.copytree(tiny_pipeline, tmp_path / name, ignore=shutil.ignore_patterns("transformer"))
        assert convert(f"--output={tmp_path / name / 'transformer'}", *flags) == 0
    assert tell_model(str(tmp_path / "few")).by == "its config.json"
    kept = sampling_config(None, {"model.path": str(tmp_path / "few")}).sampler
    assert (kept.solver, kept.steps, kept.guidance) == ("lcm", 4, 1.0)
    assert not tell_model(str(tmp_path / "plain")).model.few_steps
    capsys.readouterr()
    for flags, message in (
        (["--kind=lightx2v-14b"], "--kind=lightx2v-14b"),
        (["--kind=lightx2w-14b"], "did you mean lightx2v-14b?"),
        (["--kind=consistency", "--layout=original"], "expected --layout=diffusers"),
    ):
        assert convert(f"--output={tmp_path / 'bad'}", *flags) == 2 and not (tmp_path / "bad").exists()
        assert message in capsys.readouterr().err


def test_it_is_fine_tuned_at_its_own_timesteps(few_steps):
    import jax

    config = with_own_sampler("tiny", SMALL | {"model.path": str(few_steps)})
    batch = {"latents": np.ones((64, 1, 2, 2, 4), np.float32), "text": np.zeros((64, 2, 3), np.float32)}
    noisy = noised_batch(batch, jax.random.key(0), 3.0, own_timesteps(config))
    expected = schedule("lcm", 4, 5.0).timestep
    np.testing.assert_allclose(np.unique(np.round(noisy["timesteps"], 3)), np.sort(expected), rtol=1e-3)
    spread = noised_batch(batch, jax.random.key(0), 3.0)
    assert len(set(np.asarray(spread["timesteps"]).tolist())) == 64
