"""What one pass of distillation costs beside the teacher's forward: the cost model against the compiled step, and what
the command says."""

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
from jsurgery.surgery.distillation.teacher_pass import DistillSpec, run_heads
from jsurgery.surgery.distillation.update import initial_maps, make_optimizer, make_update
from jsurgery.wan.cost import distillation_flops, model_flops, workload
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.models import find_sizes
from jsurgery.wan.transformer import WanTransformer

RATES = (2, 4, 8, "linear")


def test_a_pass_is_cheap_at_320x480():
    """Of 30 blocks at four rates: at most 1.7 forwards of the teacher, 60 times less than one by one."""
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
    """A step on one block of one head, in which no loop hides work; the forward in it; the shapes of the state."""
    network = WanConfig(
        num_attention_heads=1, attention_head_dim=128, in_channels=4, out_channels=4, text_dim=16, ffn_dim=256,
        num_layers=1,
    )  # fmt: skip
    config = base()
    config.hybrid.rates, config.text_length = RATES, 8
    config.video.frames, config.video.height, config.video.width = 9, 256, 256
    graph, params = nnx.split(nnx.eval_shape(lambda: WanTransformer(network, rngs=nnx.Rngs(0))))
    maps = jax.eval_shape(lambda: initial_maps(config, nnx.merge(graph, params)))
    optimizer = make_optimizer(config)
    state = {"maps": maps, "opt_state": jax.eval_shape(optimizer.init, maps)}
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = {"latents": of(1, 3, 32, 32, 4), "timestep": of(1), "text": of(1, 8, 16)}
    step = make_update(optimizer, graph, DistillSpec.of(config)).lower(state, params, batch)
    work = dataclasses.replace(workload(config, network), config=network)
    assert work.tokens == 768
    nothing = lambda maps, at: jnp.zeros(())
    setup = DistillSpec.of(config)
    velocity = lambda params, batch: run_heads(nnx.merge(graph, params), batch, maps_of(state), setup, nothing)[0]
    forward = jax.jit(velocity).lower(params, batch)
    return step, forward, state, work


def test_the_cost_model_counts_what_is_compiled_and_a_little_more(compiled):
    """It takes each branch's backward for two forwards; queries, keys and values need no gradient."""
    step, forward, _, work = compiled
    expected = model_flops(work, (1,))
    alone = forward.compile().cost_analysis()["flops"]
    assert alone == pytest.approx(expected, rel=0.05)
    branches = (step.compile().cost_analysis()["flops"] - alone) / (distillation_flops(work, RATES) - expected)
    assert 2 / 3 < branches < 1


def test_only_maps_moments_and_losses_leave_a_step(compiled):
    step, _, state, _ = compiled
    shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    new_state, (losses, *rest) = step.out_info[0], jax.tree.leaves(step.out_info[1:])
    assert shapes(new_state) == shapes(state) and losses.shape == (1, len(RATES)) and not rest
    text = step.as_text()
    assert not [word for word in ("callback", "outfeed", "infeed", "send", "host") if word in text]


def test_the_command(tiny_pipeline, tmp_path, capsys):
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


def test_without_weights_flops_are_counted(capsys):
    assert main(["bench", "distill", "--config=wan_14b"]) == 0
    out = capsys.readouterr().out
    assert "40 blocks x 4 rates" in out and "measured" not in out
