"""Two processes, one of which gets a signal: both save and stop after the same step, and later resume from it.

Both also save after the same step when the last save is old by the clock of one of them, and stop and resume sums.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 12
TRAINING = """
import json, os, signal, sys, types
coordinator, number, folder, signal_at, name = sys.argv[1:]
number, signal_at = int(number), int(signal_at)
from jsurgery.runtime import processes
processes.join(coordinator, 2, number)
import jax
import numpy as np
from etils import epath
from jsurgery.config import base
from jsurgery.errors import Interrupted, Terminated
from jsurgery.runtime import checkpoints as checkpoints_module
from jsurgery.runtime.checkpoints import Checkpoints
from jsurgery.runtime.mesh import to_host, make_mesh, put_state
from jsurgery.runtime.preemption import Preemption
from jsurgery.runtime.resumable_sums import ResumableSums

config = base()
config.mesh.fsdp = 2
mesh = make_mesh(config.mesh)
clock = 0
checkpoints_module.time = types.SimpleNamespace(monotonic=lambda: clock)
state = put_state(mesh, {"ffn_in": {"kernel": np.arange(8, dtype=np.float32).reshape(4, 2)}})
update = jax.jit(lambda state, step: jax.tree.map(lambda leaf: leaf * 1.5 + step, state), donate_argnums=0)
result = {"steps": []}
try:
    with Checkpoints(folder, every=100, minutes=1, keep=9) as checkpoints, Preemption("training") as preemption:
        start, state = checkpoints.restore(state)
        for step in range(start, STEPS):
            state = update(state, float(step))
            clock += 25 if number == 0 else 0  # the other's clock stands still
            if number == 1 and step == signal_at:
                os.kill(os.getpid(), getattr(signal, name))
            result["steps"].append(step)
            last = preemption.should_stop() or step + 1 == STEPS
            checkpoints.save(step + 1, state, last=last)
            preemption.stop_if_asked()
except (Terminated, Interrupted) as error:
    result["ended"] = type(error).__name__
result["state"] = to_host(state)["ffn_in"]["kernel"].tolist()

def measure(piece):
    result["measured"].append(piece)
    if number == 1 and piece == 2:
        os.kill(os.getpid(), getattr(signal, name))
    return {"a": np.float64(piece)}

def add_up():
    sums = ResumableSums(epath.Path(folder).parent / "sums.json", "sums", "numbers")
    return float(sums.add_up("numbers", 6, measure)["a"])

result["measured"] = []
try:
    add_up()
except (Terminated, Interrupted):
    result["measured"].append("stopped")
result["sum"] = add_up()
print(json.dumps(result), flush=True)
""".replace("STEPS", str(STEPS))


def run(folder: pathlib.Path, signal_at: int, name: str = "SIGTERM") -> list[dict]:
    """The printed results of two processes, the second of which gets the signal `name` in step `signal_at`."""
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        coordinator = f"localhost:{free_port.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINING, coordinator, str(number), str(folder), str(signal_at), name],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=900) for process in workers]
    assert [process.returncode for process in workers] == [0, 0], [errors[-2000:] for _, errors in outputs]
    return [json.loads(line) for output, _ in outputs for line in output.splitlines() if line.startswith("{")]


def test_both_stop_after_the_same_step_and_resume(tmp_path):
    first, second = run(tmp_path / "checkpoints", signal_at=4)
    assert first == second and first["ended"] == "Terminated"
    assert first["steps"] == list(range(6)), "signalled in the fifth step, stopped after the sixth"
    assert first["measured"] == [0, 1, 2, 3, "stopped", 4, 5] and first["sum"] == 15
    saved = lambda: sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved() == [4, 6], "process 0 finds a minute gone after the third step; both save after the fourth"
    for resumed in run(tmp_path / "checkpoints", signal_at=-1):
        assert resumed["measured"] == [] and resumed["sum"] == 15
        assert resumed["steps"] == list(range(6, STEPS)) and "ended" not in resumed
        state = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
        for step in range(STEPS):
            state = [[1.5 * value + step for value in row] for row in state]
        assert resumed["state"] == state
    assert saved() == [4, 6, 10, 12]
