"""The cost of one-pass distillation: the cost model against the compiled step, and the report of the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jsurgery.bench.distillation import counts
from jsurgery.cli import main
from jsurgery.config import base
from jsurgery.load_config import load_config
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, visit_blocks
from jsurgery.surgery.distillation.update import initial_maps, make_optimizer, make_update
from jsurgery.wan.cost import distillation_flops, model_flops, workload
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_sizes import find_sizes
from jsurgery.wan.transformer import WanTransformer

RATES = (2, 4, 8, "linear")


def test_one_pass_costs_less_than_two_forwards_at_320x480():
    """It distils 30 blocks at four rates, and costs 60 times less than one block and rate at a time."""
    config = load_config("wan_1_3b_lowres")
    network = find_sizes(config, "wan_1_3b_lowres").transformer
    assert config.hybrid.rates == RATES and network.num_layers == 30 and config.distill.loss == "value"
    found = counts(dataclasses.replace(workload(config, network), config=network), config.hybrid.rates)
    assert found["over_forward"] == pytest.approx(1.410, abs=1e-3) and found["saving"] > 60
    assert found["naive"] > 120 * found["forward"]


def maps_of(state):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state["maps"])


@pytest.fixture(scope="module")
def compiled():
    """(step, forward, shapes of the state, workload) for one block of one head, since XLA counts a loop's body once."""
    network = WanConfig(
        num_attention_heads=1, attention_head_dim=128, in_channels=4, out_channels=4, text_dim=16, ffn_dim=256,
        num_layers=1,
    )  # fmt: skip
    config = base()
    config.hybrid.rates, config.text_length = RATES, 8
    config.video.frames, config.video.height, config.video.width = 9, 256, 128
    graph, params = nnx.split(nnx.eval_shape(lambda: WanTransformer(network, rngs=nnx.Rngs(0))))
    maps = jax.eval_shape(lambda: initial_maps(config, nnx.merge(graph, params)))
    optimizer = make_optimizer(config)
    state = {"maps": maps, "opt_state": jax.eval_shape(optimizer.init, maps)}
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = {"latents": of(1, 3, 32, 16, 4), "timestep": of(1), "text": of(1, 8, 16)}
    step = make_update(optimizer, graph, DistillSpec.of(config)).lower(state, params, batch)
    work = dataclasses.replace(workload(config, network), config=network)
    assert work.tokens == 384  # one chunk: XLA counts the body of a loop once
    nothing = lambda maps, at: jnp.zeros(())
    setup = DistillSpec.of(config)
    velocity = lambda params, batch: visit_blocks(nnx.merge(graph, params), batch, [maps_of(state)], setup, nothing)[0]
    forward = jax.jit(velocity).lower(params, batch)
    return step, forward, state, work


def test_the_cost_model_is_an_upper_bound_of_the_compiled_step(compiled):
    """It counts a backward as two forwards, though gradients of queries, keys and values are not needed."""
    step, forward, _, work = compiled
    expected = model_flops(work, (1,))
    alone = forward.compile().cost_analysis()["flops"]
    assert alone == pytest.approx(expected, rel=0.05)
    branches = (step.compile().cost_analysis()["flops"] - alone) / (distillation_flops(work, RATES) - expected)
    assert 2 / 3 < branches < 1


def test_a_step_returns_only_state_and_losses(compiled):
    step, _, state, _ = compiled
    shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    new_state, (losses, *rest) = step.out_info[0], jax.tree.leaves(step.out_info[1:])
    assert shapes(new_state) == shapes(state) and losses.shape == (1, len(RATES)) and not rest
    text = step.as_text()
    assert not [word for word in ("callback", "outfeed", "infeed", "send", "host") if word in text]


def test_the_command_reports_flops_and_seconds(tiny_pipeline, tmp_path, capsys):
    report = tmp_path / "bench.json"
    fields = {
        "model.path": tiny_pipeline, "video.frames": 5, "video.height": 32, "video.width": 48, "hybrid.rates": "(2,)",
        "plan.rates": "(1, 2)", "plan.budget": "1R2",
    }  # fmt: skip
    command = [f"--config.{name}={value}" for name, value in fields.items()]
    assert main(["bench", "distill", "--runs=1", f"--json={report}", *command]) == 0
    found = json.loads(report.read_text())
    assert found["blocks"] == 2 and found["rates"] == [2]
    for part in ("flops", "seconds"):
        one = found[part]
        assert one["saving"] == pytest.approx(one["naive"] / one["one_pass"])
        assert one["over_forward"] == pytest.approx(one["one_pass"] / one["forward"])
    assert 1 < found["flops"]["saving"] < 2
    assert "cost model" in capsys.readouterr().out


def test_without_weights_only_flops_are_reported(capsys):
    assert main(["bench", "distill", "--config=wan_14b"]) == 0
    out = capsys.readouterr().out
    assert "40 blocks x 4 rates" in out and "measured" not in out
