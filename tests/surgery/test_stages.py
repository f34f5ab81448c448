"""The config fields that stages record. Workdirs of earlier versions must stay valid."""

import dataclasses
import json
import pathlib

import pytest

from jsurgery import config as config_module
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.config import base, flatten, recorded_fields, recorded_section
from jsurgery.errors import InputError
from jsurgery.io.fields import as_recorded
from jsurgery.surgery.stages import RECORDED_NOWHERE, STAGES, stage_folders

RECORDED = json.loads((pathlib.Path(__file__).parent / "recorded_by_0_1.json").read_text())
TEACHER = "0123456789abcdef"


def old_config(fields):
    """The config of an older version. Later fields get the value that means the older behaviour."""
    config = base()
    with config.unlocked(), config.ignore_type():
        for name, value in (config_module.LATER_FIELDS | fields).items():
            config.update_from_flattened_dict({name: tuple(value) if isinstance(value, list) else value})
    return config


def later_field(monkeypatch, section, before, default):
    """Adds a field `section`.new to the config. `before` is its value that means the older behaviour."""
    original = config_module.base

    def extended():
        config = original()
        with config.unlocked():
            config[section].new = default
        return config.lock()

    monkeypatch.setitem(config_module.LATER_FIELDS, f"{section}.new", before)
    monkeypatch.setattr(config_module, "base", extended)
    return extended


@pytest.mark.parametrize("kind", RECORDED)
def test_stages_record_what_version_0_1_recorded(kind, tmp_path):
    """The expected records were written by the code of version 0.1."""
    folders = stage_folders(old_config(RECORDED[kind]["config"]), tmp_path, TEACHER)
    assert {name: folder.made_with for name, folder in folders.items()} == RECORDED[kind]["made_with"]


def test_every_field_is_recorded_by_a_stage_or_listed_as_not_recorded():
    """distill.trajectories is recorded only with distill.mode=sampling; later fields only if they have an effect."""
    config = base()
    config.distill.mode, config.distill.error_steps, config.finetune.lora_rank = "sampling", 1, 8
    config.model.kind, config.model.lora, config.model.lora_scale = "consistency", ("a.safetensors",), (0.5,)
    config.sampler.timesteps, config.sampler.noise, config.model.vae_dtype = (1000.0,), "frame", "bfloat16"
    recorded = {field for stage in STAGES for field in recorded_fields(config, stage.fields, stage.without)}
    not_recorded = {
        field
        for field, _ in flatten(config)
        if any(field == name or field.startswith(name + ".") for name in RECORDED_NOWHERE)
    }
    assert recorded | not_recorded == {field for field, _ in flatten(config)}
    assert not recorded & not_recorded


@pytest.mark.parametrize("section, stage", [("sampler", "trace"), ("distill", "distill"), ("data", "latents")])
def test_a_later_field_is_recorded_only_if_it_changes_behaviour(section, stage, monkeypatch, tmp_path):
    before = stage_folders(base(), tmp_path, TEACHER)
    for folder in before.values():
        folder.begin()
        folder.end()

    extended = later_field(monkeypatch, section, before="as before", default="as before")
    after = stage_folders(extended(), tmp_path, TEACHER)
    assert all(folder.done() for folder in after.values())

    changed = extended()
    changed[section].new = "otherwise"
    folders = stage_folders(changed, tmp_path, TEACHER)
    with pytest.raises(InputError, match=f"{section}.new was None, is 'otherwise'"):
        folders[stage].done()


def test_a_new_field_is_recorded_unless_listed_as_a_later_field(monkeypatch, tmp_path):
    """It invalidates old results until a developer lists it in LATER_FIELDS."""
    extended = later_field(monkeypatch, "distill", before="as before", default="as before")
    monkeypatch.delitem(config_module.LATER_FIELDS, "distill.new")
    assert "distill.new" in stage_folders(extended(), tmp_path, TEACHER)["distill"].made_with


def test_sections_record_later_fields_only_if_they_change_behaviour(monkeypatch):
    """Videos and workdirs of `evaluate fidelity` record sections."""
    config = base()
    recorded = recorded_section(config, "sampler", without=["guidance_batched"])
    assert recorded == {
        "solver": "euler", "steps": 50, "shift": 3.0, "guidance": 5.0, "negative_prompt": "",
    }  # fmt: skip
    extended = later_field(monkeypatch, "sampler", before=0, default=0)()
    assert recorded_section(extended, "sampler", without=["guidance_batched"]) == recorded
    extended.sampler.new = 1
    assert recorded_section(extended, "sampler", without=["guidance_batched"]) == recorded | {"new": 1}


def test_hybrid_configs_record_later_fields_only_if_they_change_behaviour():
    """The names of stored measurements are hashes of these records."""
    hybrid = HybridConfig(rates=(1, 2, "linear"))
    assert as_recorded(hybrid) == dataclasses.asdict(hybrid)

    @dataclasses.dataclass(frozen=True)
    class Later(HybridConfig):
        new: str = dataclasses.field(default="as before", metadata={"before": "as before"})

    assert as_recorded(Later(rates=(1, 2, "linear"))) == as_recorded(hybrid)
    assert as_recorded(Later(rates=(1, 2, "linear"), new="x")) == as_recorded(hybrid) | {"new": "x"}
