"""Fine-tuning with low-rank changes: what is trained, what it takes, what is written, what diffusers reads."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import InputError
from jsurgery.estimate.programs import lowered_finetune
from jsurgery.io.safetensors import read_tensors
from jsurgery.load_config import load_config
from jsurgery.runtime.mesh import abstract_mesh, make_mesh, parameter_shardings
from jsurgery.runtime.optimizer import adamw, initial_train_state
from jsurgery.surgery.finetune import make_update, split_trained
from jsurgery.surgery.phases import largest_hybrid, phases_of
from jsurgery.wan.checkpoint import load_transformer, save_transformer
from jsurgery.wan.lora_file import LORA_FILE, LoraSource, save_low_rank
from jsurgery.wan.low_rank import LowRankParam, add_low_rank
from jsurgery.wan.memory import device_bytes
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_sizes import ModelSizes, find_sizes
from jsurgery.wan.transformer import WanTransformer

CONFIG = WanConfig(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=8, ffn_dim=40,
    num_layers=2,
)  # fmt: skip
HYBRID = dataclasses.replace(CONFIG, hybrid=HybridConfig(rates=(1, 4), feature_map=FeatureMapConfig()))
RANK = 3
FIELDS = {
    "finetune.lora_rank": str(RANK), "finetune.learning_rate": "1e-2", "finetune.accumulate": "2",
    "finetune.teacher_weight": "0",
}  # fmt: skip


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"latents": (4, 2, 6, 4, 4), "text": (4, 5, 16)}
    return {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def trained(random_transformer):
    """(the hybrid before, the hybrid after two updates, its training state)."""
    config, before = load_config("tiny", FIELDS), random_transformer(HYBRID)
    student = nnx.merge(*nnx.split(before), copy=True)
    add_low_rank(student, RANK)
    graph, params, frozen = split_trained(student, RANK)
    optimizer = adamw(config.finetune)
    state = initial_train_state(jax.tree.map(jnp.copy, params), optimizer, 0.0)
    update, losses = make_update(config, optimizer, graph, graph), []
    for _ in range(3):
        state, values, _ = update(state, None, inputs(), jax.random.key(0), frozen)
        losses.append(float(values["loss"]))
    assert losses[2] < losses[1] < losses[0]
    return before, nnx.merge(graph, state["params"], frozen), state


def velocity(model):
    batch = inputs(1)
    return np.asarray(jax.jit(lambda model: model(batch["latents"], jnp.full(4, 300.0), batch["text"]))(model))


def test_a_model_begins_unchanged_and_only_its_changes_and_maps_are_trained(trained):
    before, after, state = trained
    begun = nnx.merge(*nnx.split(before), copy=True)
    add_low_rank(begun, RANK)
    start = velocity(before)
    np.testing.assert_allclose(velocity(begun), start, rtol=0, atol=1e-6 * np.abs(start).max())
    assert np.abs(velocity(after) - start).max() > 1e-2 * np.abs(start).max(), "the control"
    old, new = (dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in (before, after))
    changed = {path[0] for path in old if not np.array_equal(old[path][...], new[path][...])}
    assert changed == {"query_maps", "key_maps"}
    # A, B and the maps, by hand: 8 square layers of width 24 and two of 24 x 40 in each of two blocks.
    low_rank = 2 * RANK * (8 * (24 + 24) + 2 * (24 + 40))
    counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(after, LowRankParam)))
    maps = sum(leaf.size for leaf in jax.tree.leaves((nnx.state(before.query_maps), nnx.state(before.key_maps))))
    assert counted == low_rank
    moments = sum(leaf.size for leaf in jax.tree.leaves(state["opt_state"]))
    assert 2 * (low_rank + maps) <= moments < 2 * (low_rank + maps) + 10, "moments of nothing else"


def test_what_is_written_is_the_sum_and_diffusers_reads_the_changes(tmp_path, trained, random_transformer):
    before, after, _ = trained
    save_transformer(after, tmp_path / "hybrid")
    assert np.abs(velocity(load_transformer(tmp_path / "hybrid")) - velocity(after)).max() < 1e-5
    file = save_low_rank(after, tmp_path / "lora")
    save_transformer(before, tmp_path / "before")
    read = load_transformer(tmp_path / "before", loras=[LoraSource(str(file))])
    read.query_maps, read.key_maps = after.query_maps, after.key_maps
    assert np.abs(velocity(read) - velocity(after)).max() < 1e-5, "our own reader"

    plain = random_transformer(CONFIG)  # diffusers has no hybrid: the same changes on a softmax model
    save_transformer(plain, tmp_path / "plain")
    fields = {name: value for name, value in CONFIG.to_json().items() if not name.startswith("_")}
    reference = diffusers.WanTransformer3DModel(**fields).eval()
    weights = read_tensors(tmp_path / "plain")
    reference.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in weights.items()})
    batch = inputs(1)
    channels_first = lambda x: torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    arguments = channels_first(batch["latents"]), torch.full((4,), 300.0), torch.from_numpy(batch["text"])
    pipeline = diffusers.WanPipeline(None, None, None, None, transformer=reference)  # type: ignore[arg-type]
    with torch.no_grad():
        without = reference(*arguments, return_dict=False)[0].numpy()
        pipeline.load_lora_weights(tmp_path / "lora")
        theirs = np.moveaxis(reference(*arguments, return_dict=False)[0].numpy(), 1, -1)
    ours = velocity(load_transformer(tmp_path / "plain", loras=[LoraSource(str(file))]))
    assert np.abs(theirs - ours).max() < 1e-5 * np.abs(theirs).max()
    assert np.abs(theirs - np.moveaxis(without, 1, -1)).max() > 1e-3 * np.abs(theirs).max(), "the control"
    assert LORA_FILE == diffusers.loaders.lora_base.LORA_WEIGHT_NAME_SAFE


def test_memory_is_declared_as_the_state_has_it(trained):
    """On one device, for the sizes of the test; then by arithmetic for Wan2.1 1.3B on one chip and one GPU."""
    _, after, state = trained
    config = load_config("tiny", FIELDS | {"plan.budget": "1R4", "hybrid.rates": "(4,)", "plan.rates": "(1, 4)"})
    tiny = find_sizes(config, "tiny")
    sizes = ModelSizes("test", CONFIG, tiny.text_encoder, tiny.vae)
    assert largest_hybrid(config, CONFIG).hybrid.converted == (0,)
    held = phases_of("finetune", config, sizes, abstract_mesh(config.mesh))[0].held
    trees = (state["params"], state["opt_state"])
    found = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
    assert held["low-rank changes, feature maps and their moments"] == pytest.approx(found, abs=16)
    frozen = nnx.state(after, nnx.Param)
    mesh = make_mesh(config.mesh)
    maps = device_bytes(state["params"], parameter_shardings(mesh, state["params"]))
    everything = device_bytes(frozen, parameter_shardings(mesh, frozen))
    assert held["frozen weights"] <= everything < held["frozen weights"] + maps
    with pytest.raises(InputError, match=r"finetune.lora_rank: expected at most 24.*found 25"):
        add_low_rank(random_abstract(), 25)


def random_abstract():
    from jsurgery.wan.abstract_module import abstract_module

    return abstract_module(WanTransformer, CONFIG)


@pytest.mark.parametrize("machine", ["v5e-1", "4090", "h100"])
def test_wan_1_3b_fits_one_device_with_low_rank_changes(tmp_path, capsys, machine):
    from jsurgery.cli import main

    report = tmp_path / "dry.json"
    flags = ["--config.finetune.lora_rank=8", "--config.finetune.accumulate=16", f"--json={report}", "--disk=1000"]
    command = ["finetune", f"--config=wan_1_3b_lowres@{machine}", f"--workdir={tmp_path}", "--dry_run", *flags]
    code = main(command)
    row = json.loads(report.read_text())["phases"][0]
    assert code == 0, (row, capsys.readouterr().err)
    assert (
        row["held"]["frozen weights"] < 3.2e9 and row["held"]["low-rank changes, feature maps and their moments"] < 1e9
    )
    without = [flag for flag in command if "lora_rank" not in flag]
    assert main(without) == (0 if machine == "h100" else 3)


def test_the_step_compiles_with_shapes_alone():
    config = load_config("tiny", FIELDS | {"model.dtype": "bfloat16", "finetune.batch": "2", "plan.budget": "1R8"})
    tiny = find_sizes(config, "tiny")
    sizes = ModelSizes("test", dataclasses.replace(CONFIG, text_dim=64, in_channels=8, out_channels=8), *vars_of(tiny))
    assert "dot_general" in lowered_finetune(config, sizes, make_mesh(config.mesh)).as_text()


def vars_of(sizes):
    return sizes.text_encoder, sizes.vae
