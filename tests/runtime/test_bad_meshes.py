"""Meshes that do not suit the topology, heads or batches: an error of one line with the numbers, before any work."""

import re

import pytest

from jsurgery.cli import main
from jsurgery.errors import DoesNotFit, InputError
from jsurgery.load_config import load_config, split_topology

SIZE = {"video.frames": "5", "video.height": "32", "video.width": "48", "hybrid.rates": "2", "plan.rates": "(1, 2)",
        "plan.budget": "1R2", "trace.prompts": "2", "trace.holdout": "1"}  # fmt: skip


@pytest.fixture
def refused(tiny_pipeline, tmp_path, capsys):
    """Runs a command that must fail and write nothing, and returns its error."""

    def run(*arguments: str, code: int, **overrides: str) -> str:
        fields = SIZE | {"model.path": str(tiny_pipeline)} | {k.replace("__", "."): v for k, v in overrides.items()}
        workdir = [f"--workdir={tmp_path / 'run'}"] if arguments[0] not in ("sample", "compile", "roofline") else []
        assert main([*arguments, *workdir, *(f"--config.{name}={text}" for name, text in fields.items())]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "run").exists()
        return line

    return run


@pytest.mark.parametrize(
    ("overrides", "code", "parts"),
    [
        ({"mesh__fsdp": "-2"}, 2, ["config.mesh.fsdp", "found -2"]),
        ({"mesh__context": "2.5"}, 2, ["config.mesh.context", "int", "'2.5'"]),
        ({"mesh__exchange": "ring"}, 2, ["config.mesh.exchange", "gather, all_to_all", "'ring'"]),
        ({"mesh__tensor": "5"}, 3, ["tensor 5 to divide the 2 heads"]),
        (
            {"mesh__tensor": "2", "mesh__context": "2", "mesh__exchange": "all_to_all"}, 3,
            ["tensor 2 x context 2 (all_to_all) to divide the 2 heads"],
        ),
        ({"mesh__data": "2"}, 3, ["data 2 x fsdp 1 divides, found 1 examples"]),
        ({"mesh__data": "2", "distill__batch": "2", "finetune__batch": "3"}, 3, ["data 2 x fsdp 1", "found 3"]),
        (
            {"mesh__data": "2", "distill__batch": "2"}, 3,
            ["data 2 x fsdp 1 x context 1 x tensor 1 = 2 devices, found 1 (cpu)"],
        ),
    ],
)  # fmt: skip
def test_bad_meshes_of_a_surgery(refused, overrides, code, parts):
    line = refused("surgery", code=code, **overrides)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("stage", ["trace", "surgery"])
def test_too_large_a_mesh_is_refused_before_the_first_stage(refused, stage):
    assert "= 3 devices, found 1" in refused(stage, code=3, mesh__context="3")


def test_too_large_a_mesh_for_sampling(refused, tmp_path):
    assert "= 8 devices, found 1" in refused("sample", "--prompt=a circle", code=3, mesh__context="8")
    (tmp_path / "prompts.txt").write_text("a circle\n")
    prompts = f"--prompts_file={tmp_path / 'prompts.txt'}"
    assert "= 8 devices, found 1" in refused("synthesize", prompts, code=3, mesh__context="8")


@pytest.mark.parametrize(
    ("command", "code", "parts"),
    [
        (["compile", "--stage=sample"], 2, ["--topology: expected", "NAME@TOPOLOGY"]),
        (["compile", "--stage=sample", "--topology=v5e"], 2, ["--topology", "'v5e'"]),
        (["compile", "--stage=sample", "--config=tiny@v5e:4x4"], 2, ["tiny@v5e:4x4", "none"]),
        (
            ["compile", "--stage=sample", "--config=wan_1_3b@v4:2x2"],
            2,
            ["wan_1_3b@v4:2x2", "v5e:16x16, v6e-8, v6e:4x4"],
        ),
        (["roofline"], 2, ["--topology: expected"]),
    ],
)
def test_missing_or_unknown_topologies(refused, command, code, parts):
    line = refused(*command, code=code)
    assert all(part in line for part in parts), line


# Where fine-tuning, with three numbers of 32 bits a parameter, does not fit.
NO_FINETUNING = {
    ("wan_1_3b_lowres", "v5e-1"), ("wan_1_3b_lowres", "4090"), ("wan_1_3b", "v5e-1"), ("wan_1_3b", "4090"),
    ("wan_14b", "v6e-8"),
    ("wan2_2_5b", "v5e-8"), ("wan2_2_5b", "h100"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["wan_1_3b_lowres", "wan_1_3b", "wan_14b", "wan2_2_5b"])
def test_shipped_presets_run_or_say_what_they_lack(name):
    """By arithmetic: every stage of a preset fits the mesh that it chooses, or the message has the numbers."""
    from jsurgery.estimate.chips import parse_topology
    from jsurgery.runtime.mesh import abstract_mesh, check_batch, check_heads
    from jsurgery.surgery.phases import COMPUTING, on_mesh, stage_batch
    from jsurgery.wan.model_sizes import find_sizes

    with pytest.raises(InputError, match="expected a topology that .* knows") as raised:
        load_config(f"{name}@v4:2x2")
    for topology in str(raised.value).rpartition(": ")[2].split(", "):
        config = load_config(f"{name}@{topology}", {"model.path": ""})
        sizes = find_sizes(config, f"{name}@{topology}")
        chip, count = parse_topology(topology)
        fitting = 0
        for stage in COMPUTING:
            try:
                mesh = abstract_mesh(on_mesh(stage, config, sizes, count, chip.memory, tell=print).mesh)
            except DoesNotFit as error:
                assert re.search(r"expected at most 95% of \d+ GiB a device, found [\d.]+ GiB", str(error))
                continue
            assert mesh.size == count
            check_heads(mesh, sizes.transformer.num_attention_heads, "gather")
            check_batch(mesh, stage_batch(stage, config))
            fitting += 1
        assert fitting == (3 if (name, topology) in NO_FINETUNING else 4), (name, topology, fitting)


def test_topology_after_the_name_of_a_config():
    assert split_topology("wan_1_3b@v6e:4x4") == ("wan_1_3b", "v6e:4x4")
    assert split_topology("wan_1_3b_lowres@v5e-8") == ("wan_1_3b_lowres", "v5e-8")
    assert split_topology("me@home/conf.py") == ("me@home/conf.py", "")
    assert load_config("wan_14b@v6e-8", {"mesh.tensor": "8", "mesh.context": "1"}).mesh.tensor == 8
