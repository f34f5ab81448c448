"""What lies on each device before the programs of a surgery, against the declaration that meshes are chosen by."""

import shutil

import jax.numpy as jnp
import pytest
from flax import nnx

from jsurgery.wan.checkpoint import save_transformer
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer

# Weights that outweigh batches and schedules, so that 5 % of all bytes are a small part of the weights.
NETWORK = WanConfig(
    num_attention_heads=4, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=1024,
    num_layers=4,
)  # fmt: skip
SCRIPT = """
import gc, json, sys
import jax, jax.numpy as jnp
from jsurgery import run as runs
from jsurgery.estimate.programs import lowered
from jsurgery.load_config import load_config
from jsurgery.runtime.mesh import make_mesh
from jsurgery.surgery import finetune
from jsurgery.surgery.distillation import replay
from jsurgery.surgery.phases import phases_of
from jsurgery.wan import pipeline

model, workdir, prompts = sys.argv[1:]
fields = {
    "model.path": model, "model.dtype": "bfloat16", "prompts": prompts, "mesh.data": "2", "mesh.fsdp": "2",
    "video.frames": "5", "video.height": "64", "video.width": "48", "text_length": "16", "sampler.steps": "2",
    "trace.prompts": "8", "trace.holdout": "4", "trace.batch": "4", "trace.keep_steps": "2", "hybrid.rates": "2",
    "plan.rates": "(1, 2)", "plan.budget": "2R2", "plan.errors": "attention", "distill.steps": "2",
    "distill.batch": "4", "distill.velocity_steps": "0", "finetune.steps": "2", "finetune.batch": "4", "data.path": "",
    "evaluate.prompts": "4", "evaluate.batch": "4",
}
config = load_config("tiny", fields)
gc.collect()
seen = {}

def live():
    sizes = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            sizes[shard.device.id] = sizes.get(shard.device.id, 0) + shard.data.nbytes
    return sizes

before = live()

def watched(stage, program):
    def call(*arguments, **options):
        held = max(size - before.get(device, 0) for device, size in live().items())
        seen[stage()] = max(held, seen.get(stage(), 0))
        return program(*arguments, **options)
    call.lower = program.lower
    return call

current = [None]
place = runs.Run.place
runs.Run.place = lambda self, stage: (current.__setitem__(0, stage), place(self, stage))[1]
pipeline.sampling_step = watched(lambda: current[0], pipeline.sampling_step)
for module, stage in ((replay, "distill"), (finetune, "finetune")):
    make = module.make_update
    module.make_update = lambda *a, make=make, stage=stage: watched(lambda: stage, make(*a))
run = runs.start_run(config, workdir)
run.run_commands(("trace", "distill", "plan", "operate", "finetune", "evaluate"))
mesh = make_mesh(config.mesh)
for stage, program in (("trace", "trace"), ("distill", "distill"), ("finetune", "finetune"), ("evaluation", "sample")):
    declared = next(phase for phase in phases_of(stage, config, run.sizes, mesh) if phase.program == program)
    memory = lowered(program, config, run.sizes, mesh).compile().memory_analysis()
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(json.dumps([stage, seen[stage], sum(declared.held.values()), temporary]))
    if stage == "trace":
        teacher = run.load_pipeline(mesh).transformer
        leaked = jax.tree.map(jnp.copy, teacher.blocks.ffn_in.kernel[...])
        run.shared_pipeline().with_transformer(teacher).sample(["a circle"] * 4, config, seed=0)
        print(json.dumps(["leak", seen["evaluation"], sum(declared.held.values()), temporary]))
"""


@pytest.fixture(scope="module")
def model(tiny_pipeline, tmp_path_factory):
    """The tiny pipeline with a wider transformer, and a file of prompts."""
    folder = tmp_path_factory.mktemp("wider") / "model"
    shutil.copytree(tiny_pipeline, folder, ignore=shutil.ignore_patterns("transformer"))
    save_transformer(WanTransformer(NETWORK, dtype=jnp.float32, rngs=nnx.Rngs(0)), folder / "transformer")
    (folder.parent / "prompts.txt").write_text("\n".join(f"a circle, {number}" for number in range(12)))
    return folder


def test_phases_hold_what_they_declare(on_fake_devices, model, tmp_path):
    """On 4 of 8 devices, within 5 %, of the arrays alone and with the programs' own; a planted leak is caught."""
    rows = on_fake_devices(SCRIPT, str(model), str(tmp_path / "run"), str(model.parent / "prompts.txt"))
    print(rows)
    assert [stage for stage, *_ in rows] == ["trace", "leak", "distill", "finetune", "evaluation"]
    for stage, live, held, temporary in rows:
        within = abs(live - held) < 0.05 * held and abs(live - held) < 0.05 * (held + temporary)
        assert within == (stage != "leak"), (stage, live, held, temporary)
