"""The table of published models: each tells itself by its files, the others are refused by name."""

import json

import diffusers
import pytest
import torch

from jsurgery.cli import main
from jsurgery.errors import InputError
from jsurgery.load_config import load_config
from jsurgery.sample import sampling_config
from jsurgery.wan.checkpoint_layouts import transformer_layout, transformer_names
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_sizes import network_of
from jsurgery.wan.models import BY_KIND, MODELS, NEGATIVE_PROMPT, READ, REFUSED
from jsurgery.wan.pipeline_parts import check_index
from jsurgery.wan.tell_model import tell_model

UNIPC = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}
SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 32, "text_dim": 16}


def folder_of(folder, network, pipeline="WanPipeline", scheduler=UNIPC):
    """A pipeline folder of configs alone."""
    for part in ("transformer", "vae", "scheduler"):
        (folder / part).mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(network.to_json()))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    if pipeline:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return str(folder)


@pytest.mark.parametrize("model", READ, ids=lambda model: model.kind)
def test_every_model_that_is_read_is_told(tmp_path, model):
    network, scheduler = network_of(model), UNIPC | {"flow_shift": model.defaults.get("sampler.shift", 3.0)}
    if model.scheduler:
        network, scheduler = WanConfig(**SMALL), {"_class_name": model.scheduler, "shift": 3.0}
    path = folder_of(tmp_path / "m", network, (*model.pipelines, "")[0], scheduler)
    told = tell_model(path)
    if model.pipelines:
        assert told.model.kind == model.kind
    else:  # nothing in its files tells it from Wan2.1
        assert told.model.kind == "wan2.1-14b" and "lightx2v 14B" in told.remark and "A14B" in told.remark
    named = tell_model(path, model.kind)
    assert (named.model.kind, named.by) == (model.kind, "--kind")
    overrides = {"model.path": path, "model.kind": model.kind}
    sampler, told = sampling_config(None, overrides).sampler, named.model.defaults
    assert {f"sampler.{name}": value for name, value in sampler.items() if f"sampler.{name}" in told} == {
        field: value for field, value in told.items() if field.startswith("sampler.")
    }
    assert (sampler.negative_prompt == NEGATIVE_PROMPT) == (model.kind in ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-5b"))
    given = sampling_config(None, overrides | {"sampler.steps": "7", "sampler.guidance": "2"}).sampler
    assert (given.steps, given.timesteps, given.guidance) == (7, (), 2.0)


def test_a_model_of_other_sizes_has_no_defaults_but_those_of_its_config(tmp_path):
    path = folder_of(tmp_path / "m", WanConfig(num_layers=2))
    told = tell_model(path)
    assert (told.model.kind, told.model.config, told.model.defaults) == ("", "wan_1_3b", {})
    with pytest.raises(InputError, match=r"--kind=wan2.1-1.3b: .*expected 30 blocks of width 1536.*found 2 blocks"):
        tell_model(path, "wan2.1-1.3b")
    with pytest.raises(InputError, match=r"--kind=wan2.1-13b: expected one of .*did you mean"):
        tell_model(path, "wan2.1-13b")
    with pytest.raises(InputError, match=r"--kind=wan2.2-t2v-a14b: .*two experts"):
        tell_model(path, "wan2.2-t2v-a14b")


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.kind)
def test_what_is_not_read_is_refused_by_name(tmp_path, model):
    for part, meaning in model.index.items():
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", part: ["a", "b"]}))
        with pytest.raises(InputError, match=f"{part}: {meaning}"):
            check_index(tmp_path)
    if model.tensors:
        names = [name.format(i=0, j=0) for name in transformer_names().values() if "{j}" not in name]
        transformer_layout(names)
        with pytest.raises(InputError, match="text-to-video"):
            transformer_layout([*names, f"blocks.0.{model.tensors.split('|')[0]}.weight"])
    assert model.index or model.tensors or model.words or model.channels or model.few_steps


def test_sizes_are_those_that_diffusers_loads(tmp_path):
    """Parameters of the published sizes, counted by diffusers' class without memory for them."""
    counts = {"wan2.1-1.3b": 1_418_996_800, "wan2.1-14b": 14_288_491_584, "wan2.2-5b": 4_999_787_712}
    for kind, count in counts.items():
        fields = {k: v for k, v in network_of(BY_KIND[kind]).to_json().items() if not k.startswith("_")}
        with torch.device("meta"):
            model = diffusers.WanTransformer3DModel(**fields)
        assert sum(p.numel() for p in model.parameters()) == count


def test_the_table_is_printed_with_what_fits(tmp_path, capsys):
    report = tmp_path / "models.json"
    assert main(["models", "--topology=4090", f"--json={report}"]) == 0
    text, found = capsys.readouterr().out, json.loads(report.read_text())
    assert all(model.name in text and model.kind in text for model in MODELS)
    rows = {row["kind"]: row for row in found["models"]}
    assert found["memory"] == 24 * 2**30 and rows["wan2.1-1.3b"]["parameters"] == 1_418_996_800
    assert rows["wan2.1-1.3b"]["sample"]["fits"] and not rows["wan2.1-1.3b"]["surgery"]["fits"]
    assert rows["wan2.1-1.3b"]["lora"]["fits"] and "finetune.lora_rank=8" in text
    assert not rows["wan2.1-14b"]["sample"]["fits"]
    assert rows["wan2.1-1.3b"]["sample"]["bytes"] <= 0.95 * found["memory"]
    assert main(["models", "--topology=v9"]) == 2


def test_the_shipped_configs_sample_as_the_table_says():
    for model in READ:
        if model.config != "tiny" and not model.few_steps:
            config = load_config(model.config)
            for name in ("steps", "shift", "guidance"):
                assert config.sampler[name] == model.defaults[f"sampler.{name}"]
            assert config.video.fps == model.defaults["video.fps"]
