"""What lies on each device before the programs of a surgery, against the declaration that meshes are chosen by."""

import shutil

import jax.numpy as jnp
import pytest
from flax import nnx

from jsurgery.wan.checkpoint import save_transformer
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer
from tests.conftest import FULL_GRID

# Weights that outweigh batches and schedules, so that 5 % of all bytes are a small part of the weights.
NETWORK = WanConfig(
    num_attention_heads=4, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=1024,
    num_layers=4,
)  # fmt: skip
SCRIPT = """
import gc, json, sys
import jax, jax.numpy as jnp
from jsurgery import run as runs
from jsurgery.load_config import load_config
from jsurgery.runtime import garbage
from jsurgery.runtime.mesh import make_mesh
from jsurgery.surgery import finetune
from jsurgery.surgery.distillation import replay
from jsurgery.surgery.phases import phases_of
from jsurgery.wan import pipeline

model, workdir, prompts, full = sys.argv[1:]
fields = {
    "model.path": model, "model.dtype": "bfloat16", "prompts": prompts, "mesh.data": "2", "mesh.fsdp": "2",
    "video.frames": "5", "video.height": "64", "video.width": "48", "text_length": "16", "sampler.steps": "2",
    "trace.prompts": "8", "trace.holdout": "4", "trace.batch": "4", "trace.keep_steps": "2", "hybrid.rates": "2",
    "plan.rates": "2", "plan.budget": "4R2", "plan.errors": "attention", "distill.steps": "2",
    "distill.batch": "4", "distill.velocity_steps": "0", "finetune.steps": "2", "finetune.batch": "4", "data.path": "",
    "evaluate.prompts": "4", "evaluate.batch": "4",
}
config = load_config("tiny", fields)
gc.collect()
large, garbage.LARGE = garbage.LARGE, 0  # as for models of true size
seen = {}

def live():
    buffers = {}  # one may be in several arrays: an array's shards are arrays, too
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            buffers[shard.device.id, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    sizes = {}
    for (device, _), size in buffers.items():
        sizes[device] = sizes.get(device, 0) + size
    return sizes

before = live()

def watched(stage, program):
    def call(*arguments, **options):
        held = max(size - before.get(device, 0) for device, size in live().items())
        seen[stage()] = max(held, seen.get(stage(), 0))
        return program(*arguments, **options)
    return call

current = [None]
place = runs.Run.place
runs.Run.place = lambda self, stage: (current.__setitem__(0, stage), place(self, stage))[1]
pipeline.sampling_step = watched(lambda: current[0], pipeline.sampling_step)
for module, stage in ((replay, "distill"), (finetune, "finetune")):
    make = module.make_update
    module.make_update = lambda *a, make=make, stage=stage: watched(lambda: stage, make(*a))
run = runs.start_run(config, workdir)
run.run_commands(("trace", "distill", *(("plan", "operate", "finetune", "evaluate") if full else ())))
mesh = make_mesh(config.mesh)
later = (("finetune", "finetune"), ("evaluation", "sample")) if full else ()
for stage, program in (("trace", "trace"), ("distill", "distill"), *later):
    declared = next(phase for phase in phases_of(stage, config, run.sizes, mesh) if phase.program == program)
    print(json.dumps([stage, seen[stage], sum(declared.held.values())]))
    if stage == "trace":
        teacher = run.load_pipeline(mesh).transformer
        leaked = jax.tree.map(jnp.copy, teacher.blocks.ffn_in.kernel[...])
        current[0] = "leak"
        run.shared_pipeline().with_transformer(teacher).sample(["a circle"] * 4, config, seed=0)
        print(json.dumps(["leak", seen["leak"], sum(declared.held.values())]))
garbage.LARGE = large
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
    """On 4 of 8 devices, within 5 % of the arrays before each program; a planted leak is caught.

    A program adds its own arrays to both sides, and so brings them closer together.
    """
    prompts, full = str(model.parent / "prompts.txt"), "all stages" if FULL_GRID else ""  # later ones take a minute
    rows = on_fake_devices(SCRIPT, str(model), str(tmp_path / "run"), prompts, full)
    later = ["finetune", "evaluation"] if FULL_GRID else []
    assert [stage for stage, *_ in rows] == ["trace", "leak", "distill", *later]
    for stage, live, held in rows:
        assert (abs(live - held) < 0.05 * held) == (stage != "leak"), (stage, live, held)
