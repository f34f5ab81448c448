"""One of the two processes of `test_processes.py`, and the commands that it compares with a single process.

python two_processes.py HOST:PORT NUMBER WORKDIR FIELDS MESH STAGE ...
"""

import collections
import functools
import gc
import json
import os
import pathlib
import sys

import numpy as np

from jsurgery.cli import main
from jsurgery.data import encode, sprites
from jsurgery.data.video_writer import write_video
from jsurgery.errors import DoesNotFit, InputError
from jsurgery.evaluate.sprites_score import DIMENSIONS
from jsurgery.load_config import load_config
from jsurgery.run import start_run
from jsurgery.runtime import processes
from jsurgery.runtime.checkpoints import Checkpoints
from jsurgery.runtime.mesh import make_mesh, put_state, to_host
from jsurgery.wan import pipeline, vae_chunks
from jsurgery.wan.transformer import WanTransformer

CLIPS = 4
APART = {"mesh.data": "2", "mesh.tensor": "2"}  # the devices of a process, for commands that divide prompts or clips
# {command: {device: its work}}, a piece that k devices share being a k-th of a piece for each of them.
work = collections.defaultdict(lambda: collections.defaultdict(float))


def write_inputs(folder: pathlib.Path) -> None:
    """Prompts, and videos with captions."""
    folder.mkdir()
    scenes = [sprites.scene_at(0, number, two_sprites=0.0) for number in range(CLIPS)]
    (folder / "prompts.txt").write_text("\n".join(scene.caption for scene in scenes))
    for number, scene in enumerate(scenes):
        write_video(folder / "videos" / f"{number}.mp4", sprites.render(scene, 9, 64, 48), 16)
        (folder / "videos" / f"{number}.txt").write_text(scene.caption)


def bound_scores(workdir: pathlib.Path) -> None:
    """Writes the bounds of the sprites score, which would take a while to measure."""
    (workdir / "evaluation").mkdir()
    bounds = [dict.fromkeys(DIMENSIONS, bound) for bound in (1.0, 0.0)]
    (workdir / "evaluation" / "reference.json").write_text(json.dumps(bounds))


def run_apart(folder: pathlib.Path, inputs: pathlib.Path, model: pathlib.Path, fields: dict[str, str]) -> None:
    """The commands in which every process has its share of the prompts or clips: `folder` gets their results."""
    prompts, teacher = inputs / "prompts.txt", fields["model.path"]
    fields = fields | {"data.clips_per_shard": "2", "data.batch": "2"}
    config = ["--config=tiny", *(f"--config.{name}={value}" for name, value in fields.items())]
    # In this process, since others take seconds to start.
    encode.decode_in_processes = lambda work, clips, workers: (work(clip) for clip in clips)  # type: ignore[assignment]
    for command in (
        ["evaluate fidelity", f"--teacher={teacher}", f"--model={model}", f"--prompts_file={prompts}"],
        ["evaluate vbench", f"--prompts={prompts}", "--seeds=1"],
        ["synthesize", f"--prompts_file={prompts}"],
        ["encode", f"--videos={inputs / 'videos'}"],
    ):
        name, *flags = command
        output = "--output" if name == "evaluate vbench" else "--workdir"
        assert counted(name, functools.partial(main, [*name.split(), f"{output}={folder}", *flags, *config])) == 0


def counted(command: str, call):
    """What `call` returns. Its work counts as that of the command."""
    global doing
    doing = command
    return call()


def note(device_pieces) -> None:
    """Counts a piece of work for every device; pieces are equal where devices do the same work."""
    pieces = [(device, json.dumps(piece, default=str)) for device, piece in device_pieces]
    times = collections.Counter(piece for _, piece in pieces)
    for device, piece in pieces:
        work[doing][device.id] += 1 / times[piece]


def count_work() -> None:
    """Counts tokens by the sharding that the transformer gives them, and clips of the VAE."""
    sharding, step, chunk = WanTransformer._sharding, pipeline.sampling_step, vae_chunks._a_clip_a_device

    def counted_sharding(self, batch, *dimensions):
        where = sharding(self, batch, *dimensions)
        if dimensions == ("sequence", "heads"):
            note(where.devices_indices_map((batch, 8, 2)).items())
        return where

    def counted_step(transformer, text, negative_text, state, *more):
        transformer._sharding(2 * len(state.x), "sequence", "heads")  # both branches of the guidance at once
        return step(transformer, text, negative_text, state, *more)

    def counted_chunk(run_chunk, graph, devices, *more):
        note((device, number) for number, device in enumerate(devices.devices.flat))
        return chunk(run_chunk, graph, devices, *more)

    WanTransformer._sharding = counted_sharding
    pipeline.sampling_step = counted_step
    vae_chunks._a_clip_a_device = counted_chunk


def tell(workdir: str, call) -> None:
    """Appends what `call` returns or raises to a file; the standard output is Gloo's too, which breaks lines."""
    try:
        found = call()
    except (InputError, DoesNotFit, ValueError, RuntimeError) as error:
        found = [type(error).__name__, str(error)]
    with open(f"{workdir}_told_{processes.jax.process_index()}", "a") as told:
        print(json.dumps(found), file=told)


def fail(error: Exception) -> None:
    raise error


def restored(workdir: str, mesh: dict[str, str]) -> dict:
    devices = make_mesh(load_config("tiny", mesh).mesh)
    state = put_state(devices, {"ffn_in": {"kernel": np.arange(48, dtype=np.float32).reshape(8, 6)}})
    checkpoints = Checkpoints(workdir + "_state", every=1, keep=1)
    checkpoints.save(7, state, last=True)
    checkpoints.wait()
    step, found = checkpoints.restore(put_state(devices, {"ffn_in": {"kernel": np.zeros((8, 6), np.float32)}}))
    kernel = found["ffn_in"]["kernel"]
    held = [np.asarray(shard.data).shape for shard in kernel.addressable_shards]
    return {"step": step, "held": held, "kernel": to_host(kernel).ravel().tolist()}


def main_of_one(coordinator: str, number: int, workdir: str, fields: dict, mesh: dict, stages: list[str]) -> None:
    processes.join(coordinator, 2, number)
    tell(workdir, lambda: processes.gather_messages({"said": "é" * (2000 * number)}))
    tell(workdir, lambda: processes.on_first(lambda: {"by": number}))
    tell(workdir, lambda: processes.on_first(lambda: fail(InputError("no such file"))))
    tell(workdir, lambda: processes.on_first(lambda: fail(ValueError("a fault"))))
    tell(workdir, lambda: processes.on_all(lambda: fail(InputError("no such host")) if number else "fine"))
    start = lambda more, folder: start_run(load_config("tiny", fields | more), folder)
    tell(workdir, lambda: start(mesh | {"log_every": str(1 + number)}, workdir))
    tell(workdir, lambda: start({"mesh.data": "1"}, workdir))
    tell(workdir, lambda: restored(workdir, mesh))
    count_work()
    counted("trace", lambda: start(mesh, workdir + "_traced").run_command("trace"))
    run = start(mesh, workdir)
    for stage in stages:
        counted(stage, functools.partial(run.run_command, stage))
    if os.environ.get("FULL_GRID") == "1":
        model, inputs = pathlib.Path(workdir, "hybrid"), pathlib.Path(workdir + "_inputs")
        run_apart(pathlib.Path(workdir + "_apart"), inputs, model, fields | APART)
    own = {device.id for device in processes.jax.local_devices()}
    tell(workdir, lambda: {name: {d: n for d, n in by.items() if d in own} for name, by in work.items()})


if __name__ == "__main__":
    gc.set_threshold(50_000, 20, 50)
    coordinator, number, workdir, fields, mesh, *stages = sys.argv[1:]
    main_of_one(coordinator, int(number), workdir, json.loads(fields), json.loads(mesh), stages)
