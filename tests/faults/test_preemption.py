"""SIGTERM and SIGINT end a run after the current step, which is saved; the same command resumes from it."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from jsurgery import cli
from jsurgery.commands import surgery
from jsurgery.data.latents import batches
from jsurgery.errors import Interrupted, Terminated
from jsurgery.runtime.metrics import Metrics, read_metrics
from jsurgery.runtime.preemption import KINDS, Preemption
from jsurgery.runtime.resumable_sums import ResumableSums
from jsurgery.surgery import finetune
from tests.faults.tiny_training import BATCH, SEED, saved_state, tiny_config, train, write_latents

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, Interrupted)])
def test_a_signal_ends_the_run_after_the_step(number, kind):
    before = [signal.getsignal(number) for number in KINDS]
    with Preemption("stage") as preemption:
        assert not preemption.should_stop()
        preemption.stop_if_asked()
        os.kill(os.getpid(), number)
        preemption.stop_if_asked()  # not before the end of the step
        assert preemption.should_stop()
        with pytest.raises(kind, match=f"stage: stopped by {number.name}; .* the same command goes on"):
            preemption.stop_if_asked()
    assert [signal.getsignal(number) for number in KINDS] == before


def test_sums_resume_unless_they_were_made_with_something_else(tmp_path):
    path, measured = epath.Path(tmp_path / "sums.json"), []

    def add_up(made_with, *, interrupt_at=None):
        def measure(number):
            measured.append(number)
            if number == interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            return {"a": np.float32([number, 0.1]), "b": 0.5}

        measured.clear()
        sums = ResumableSums(path, "stage", made_with)
        found = sums.add_up("numbers", 7, measure, save_every=3)
        return found, sums

    whole, sums = add_up([1, 2])
    assert measured == list(range(7)) and whole["a"][0] == 21 and whole["b"] == 3.5
    sums.remove()
    with pytest.raises(Interrupted, match="stage: stopped by SIGINT"):
        add_up([1, 2], interrupt_at=4)
    begun = path.read_bytes()
    resumed, sums = add_up([1, 2])
    assert measured == [5, 6] and resumed["a"].tolist() == whole["a"].tolist()
    path.write_bytes(begun)
    assert add_up([1, 3])[0]["a"].tolist() == whole["a"].tolist() and measured == list(range(7))
    sums.remove()
    assert not path.exists()


def test_a_second_interrupt_ends_the_process_at_once():
    script = """
import os, signal, sys, time
from jsurgery.runtime.preemption import Preemption
with Preemption("stage"):
    for _ in range(int(sys.argv[1])):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    print("alive")
"""
    for count, code, output in ((1, 0, "alive\n"), (2, -signal.SIGINT, "")):
        command = [sys.executable, "-c", script, str(count)]
        process = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, timeout=120
        )
        assert (process.returncode, process.stdout) == (code, output)


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (Terminated("stopped"), 143),
        (Interrupted("stopped"), 130),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "/full/file"), 2),
        (RuntimeError("RESOURCE_EXHAUSTED: write: No space left on device"), 2),
    ],
)
def test_exit_codes_of_signals_and_full_disks(monkeypatch, capsys, raised, code):
    def stage(options, overrides):
        raise raised

    monkeypatch.setattr(surgery, "run_surgery", stage)
    assert cli.main(["distill", "--workdir=somewhere"]) == code
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and message.startswith("jsurgery: ")


def test_another_runtime_error_is_raised(monkeypatch):
    def stage(options, overrides):
        raise RuntimeError("a fault")

    monkeypatch.setattr(surgery, "run_surgery", stage)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["distill", "--workdir=somewhere"])


def test_stopped_and_resumed_fine_tuning_equals_an_uninterrupted_run(tiny_pipeline, tmp_path, monkeypatch):
    """SIGTERM in the third of six steps, before any checkpoint is due. The resumed run takes the remaining batches."""
    write_latents(tmp_path / "latents")
    config, taken = tiny_config(), []
    config.checkpoint.every = 100

    def recorded_batches(*arguments):
        data = batches(*arguments)

        class Recorded:
            def __getitem__(self, index):
                taken.append((index, data[index]["latents"].tobytes()))
                return data[index]

        return Recorded()

    monkeypatch.setattr(finetune, "batches", recorded_batches)
    run = lambda name: train(config, tiny_pipeline, tmp_path / "latents", tmp_path / name, monkeypatch)
    leaves = lambda model: [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    uninterrupted, all_taken = leaves(run("straight")), list(taken)
    assert [index for index, _ in all_taken] == list(range(6)) and len({batch for _, batch in all_taken}) == 6

    log = Metrics.log

    def signalled(self, step, **values):
        log(self, step, **values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    taken.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", signalled)
        with pytest.raises(Terminated, match="finetune: stopped by SIGTERM"):
            run("stopped")
    assert taken == all_taken[:3]
    halfway = saved_state(tmp_path / "stopped", 3)["params"]
    resumed = leaves(run("stopped"))
    assert taken == all_taken
    assert all(np.array_equal(one, other) for one, other in zip(uninterrupted, resumed, strict=True))
    pairs = zip(uninterrupted, jax.tree.leaves(halfway), strict=True)
    assert not all(np.array_equal(one, other) for one, other in pairs), "the stopped run had already finished"
    assert [row["step"] for row in read_metrics(tmp_path / "stopped")] == [1, 2, 3, 4, 5, 6]


def test_batches_do_not_depend_on_earlier_batches(tmp_path):
    write_latents(tmp_path)
    order = lambda steps: [batches(tmp_path, BATCH, SEED)[step]["captions"] for step in steps]
    assert order(range(20)) == order(range(13)) + order(range(13, 20))
    assert order([13]) != order([0])
