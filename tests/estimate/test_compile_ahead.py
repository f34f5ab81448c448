"""Bytes that compiled programs move between devices; stages compiled for TPUs on a machine that has none."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.cli import main
from jsurgery.config import base
from jsurgery.estimate.compile_ahead import chip_and_devices
from jsurgery.estimate.hlo import collectives, largest_buffers
from jsurgery.estimate.programs import lowered
from jsurgery.load_config import load_config
from jsurgery.runtime.mesh import make_mesh
from jsurgery.runtime.optimizer import adamw, initial_train_state
from jsurgery.surgery.finetune import make_update
from jsurgery.wan.model_config import TextEncoderConfig, VaeConfig, WanConfig
from jsurgery.wan.model_sizes import ModelSizes
from jsurgery.wan.transformer import WanTransformer
from tests.conftest import needs_libtpu

COUNT = """
import json
import jax, jax.numpy as jnp
from functools import partial
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
from jsurgery.estimate.hlo import collectives
from jsurgery.runtime.mesh import make_mesh
from jsurgery.wan.transformer import WanConfig
from pallas_kernels import init_polynomial_map, sharded_self_attention

mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
sharding = jax.NamedSharding(mesh, P("context"))

def looped(x):
    def step(carry, _):
        return lax.psum(carry, "context") / 8, lax.all_gather(carry, "context", tiled=True).sum()
    carry, sums = lax.scan(step, x, None, length=5)
    taken = lax.cond(sums.sum() > 0, lambda: lax.all_gather(carry[:2], "context").sum(), lambda: 0.0)
    return carry + taken

x = jax.ShapeDtypeStruct((8 * 16,), jnp.float32, sharding=sharding)
program = jax.shard_map(looped, mesh=mesh, in_specs=P("context"), out_specs=P("context"), check_vma=False)
print(json.dumps(collectives(jax.jit(program).lower(x).compile().as_text())))

tokens = jax.ShapeDtypeStruct((1, 8 * 64, 8, 12), jnp.float32, sharding=jax.NamedSharding(mesh, P(None, "context")))
maps = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), 8, 12))
for rate in (1, 2, 8):
    phi = (None, None) if rate == 1 else (maps, maps)
    for exchange in ("gather", "all_to_all"):
        attend = partial(sharded_self_attention, sharding=tokens.sharding, num_softmax=64 // rate, exchange=exchange)
        moved = collectives(jax.jit(attend).lower(tokens, tokens, tokens, *phi).compile().as_text())
        print(json.dumps({kind: one["bytes"] for kind, one in moved.items()}))

def loss(q, k, v, query_map, key_map, rate):
    attend = partial(sharded_self_attention, sharding=tokens.sharding, num_softmax=64 // rate)
    return jnp.sum(attend(q, k, v, query_map, key_map) ** 2)

for rate in (1, 2, 8):
    phi = (None, None) if rate == 1 else (maps, maps)
    step = jax.jit(jax.value_and_grad(partial(loss, rate=rate), argnums=(0, 1, 2, 3, 4) if rate > 1 else (0, 1, 2)))
    moved = collectives(step.lower(tokens, tokens, tokens, *phi).compile().as_text())
    print(json.dumps({kind: one["bytes"] for kind, one in moved.items()}))
"""


def test_attention_exchanges_the_softmax_keys_and_the_linear_state(on_fake_devices):
    counts, *attention = on_fake_devices(COUNT)
    attention, steps = attention[:6], attention[6:]
    assert counts["all-reduce"] == {"count": 5, "bytes": 5 * 16 * 4}
    assert counts["all-gather"] == {"count": 6, "bytes": 5 * 8 * 16 * 4 + 8 * 2 * 4}
    whole = 2 * 8 * 64 * 8 * 12 * 4  # keys and values
    state = 8 * 24 * (12 + 1) * 4
    gathered, exchanged = attention[::2], attention[1::2]
    assert gathered == [{"all-gather": whole}] + [{"all-gather": whole / r, "all-reduce": state} for r in (2, 8)]
    # A device's shard of q, k, v and y, whatever the rate.
    assert exchanged == [{"all-to-all": 2 * whole / 8}] * 3
    # The backward pass returns the gradients of the softmax keys and values. The size of everything else (the state,
    # the gradients of the state and of the maps, the loss) does not depend on the number of tokens.
    of_tokens = [sum(one.get(kind, 0) for kind in ("all-gather", "reduce-scatter")) for one in steps]
    weights = 2 * 4 * sum(leaf for leaf in (8 * 12 * 24, 8 * 24 * 24, 2 * 8 * 24, 8))
    assert of_tokens[0] >= 2 * whole
    for rate, moved, one in zip((2, 8), of_tokens[1:], steps[1:], strict=True):
        assert moved <= 1.1 / rate * of_tokens[0]
        assert one["all-reduce"] <= 3 * state + weights + 64


def test_an_async_collective_in_a_loop_counts_once_an_iteration():
    text = """
%condition (c: (s32[], f32[4])) -> pred[] {
  %six = s32[]{:T(128)} constant(6)
  %c = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %six), direction=LT
}
%begin (p: bf16[38]) -> bf16[76] {
  %g = bf16[76]{0:T(8,128)(2,1)} all-gather(%p), channel_id=1, frontend_attributes={chain_id="2"}
  ROOT %s = (bf16[38], bf16[76]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%go_on (p: bf16[38]) -> bf16[76] {
  %g2 = bf16[76]{0} all-gather(%p), channel_id=1, frontend_attributes={chain_id="2"}
  ROOT %d = bf16[76] custom-call(%g2), custom_call_target="AsyncCollectiveDone"
}
%body (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = bf16[76] fusion(%x), kind=kCustom, calls=%begin
  %b = bf16[76] fusion(%a), kind=kCustom, calls=%go_on
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%tuple), condition=%condition, body=%body
}
"""
    assert collectives(text) == {"all-gather": {"count": 6, "bytes": 6 * 152}}


def test_reduce_scatter_counts_its_input_and_all_gather_start_its_output():
    text = """
ENTRY %main (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %start = (bf16[8]{0}, bf16[64]{0}) all-gather-start(bf16[8]{0} %x), dimensions={0}
  %done = bf16[64]{0} all-gather-done((bf16[8]{0}, bf16[64]{0}) %start)
  %q = f32[8]{0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
  ROOT %r = f32[8]{0} reduce-scatter(%p), replica_groups=[2,8]<=[16], dimensions={0}, to_apply=%add
}
"""
    assert collectives(text) == {
        "all-gather": {"count": 1, "bytes": 128},
        "reduce-scatter": {"count": 2, "bytes": 512},
    }


def test_largest_buffers_of_hbm_in_a_memory_report():
    """In libtpu's form: a table for each memory space, a row for each buffer. Only the first space is HBM."""
    rows = """
    3.38GiB( 22%);    3.38GiB;            0;                5; f32[15000,4,15000], 2×bf16[1,15000,60000]
    3.38GiB( 45%);  512.00MiB;   3624960000;                6; f32[60000,15000]
    3.38GiB(100%);       512B;  10851942400;                1; (bf16[1,15000,60000], u32[])
"""
    header = "  cumulative_size;       size;       offset; used_by_n_values; shapes_list\n  ---"
    report = f"Memory Space: default (color=0)\nTotal bytes: 9 (1GiB)\n{header}{rows}\n{header}\n"
    report += "    3.35GiB(100%);    3.35GiB;            0;                1; f32[15000,60000]\n"
    other = f"Memory Space: vmem (color=1)\n{header}\n   9.00GiB(100%);    9.00GiB;    0;    1; f32[9]\n"
    assert largest_buffers(report + other, 3) == [
        (int(3.38 * 2**30), "f32[15000,4,15000], 2×bf16[1,15000,60000]"),
        (int(3.35 * 2**30), "f32[15000,60000]"),
        (2**29, "f32[60000,15000]"),
    ]
    assert largest_buffers("", 3) == []


def program(blocks, rates=(1, 8, "linear")):
    """The number of lines of a fine-tuning step whose blocks have these rates in turn."""
    hybrid = HybridConfig(rates=tuple(itertools.islice(itertools.cycle(rates), blocks)))
    network = WanConfig(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=blocks, hybrid=hybrid,
    )  # fmt: skip
    graph, params = nnx.split(nnx.eval_shape(lambda: WanTransformer(network, remat="blocks", rngs=nnx.Rngs(0))))
    config, array = base(), lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    optimizer = adamw(config.finetune)
    state = jax.eval_shape(lambda params: initial_train_state(params, optimizer, 0.0), params)
    batch = {"latents": array(1, 3, 10, 6, 4), "text": array(1, 7, 16)}
    step = make_update(config, optimizer, graph, graph)
    return len(step.lower(state, params, batch, jax.eval_shape(lambda: jax.random.key(0))).as_text().splitlines())


def test_a_program_grows_with_its_distinct_rates_and_not_with_its_blocks():
    """Blocks of alternating rates are one scan with a branch for each rate, which keeps compile time small."""
    eight, thirty = program(8), program(30)
    assert thirty == pytest.approx(eight, rel=0.02)
    assert program(8, rates=(1, 8)) < 0.9 * eight, "fewer rates, but not a smaller program"


def sizes_of(network):
    return ModelSizes("a transformer", network, TextEncoderConfig(), VaeConfig())


def run(*arguments):
    return main(["compile", "--config=tiny", *arguments])


@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["--stage=sample", "--topology=v9:2x2"], 2, ["--topology", "v5e:4x4", "'v9:2x2'"]),
        (["--stage=sample", "--topology=v5e:3x5"], 2, ["--topology=v5e:3x5"]),
        (["--stage=sample", "--topology=v5e:2x2", "--config.mesh.data=1"], 3, ["= 1 devices, v5e:2x2 has 4"]),
        (["--stage=distill", "--topology=v5e:2x2", "--config.mesh.data=4"], 3, ["data 4 x fsdp 1 divides, found 1"]),
        (
            ["--stage=sample", "--topology=v5p:4x4x4", "--config.mesh.data=8", "--config.mesh.context=8"],
            3,
            ["data 8 x fsdp 1 x context 8 x tensor 1: expected axes that are whole sides"],
        ),
        (
            ["--stage=sample", "--topology=v5e:2x2", "--config.mesh.data=4", "--config.evaluate.batch=40000"],
            3,
            ["sample on v5e:2x2", "exceeds available HBM (15.75G)"],
        ),
        (["--stage=finetune", "--topology=v5e:2x2", "--config.mesh.tensor=4", "--config.plan.budget=0.5"], 2, ["15R2"]),
    ],
)
def test_bad_topologies_meshes_and_sizes_are_refused(capsys, arguments, code, parts):
    assert run(*arguments) == code
    output = capsys.readouterr()
    error = output.err.strip().splitlines()[-1]
    assert all(part in error for part in parts), error
    if "exceeds available HBM" in error:
        title, *buffers = output.out.splitlines()
        assert "largest buffers" in title and 1 <= len(buffers) <= 8 and "GiB" in buffers[0] and "f32[" in output.out


@needs_libtpu
def test_training_of_a_teacher_compiles_for_tpus(capsys):
    small = {"layers": 2, "heads": 2, "head_dim": 128, "ffn_dim": 128, "batch": 4, "optimizer": "adamw"}
    fields = [f"--config.train.{name}={value}" for name, value in small.items()]
    fields += [f"--config.video.{name}={value}" for name, value in {"frames": 5, "height": 64, "width": 64}.items()]
    assert run("--stage=train", "--topology=v5e:2x2", "--config.mesh.data=4", *fields) == 0
    assert "train on v5e:2x2" in capsys.readouterr().out


@needs_libtpu
def test_distillation_compiles_for_tpus(tmp_path, capsys):
    file = tmp_path / "found.json"
    mesh = ["--config.mesh.data=2", "--config.mesh.context=2", "--config.distill.batch=2", "--config.hybrid.rates=8"]
    rates = ["--config.plan.rates=(1, 8)", "--config.plan.budget=3R8"]
    assert run("--stage=distill", "--topology=v5e:2x2", *mesh, *rates, f"--json={file}") == 0
    found = json.loads(file.read_text())
    memory = found["memory_bytes"]
    assert 0 < memory["argument"] < memory["peak"] < found["capacity_bytes"] == 16 * 2**30
    assert found["collectives"]["all-gather"]["bytes"] > 0
    # The cost model counts the same FLOPs. Parameters are read at least once.
    assert found["flops"] == pytest.approx(found["flops_per_device"], rel=0.2)
    assert found["hbm_bytes"] > memory["argument"] and found["bound_by"] in found["seconds"]
    output = capsys.readouterr().out
    assert "static estimate" in output and f"bound by {found['bound_by']}" in output
    flags = [
        "--config=tiny",
        "--topology=v5e:2x2",
        f"--compiled={file}",
        *rates,
        f"--json={tmp_path / 'roofline.json'}",
    ]
    assert main(["roofline", *flags]) == 0
    rows = {row["stage"]: row for row in json.loads((tmp_path / "roofline.json").read_text())["stages"]}
    assert rows["distill"]["seconds"] == found["seconds"] and rows["distill"]["counted_by"] == "compiled program"


@pytest.fixture(scope="module")
def sharded_step():
    """HLO of fine-tuning with one block at rate 2 and one at rate 1; 61 of 244 tokens, and two examples, per chip."""
    overrides = {
        "mesh.data": "4", "mesh.context": "4", "model.dtype": "bfloat16", "model.remat": "blocks",
        "finetune.batch": "8", "hybrid.stabilizer": "max", "plan.budget": "1R2",
        "video.frames": "5",
    }  # fmt: skip
    config = load_config("tiny", overrides)
    network = WanConfig(
        num_attention_heads=2, attention_head_dim=128, in_channels=8, out_channels=8, text_dim=64, ffn_dim=384,
        num_layers=2,
    )  # fmt: skip
    _, devices = chip_and_devices("v5e:4x4", 1)
    return lowered("finetune", config, sizes_of(network), make_mesh(config.mesh, devices)).compile().as_text()


@needs_libtpu
def test_a_sharded_step_uses_the_kernels(sharded_step):
    calls = [line for line in sharded_step.splitlines() if "tpu_custom_call" in line]
    for kernel in ("attend", "state", "attend_backward", "read_out_backward", "state_backward"):
        assert any(f"hybrid_{kernel}" in line for line in calls), kernel
    assert {"all-gather", "all-reduce"} <= collectives(sharded_step).keys()


@needs_libtpu
@pytest.mark.parametrize("stage", ["sample", "finetune"])
def test_one_of_eight_chips_uses_the_kernels(stage):
    """The lowered program is enough: it holds the kernels already, and compiling takes longer."""
    overrides = {"model.dtype": "bfloat16", "plan.budget": "1R2", "video.frames": "5", "evaluate.batch": "2"}
    config = load_config("tiny", overrides | {"finetune.batch": "2"})
    network = WanConfig(
        num_attention_heads=2, attention_head_dim=128, in_channels=8, out_channels=8, text_dim=64, ffn_dim=384,
        num_layers=2,
    )  # fmt: skip
    _, devices = chip_and_devices("v5e:2x4", 1)
    assert len(devices) == 8
    program = lowered(stage, config, sizes_of(network), make_mesh(config.mesh, devices[:1])).as_text()
    kernels = set(re.findall(r"hybrid_[a-z_]*[a-z]", program))
    assert {"hybrid_attend", "hybrid_state"} <= kernels and "tpu_custom_call" in program
    assert ("hybrid_attend_backward" in kernels) == (stage == "finetune")


@needs_libtpu
def test_feed_forward_layers_do_not_gather_tokens(sharded_step):
    """Each chip has two examples of 61 tokens. A layer that flattened batch and tokens would gather all of them."""
    hidden = set(re.findall(r"\w+\[((?:\d+,)+)384\]", sharded_step))
    assert "2,61," in hidden
    assert not hidden & {"2,244,", "488,"}
